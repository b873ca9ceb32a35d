# Shared by the train.sh of language models, documents and signals, which source it with their arguments:
# CONFIG DATA RUN [KEY=VALUE ...]. They are then in the root of the repository and have $config, $data, $run,
# ${changes[@]}, the example's folder in $here and, where the changes ask for a CPU, --cpu in $device.
fail() { printf 'train: %s\n' "$*" >&2; exit 1; }
[ $# -ge 3 ] || fail "give a configuration, the data's folder and the run's"
config=$1 data=$(realpath -m "$2") run=$(realpath -m "$3") changes=("${@:4}")
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
here=${here#"$PWD/"}
[ -f "$here/config/$config.yaml" ] || fail "no $here/config/$config.yaml"
if [ -x .venv/bin/fairseq-hydra-train ]; then PATH=$PWD/.venv/bin:$PATH; fi
export PYTHONWARNINGS=ignore
device=
for change in "${changes[@]}"; do [ "${change#+}" != common.cpu=true ] || device=--cpu; done

# Train, unless the run has been trained to its end.
train() {
  if grep -q 'done training' "$run/train.log" 2> /dev/null; then return; fi
  fairseq-hydra-train --config-dir "$here/config" --config-name "$config" common.user_dir="$PWD/fairseq_rkm" \
    task.data="$data" checkpoint.save_dir="$run" hydra.run.dir="$run/hydra" "${changes[@]}" 2>&1 |
    python scripts/progress.py "$run/train.log" || fail "training failed; the whole output is in $run/train.log"
  grep -q 'done training' "$run/train.log" || fail "training ended early; the whole output is in $run/train.log"
}
