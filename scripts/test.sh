#!/usr/bin/env bash
# Set up if needed, then lint, type check and test. Arguments go to pytest: bash scripts/test.sh tests/ops -k gradcheck
# JOBS sets the number of test processes (default 2).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
# As modules: where .venv sees the packages of the Python it was made with, these may be there, without commands in .venv.
tool() { .venv/bin/python -m "$@"; }
tool ruff check .
tool ruff format --check .
tool mypy
# Whole files go to a process, so that tests of a file share what they have prepared.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} tool pytest -n "${JOBS:-2}" --dist loadfile "$@"
