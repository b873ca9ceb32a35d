#!/usr/bin/env bash
# From raw parallel text to BLEU: prepare the text, train, average the last checkpoints, translate the test sets, score.
#   bash examples/translation/run.sh TEXT de en                   TEXT holds train.de, train.en, valid.de, ..., test.en
#   bash examples/translation/run.sh TEXT de en --models all --seeds 1 2 3 --jobs 4      more goes to table.py
# VOCABULARY sets the number of subwords (default 8000), FOLDER the place for all files (default
# runs/translation/de-en), PYTHON an interpreter with this package (default .venv's, made if it is missing).
# An interrupted run goes on where it stopped.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,7s/^# //p' "$0" >&2; exit 1; }
text=$(realpath -m "$1") source=$2 target=$3; shift 3
cd "$(dirname "$0")/../.."
[ -d "$text" ] || { echo "run: there is no folder $text" >&2; exit 1; }
out=${FOLDER:-runs/translation/$source-$target}
if [ -z "${PYTHON:-}" ]; then
  bash scripts/setup.sh
  PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore
"$PYTHON" examples/translation/prepare.py "$text" -s "$source" -t "$target" --out "$out/data" \
  --vocabulary "${VOCABULARY:-8000}"
PYTHON=$PYTHON bash examples/translation/train.sh rkm_lstm "$out/data" "$out" "$@"
