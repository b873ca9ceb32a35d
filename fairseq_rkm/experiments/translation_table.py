"""Train translation models, average their last checkpoints, translate the test sets and score them with sacrebleu.

    python examples/translation/table.py DATA --out OUT --models rkm_lstm
    python examples/translation/table.py DATA --out OUT --models all --seeds 1 2 3 --jobs 4 --time-limit 9
    python examples/translation/table.py DATA --out OUT --models all --speed      after the above

DATA is the folder written by prepare.py. Every model has the same data, vocabulary and time. Training ends after
--minutes, or when the validation loss has not improved for --patience epochs. Two candidates are compared on the
validation set by BLEU: the best checkpoint, and the average of the last --average ones. The better translates the test
sets. OUT/MODEL-SEED gets model.pt with all files for RKMModel.from_pretrained, the logs, the translations and
result.json.

The same command goes on where it was stopped. --jobs models are trained at once, over all GPUs. --speed then measures
one model at a time and writes tokens/s and sentences/s to OUT/MODEL-SEED/speed.json. A GPU translates the training
set's sentences, a CPU the first test set's.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from fairseq_rkm.experiments import task_pool
from fairseq_rkm.experiments.fairseq_log import entries
from fairseq_rkm.experiments.translation_models import MODELS


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    deadline = time.monotonic() + 60 * args.time_limit
    visible = task_pool.hide_gpus()
    from fairseq_rkm.experiments.translation_run import Run  # imports fairseq, which looks at GPUs

    task_pool.share_processors(args.jobs)
    models = list(MODELS) if "all" in args.models else args.models
    runs = [Run(args, model, seed) for seed in args.seeds for model in models]
    tasks = [task_pool.Task(run.folder.name, run.time if args.speed else run.measure, ()) for run in runs]
    result, devices = "speed.json" if args.speed else "result.json", task_pool.gpus(visible)
    task_pool.run_table(tasks, result, "models", args.out, args.jobs, devices, deadline, outcome, progress)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--models", nargs="+", default=["rkm_lstm"], choices=["all", *MODELS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="models trained at once")
    parser.add_argument("--minutes", type=float, default=10, help="of training at most, for each model (default 10)")
    parser.add_argument("--patience", type=int, default=10, help="epochs without improvement that end training (10)")
    parser.add_argument("--average", type=int, default=10, help="last checkpoints to average (10)")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), help="minutes for this call; a next one goes on"
    )
    parser.add_argument("--train-flags", default="", help="more flags for fairseq-train, of all models")
    parser.add_argument("--speed", action="store_true", help="measure speeds of trained models, one at a time")
    parser.add_argument("--speed-updates", type=int, default=300, help="updates timed with --speed (300)")
    args = parser.parse_args(arguments)
    if not (args.data / "data.json").is_file():
        parser.error(f"{args.data} is not what prepare.py leaves when it has finished: run it first")
    if args.speed:
        args.jobs = 1
    if min(args.jobs, args.average, args.patience) < 1:
        parser.error("--jobs, --average and --patience must be at least 1")
    if args.speed_updates < 20:
        parser.error("--speed-updates must be at least 20: tokens/s are logged that often")
    return args


def outcome(folder: Path) -> str:
    """The BLEU of a finished run, in words."""
    result = folder / "result.json"
    if not result.is_file():
        return "done"
    return ", ".join(f"{test} {bleu:.2f} BLEU" for test, bleu in json.loads(result.read_text())["bleu"].items())


def progress(folder: Path) -> str:
    """The state of a run in training, in words."""
    log = folder / "train.log"
    if not log.is_file():
        return ""
    with log.open("rb") as content:
        content.seek(max(0, log.stat().st_size - 20_000))
        tail = content.read().decode(errors="replace").splitlines()
    valid = entries(tail, "valid")
    return f"epoch {valid[-1]['epoch']} valid ppl {valid[-1]['valid_ppl']}" if valid else ""


if __name__ == "__main__":
    main()
