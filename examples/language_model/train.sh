#!/usr/bin/env bash
# Train, evaluate and tabulate one row of the table.
#   bash examples/language_model/train.sh CONFIG DATA RUN [KEY=VALUE ...]
# CONFIG is a file of config/ without its ending, DATA the folder written by prepare.sh, RUN a folder for the results.
# Each KEY=VALUE changes the configuration; a key that the file lacks begins with +:
#   bash examples/language_model/train.sh ptb_fast runs/ptb runs/ptb-rkm_lstm-1 model.cell=rkm_lstm \
#       common.seed=1 common.bf16=true
# An interrupted run goes on where it stopped. results/ keeps RUN/run.json alone.
set -euo pipefail
source "$(dirname "$0")/../hydra_training.sh"
[ -f "$data/test.bin" ] || fail "no data in $data: bash $here/prepare.sh TEXT $data"
# GPUs multiply float32 matrices in TF32, as recurrences of cuDNN and of this package do by default.
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-1}
mkdir -p "$run"

python scripts/report.py --circumstances "$run" --config "$config"
train
for split in valid test; do
  fairseq-eval-lm "$data" --user-dir fairseq_rkm --task stateful_language_modeling --gen-subset "$split" \
    --batch-size 1 --tokens-per-sample 350 --path "$run/checkpoint_best.pt" --num-workers 0 --log-format none $device \
    > "$run/$split.log" 2>&1 || { tail -5 "$run/$split.log" >&2; fail "evaluation failed; see $run/$split.log"; }
done
python scripts/report.py "$run" --out "$run"
