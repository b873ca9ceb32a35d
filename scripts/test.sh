#!/usr/bin/env bash
# Set up if needed, then lint, check types and test. Arguments go to pytest: bash scripts/test.sh tests/ops -k gradcheck
# JOBS sets the number of test processes (default 2).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
# Tools run as modules: .venv may see tools of the Python that made it, and then has no commands for them.
tool() { .venv/bin/python -m "$@"; }
# Tests that cut the cable between two machines make network namespaces. Without ip they are skipped with a reason.
if ! command -v ip > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo "[test] installing iproute2" && { apt-get update -qq && apt-get install -qq -y iproute2; } > /dev/null 2>&1 || true
fi
tool ruff check .
tool ruff format --check .
tool mypy
# A file's tests run in one process and share their preparations.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} tool pytest -n "${JOBS:-2}" --dist loadfile "$@"
