#!/usr/bin/env bash
# Train a table of classifiers for each kernel of the candidate, and classify by Gram matrices of untrained machines:
#
#     bash examples/document_classification/kernels.sh DATA OUT [flags of table.py, then -- and flags of fairseq-train]
#
# DATA holds a folder agnews with train.csv and test.csv (or .csv.xz, .csv.gz). Each kernel's results are in OUT/KERNEL,
# and those of the Gram matrices in OUT/gram.json. The same command goes on after an interruption.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: bash examples/document_classification/kernels.sh DATA OUT [flags of table.py]" >&2
    exit 2
fi
data=$1 out=$2
shift 2
here=$(dirname "$0")

extra=("$@")
[[ " $* " == *" -- "* ]] || extra+=(--)

for kernel in linear polynomial-2 polynomial-3 gaussian arccos-1 arccos-0; do
    flags=(--kernel "${kernel%-*}")
    [ "$kernel" = "${kernel%-*}" ] || flags+=(--kernel-degree "${kernel##*-}")
    python "$here/table.py" --data "$data" --datasets agnews --out "$out/$kernel" "${extra[@]}" "${flags[@]}"
done

device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
train=$(ls "$data"/agnews/train.csv* | head -n 1)
test=$(ls "$data"/agnews/test.csv* | head -n 1)
python "$here/gram.py" --train "$train" --test "$test" --device "$device" --out "$out/gram.json"
