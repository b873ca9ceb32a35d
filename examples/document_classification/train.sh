#!/usr/bin/env bash
# Train, test and tabulate one classifier.
#   bash examples/document_classification/train.sh CONFIG DATA RUN [KEY=VALUE ...]
# CONFIG is a file of config/ without its ending, DATA the folder written by prepare.py, RUN a folder for the results.
# Each KEY=VALUE changes the configuration; a key that the file lacks begins with +:
#   bash examples/document_classification/train.sh agnews runs/documents/data runs/documents/run task.num_classes=5 \
#       model.cell=rkm_cifg
# An interrupted run goes on where it stopped.
set -euo pipefail
source "$(dirname "$0")/../hydra_training.sh"
[ -f "$data/preparation.json" ] || fail "no data in $data: python $here/prepare.py --train FILE --test FILE --out $data"
mkdir -p "$run"

train
python -m fairseq_rkm.experiments.classification_scores "$run" "$data" $device
python scripts/report.py "$run" --out "$run/report"
