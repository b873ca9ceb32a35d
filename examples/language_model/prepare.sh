#!/usr/bin/env bash
# Turn words into numbers: train.txt, valid.txt and test.txt (or .txt.xz) of a folder, tokenised, a sentence a line.
#   bash examples/language_model/prepare.sh TEXT DATA
# All words of train.txt are kept. Each line, even a blank one, ends with one end-of-sentence symbol.
set -euo pipefail
fail() { printf 'prepare: %s\n' "$*" >&2; exit 1; }
[ $# = 2 ] || fail "give two folders: the text's, and the one to write"
text=$1 data=$2
[ ! -e "$data/test.bin" ] || { printf 'prepare: %s is there already\n' "$data"; exit 0; }
if [ -x .venv/bin/fairseq-preprocess ]; then PATH=$PWD/.venv/bin:$PATH; fi
command -v fairseq-preprocess > /dev/null || fail "no fairseq-preprocess here: run it in the repository's root"

whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
for split in train valid test; do
  if [ -s "$text/$split.txt" ]; then
    cp "$text/$split.txt" "$whole/"
  elif [ -s "$text/$split.txt.xz" ]; then
    python3 -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' "$text/$split.txt.xz" \
      > "$whole/$split.txt" || fail "$text/$split.txt.xz is damaged"
  else
    fail "$text/$split.txt (or .txt.xz) is missing or empty"
  fi
done
python3 -m fairseq_rkm.data.text_file "$whole"/{train,valid,test}.txt 2> "$whole/log" ||
  fail "$(sed "s|^error: ||; s|$whole|$text|" "$whole/log")"
# Without --padding-factor 1 fairseq pads the dictionary to a multiple of 8.
fairseq-preprocess --only-source --trainpref "$whole/train.txt" --validpref "$whole/valid.txt" \
  --testpref "$whole/test.txt" --padding-factor 1 --destdir "$whole/data" > "$whole/log" 2>&1 ||
  { tail -5 "$whole/log" >&2; fail "fairseq-preprocess failed"; }
mkdir -p "$data"
cp "$whole/log" "$data/preprocess.log"
# test.bin is moved last: its presence means that all files are there.
mv "$whole"/data/dict.txt "$whole"/data/{train,valid}.{bin,idx} "$whole"/data/test.idx "$data/"
mv "$whole"/data/test.bin "$data/"
sed -n 's/.*\[None\] //p' "$data/preprocess.log" | sed 's|^/.*/||' | sort -u
