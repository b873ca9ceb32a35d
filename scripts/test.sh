#!/usr/bin/env bash
# Set up if needed, then lint, type check and test. Arguments go to pytest: bash scripts/test.sh tests/ops -k gradcheck
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest "$@"
