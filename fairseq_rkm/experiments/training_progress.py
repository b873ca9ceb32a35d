"""Read fairseq's output (``--log-format json``), keep all of it in a file, and print one short line an interval.

    fairseq-train ... --log-format json | python scripts/progress.py run/train.log --updates 1200

If fairseq fails, the end of its output is printed.
"""

import argparse
import collections
import sys
from pathlib import Path

from fairseq_rkm.experiments.fairseq_log import parse_line


def describe(kind: str, entry: dict[str, str], updates: int) -> str | None:
    """One line about a training interval or a validation; None for all other entries."""
    if kind == "train_inner":
        done = int(entry["num_updates"])
        share = f"{100 * done / updates:3.0f}%" if updates else f"update {done:,}"
        speed = f"{float(entry['wps']):,.0f} tokens/s"
        return f"  {share}  epoch {entry['epoch']}  training {_figure(entry, '', 9)}  {speed}"
    if kind == "valid":
        return f"  valid {_figure(entry, 'valid_', 0)} after {int(entry['valid_num_updates']):,} updates"
    return None


def _figure(entry: dict[str, str], prefix: str, width: int) -> str:
    """The first of accuracy, perplexity and loss that the entry has, as text."""
    for name, title in (("accuracy", "accuracy"), ("ppl", "perplexity"), ("loss", "loss")):
        if prefix + name in entry:
            return f"{title} {entry[prefix + name]:>{width}}"
    return ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="where all of the output goes")
    parser.add_argument("--updates", type=int, default=0, help="updates in all, for a percentage")
    args = parser.parse_args()
    last: collections.deque[str] = collections.deque(maxlen=15)
    finished = False
    with args.log.open("a", encoding="utf-8") as log:
        for line in sys.stdin:
            log.write(line)
            last.append(line)
            finished = finished or "done training" in line
            kind, entry = parse_line(line)
            shown = describe(kind, entry, args.updates)
            if shown:
                print(shown, flush=True)
    if not finished:
        sys.stderr.writelines(last)


if __name__ == "__main__":
    main()
