#!/usr/bin/env bash
# Make .venv with PyTorch, fairseq and this package. A second call returns at once.
#   PYTHON=python3.12 bash scripts/setup.sh       another Python (3.11, 3.12, 3.13)
#   TORCH='torch==2.11.0' bash scripts/setup.sh   another PyTorch; without TORCH, an installed one is kept
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
say() { printf '[setup] %s\n' "$*"; }

stamp=.venv/.done
wanted="$(cat setup.py scripts/setup.sh | cksum) ${TORCH:-}"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

"$python" -c '' 2> /dev/null || { say "no $python here that runs: set PYTHON" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { say "$("$python" --version) is too old: 3.11 or newer is needed (set PYTHON)" >&2; exit 1; }
command -v c++ > /dev/null || command -v g++ > /dev/null ||
  { say "fairseq is built from source and needs a C++ compiler: install g++" >&2; exit 1; }

# A machine without a GPU gets the build for CPUs: 200 MB in place of several GB. pip asks its own package index first,
# then PyTorch's. If neither has that build, the default build of its own index is installed.
install_torch() {
  if [ "$(uname -sm)" = 'Linux x86_64' ] && [ ! -e /dev/nvidiactl ] && [ ! -e /proc/driver/nvidia/version ]; then
    say "installing $1 for CPUs"
    pip install -q "$1+cpu" 2> /dev/null && return
    pip install -q --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "$1" 2> /dev/null && return
    say "no build for CPUs can be reached"
  fi
  say "installing $1 (for GPUs a download of several GB)"
  pip install -q "$1"
}
torch_version() { .venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))' 2> /dev/null; }

if [ ! -x .venv/bin/python ]; then
  # This Python may have a PyTorch already, as in a GPU machine's image. .venv then sees and keeps it.
  site=(); "$python" -c 'import torch' 2> /dev/null && site=(--system-site-packages)
  say "making .venv with $("$python" --version)${site:+, which sees the PyTorch that is installed}"
  "$python" -m venv "${site[@]}" .venv
fi
if [ -n "${TORCH:-}" ]; then
  say "installing $TORCH"
  pip install -q "$TORCH"
elif ! torch_version > /dev/null; then
  install_torch torch==2.13.0
fi
say "PyTorch $(torch_version)"
# fairseq pulls torchaudio, and torchaudio a newer PyTorch. The constraint keeps the installed one.
constraints=.venv/constraints.txt
printf 'torch==%s\n' "$(torch_version)" > "$constraints"
say "installing what builds fairseq"
pip install -q 'setuptools<81' wheel cython numpy
# An isolated build would fetch a second PyTorch. CUDA_HOME is unset: fairseq's CUDA sources fail under CUDA 13.
say "building fairseq and installing the rest (about 3 minutes the first time)"
env -u CUDA_HOME "$PWD/.venv/bin/python" -m pip --disable-pip-version-check install -q --no-build-isolation \
  -c "$constraints" -e '.[dev]'
# fairseq-hydra-train imports common.user_dir in a folder of hydra's. It looks for a relative one beside fairseq, too.
beside=$(.venv/bin/python -c 'from importlib.util import find_spec as f; print(f("fairseq").origin)')
beside=$(dirname "$(dirname "$beside")")
if [ -w "$beside" ] && [ ! -e "$beside/fairseq_rkm" ]; then ln -sfn "$PWD/fairseq_rkm" "$beside/fairseq_rkm"; fi
# Two commands run before the plugin can be loaded, and fail at what a user expects: their scripts run ours.
ours() {
  if [ -f ".venv/bin/fairseq-$1" ]; then
    sed -i "s/from fairseq_cli\.$2 import cli_main/from fairseq_rkm.$2 import main as cli_main/" ".venv/bin/fairseq-$1"
  fi
}
ours score score              # it takes no --user-dir, and two of its flags fail with today's sacrebleu
ours hydra-train hydra_train  # it looks for a relative common.user_dir in a folder of hydra's
printf '%s' "$wanted" > "$stamp"
say "done: .venv is ready"
