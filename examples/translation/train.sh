#!/usr/bin/env bash
# Train, evaluate and tabulate one row of the table.
#   bash examples/translation/train.sh MODEL DATA OUT [flags of table.py]
# MODEL is one of table.py's, DATA what prepare.py wrote. OUT/MODEL-1 gets the model, OUT/results the table of all that
# OUT holds. PYTHON is an interpreter that has all that is needed (default .venv's, if there is one).
# A run that was interrupted goes on where it stopped.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 1; }
model=$1 data=$(realpath -m "$2") out=$(realpath -m "$3"); shift 3
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python; [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore
"$PYTHON" examples/translation/table.py "$data" --out "$out" --models "$model" "$@"
"$PYTHON" scripts/report.py "$out" --out "$out/results" --samples "$data"
