#!/usr/bin/env bash
# Train, evaluate and tabulate one row of the table.
#   bash examples/translation/train.sh MODEL DATA OUT [flags of table.py]
# MODEL is one of table.py's, DATA the folder written by prepare.py. OUT/MODEL-1 gets the model, and OUT/results a table
# of all models in OUT. PYTHON is an interpreter with this package (default .venv's, if there is one).
# An interrupted run goes on where it stopped.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 1; }
model=$1 data=$(realpath -m "$2") out=$(realpath -m "$3"); shift 3
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python; [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore
"$PYTHON" examples/translation/table.py "$data" --out "$out" --models "$model" "$@"
"$PYTHON" scripts/report.py "$out" --out "$out/results" --samples "$data"
