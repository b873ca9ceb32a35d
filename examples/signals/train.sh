#!/usr/bin/env bash
# Train, test and tabulate one classifier of signals.
#   bash examples/signals/train.sh CONFIG DATA RUN [KEY=VALUE ...]
# CONFIG is a file of config/ without its ending, DATA the folder written by prepare.py with a test part, RUN a folder
# for the results. Each KEY=VALUE changes the configuration; a key that the file lacks begins with +:
#   bash examples/signals/train.sh eeg runs/eeg/data runs/eeg/run model.cell=rkm_cifg model.ngram=20
# An interrupted run goes on where it stopped.
set -euo pipefail
source "$(dirname "$0")/../hydra_training.sh"
[ -f "$data/signals.json" ] || fail "no data in $data: python $here/prepare.py --train FILE --test FILE --out $data"
mkdir -p "$run"

train
python -m fairseq_rkm.experiments.signal_scores "$run" "$data" $device
python scripts/report.py "$run" --out "$run/report"
