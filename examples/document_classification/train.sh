#!/usr/bin/env bash
# Train, test and tabulate one classifier.
#   bash examples/document_classification/train.sh CONFIG DATA RUN [KEY=VALUE ...]
# CONFIG is a file of config/ without its ending, DATA the folder written by prepare.py, RUN a folder for the results.
# Each KEY=VALUE changes the configuration; a key that the file lacks begins with +:
#   bash examples/document_classification/train.sh agnews runs/documents/data runs/documents/run task.num_classes=5 \
#       model.cell=rkm_cifg
# An interrupted run goes on where it stopped.
set -euo pipefail
fail() { printf 'train: %s\n' "$*" >&2; exit 1; }
[ $# -ge 3 ] || fail "give a configuration, the data's folder and the run's"
config=$1 data=$(realpath -m "$2") run=$(realpath -m "$3")
shift 3
cd "$(dirname "$0")/../.."
here=examples/document_classification
[ -f "$here/config/$config.yaml" ] || fail "no $here/config/$config.yaml"
[ -f "$data/preparation.json" ] || fail "no data in $data: python $here/prepare.py --train FILE --test FILE --out $data"
if [ -x .venv/bin/fairseq-hydra-train ]; then PATH=$PWD/.venv/bin:$PATH; fi
export PYTHONWARNINGS=ignore
mkdir -p "$run"

if ! grep -q 'done training' "$run/train.log" 2> /dev/null; then
  fairseq-hydra-train --config-dir "$here/config" --config-name "$config" common.user_dir="$PWD/fairseq_rkm" \
    task.data="$data" checkpoint.save_dir="$run" hydra.run.dir="$run/hydra" "$@" 2>&1 |
    python scripts/progress.py "$run/train.log" || fail "training failed; the whole output is in $run/train.log"
  grep -q 'done training' "$run/train.log" || fail "training ended early; the whole output is in $run/train.log"
fi
device=
for change in "$@"; do [ "${change#+}" != common.cpu=true ] || device=--cpu; done
python -m fairseq_rkm.experiments.classification_scores "$run" "$data" $device
python scripts/report.py "$run" --out "$run/report"
