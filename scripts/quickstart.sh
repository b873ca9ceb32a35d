#!/usr/bin/env bash
# Train, evaluate and compare three language models of the same width with fairseq's own commands.
#   bash scripts/quickstart.sh        on the Python language reference: 3 to 5 minutes on 2 CPU cores
#   bash scripts/quickstart.sh DIR    on DIR/train.txt, DIR/valid.txt and DIR/test.txt (or .txt.xz), tokenised, a
#                                     sentence a line
# An interrupted run goes on where it stopped. UPDATES sets the updates of each model (default 1000).
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*"; }
fail() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

text=${1:-}
if [ -n "$text" ]; then
  text=$(realpath -m "$text")
  for split in train valid test; do
    [ -s "$text/$split.txt" ] || [ -s "$text/$split.txt.xz" ] ||
      fail "$text/$split.txt is missing or empty: give a folder with train, valid and test.txt (or .txt.xz)"
  done
fi
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
out=runs/quickstart${text:+-$(basename "$text")}
updates=${UPDATES:-1000}
mkdir -p "$out"

if [ -z "$text" ]; then
  text=$out/text
  say "Building a corpus from Python's own language reference"
  python scripts/python_reference_corpus.py "$text"
fi

for split in train valid test; do
  if [ ! -s "$text/$split.txt" ]; then
    mkdir -p "$out/text"
    python -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' "$text/$split.txt.xz" \
      > "$out/text/$split.txt"
  fi
done
[ -s "$text/train.txt" ] || text=$out/text

if [ ! -f "$out/data/test.bin" ]; then
  say "fairseq-preprocess: words to numbers"
  error=$(python -m fairseq_rkm.data.text_file "$text"/{train,valid,test}.txt 2>&1) || fail "${error#error: }"
  fairseq-preprocess --only-source --trainpref "$text/train.txt" --validpref "$text/valid.txt" \
    --testpref "$text/test.txt" --thresholdsrc 2 --padding-factor 1 --destdir "$out/data" > "$out/preprocess.log" 2>&1 ||
    { tail -5 "$out/preprocess.log" >&2; fail "preprocessing failed; see $out/preprocess.log"; }
  grep -o 'Dictionary: .* types' "$out/preprocess.log" | head -1
fi

for cell in rkm_lstm lstm linear_kernel_gated; do
  run=$out/$cell
  mkdir -p "$run"
  say "fairseq-train --user-dir fairseq_rkm --task stateful_language_modeling --arch rkm_lm --cell $cell"
  fairseq-train "$out/data" --user-dir fairseq_rkm --task stateful_language_modeling --arch rkm_lm --cell "$cell" \
    --layer-norm --decoder-embed-dim 200 --decoder-hidden-size 200 --decoder-layers 2 \
    --share-decoder-input-output-embed --dropout 0.4 --dropout-input 0.3 --dropout-hidden 0.3 --dropout-words 0.1 \
    --batch-size 20 --tokens-per-sample 35 --optimizer adam --lr 0.004 --lr-scheduler polynomial_decay \
    --total-num-update "$updates" --max-update "$updates" --clip-norm 0.25 --seed 1 --num-workers 0 \
    --validate-interval-updates 100 --save-interval-updates 100 --keep-interval-updates 1 --no-epoch-checkpoints \
    --validate-interval 1000000 --save-interval 1000000 --save-dir "$run" \
    --log-format json --log-interval 25 2>&1 |
    python scripts/progress.py "$run/train.log" --updates "$updates" ||
    fail "training failed; the whole output is in $run/train.log"
  for split in valid test; do
    fairseq-eval-lm "$out/data" --user-dir fairseq_rkm --task stateful_language_modeling --gen-subset "$split" \
      --batch-size 1 --path "$run/checkpoint_best.pt" --num-workers 0 --log-format none > "$run/$split.log" 2>&1 ||
      { tail -5 "$run/$split.log" >&2; fail "evaluation failed; see $run/$split.log"; }
    printf '  %s\n' "$split: $(grep -o 'Perplexity: .*' "$run/$split.log")"
  done
done

say "Results"
python scripts/report.py "$out"/{rkm_lstm,lstm,linear_kernel_gated} --out "$out/report"
cat <<EOF

What to try next:
  bash scripts/quickstart.sh DIR                 your own text: DIR/train.txt, valid.txt and test.txt
  UPDATES=5000 bash scripts/quickstart.sh DIR    longer, for a larger corpus
  fairseq-train ... --ngram 3                    each step sees three words; --no-feedback, --cell rkm_cifg, ran, ...
  docs/language_models.md, "Generate text"       let a model continue a prompt
  (fairseq's commands are in .venv/bin: source .venv/bin/activate)
EOF
