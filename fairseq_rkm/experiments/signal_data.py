"""Recordings to the folder that fairseq's task ``signal_classification`` reads.

    python examples/signals/prepare.py --train train.npz --test test.npz --window 2s --stride 1s --out runs/eeg/data

Files are .npz (x, y, group, channels, rate), .npy, .csv (a channel a column), .ts (read by aeon) or -epo.fif (read by
MNE); several of one kind count as one. docs/signals.md describes them. Recordings are divided first and cut into
windows then: no recording has windows in two parts. Means and scales of the channels are the training part's.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_rkm.data.signals import (
    SPLITS,
    WHITEN,
    Duration,
    Parts,
    Recordings,
    SignalPreparation,
    check_finite,
    check_groups,
    joined,
    read_signals,
    resampled,
    scales,
    split_recordings,
    whitened,
    window_starts,
    write_split,
)
from fairseq_rkm.data.signals.preparation_file import without_channels
from fairseq_rkm.data.signals.recordings import check_same
from fairseq_rkm.data.signals.splits import ordered
from fairseq_rkm.errors import RKMError


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    try:
        prepare(args)
    except (RKMError, OSError) as error:
        sys.exit(f"prepare: error: {error}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", type=Path, required=True, nargs="+", help="files of recordings")
    add("--test", type=Path, nargs="+", default=[], help="files of test recordings; none of them is trained on")
    add("--labels", type=Path, help="file of the training recordings' classes, one a line")
    add("--groups", type=Path, help="file of the training recordings' groups, one a line")
    add("--test-labels", type=Path, help="file of the test recordings' classes, one a line")
    add("--out", type=Path, required=True, metavar="DATA", help="folder to write; must not be there yet")
    add("--rate", type=float, help="samples a second, where the files do not tell")
    add("--resample", metavar="RATE", help="to this many samples a second: 125, or 125Hz")
    add(
        "--whiten",
        choices=WHITEN,
        help="filter channels until the mean spectrum of each group, or of each recording, is flat; needs no classes",
    )
    add("--window", help="length of a window: 2s, 500ms, or 250 for steps (default: whole recordings)")
    add("--stride", help="from one window to the next (default: --window)")
    add("--drop-channels", nargs="+", default=[], metavar="CHANNEL", help="names or numbers (from 1) to leave out")
    add("--split", choices=SPLITS,
        help="archive: train and validate on --train, test on --test; random: a share of each class; group: test on "
        "--leave-out (default: archive with --test, group with --leave-out, else random)")  # fmt: skip
    add("--leave-out", nargs="+", default=[], metavar="GROUP", help="groups to test on")
    add("--one-class-groups", action="store_true", help="take groups that have one class only")
    add("--valid-fraction", type=float, default=0.1, help="share of the recordings to validate on (default: 0.1)")
    add("--test-fraction", type=float, default=0.2, help="share to test on with --split random (default: 0.2)")
    add("--seed", type=int, default=1, help="of the random division (default: 1)")
    args = parser.parse_args(arguments)
    for name in ("valid_fraction", "test_fraction"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must lie within (0, 1), not be {getattr(args, name)}")
    args.split = args.split or ("archive" if args.test else "group" if args.leave_out else "random")
    if args.leave_out and args.split != "group":
        parser.error(f"--leave-out is for --split group, not for --split {args.split}")
    if args.test and args.split != "archive":
        parser.error(f"--test is for --split archive: --split {args.split} takes the test part from --train")
    for given, name in ((args.labels, "--labels"), (args.groups, "--groups")):
        if given and len(args.train) > 1:
            parser.error(f"{name} is for one file of --train")
    if args.test_labels and len(args.test) != 1:
        parser.error("--test-labels is for one file of --test")
    return args


def prepare(args: argparse.Namespace) -> None:
    """Read, divide and write all parts; ``--out`` appears only when it is whole.

    Raises:
        RKMError: a file cannot be used, or ``--out`` is there already.
    """
    if args.out.exists():
        raise RKMError(f"{args.out} is there already: delete it, or give another --out")
    train, dropped = read_all(args, args.train, args.labels, args.groups)
    parts = divided(args, train)
    if args.test:
        test, _ = read_all(args, args.test, args.test_labels, None)
        check_same(test, train.width, train.channels, train.rate, train.source)
        parts["test"] = test
    classes = classes_of(parts["train"])
    for name, part in parts.items():
        check_known(part, classes, name)
    rate = train.rate
    window = Duration.parse(args.window, "--window").steps(rate) if args.window else None
    if args.stride and not window:
        raise RKMError("--stride is from one window to the next: give --window, too")
    stride = Duration.parse(args.stride, "--stride").steps(rate) if args.stride else window or 1
    mean, deviation = scales(parts["train"])
    preparation = SignalPreparation(
        classes, train.channels, mean.tolist(), deviation.tolist(), rate, bool(args.resample), window, stride, dropped,
        args.whiten,
    )  # fmt: skip
    write(args.out, parts, preparation)


def read_all(
    args: argparse.Namespace, paths: list[Path], labels: Path | None, groups: Path | None
) -> tuple[Recordings, list[int] | None]:
    """All recordings of some files, complete and at one rate, without dropped channels; the numbers of the latter.

    Raises:
        RKMError: a file cannot be used, or it lacks classes.
    """
    recordings = joined([read_signals(path, labels, groups) for path in paths])
    recordings.known_labels()
    if args.rate is not None:
        if recordings.rate is not None and abs(recordings.rate - args.rate) > 1e-6 * args.rate:
            raise RKMError(f"{recordings.source} has {recordings.rate:g} samples a second, not --rate {args.rate:g}")
        if not args.rate > 0:
            raise RKMError(f"--rate must be above 0, not {args.rate:g}")
        recordings.rate = args.rate
    dropped = dropped_channels(args, recordings) if args.drop_channels else None
    if dropped:
        recordings = without_channels(recordings, dropped)
    check_finite(recordings)
    if args.resample:
        recordings = resampled(recordings, parse_rate(args.resample))
    return whitened(recordings, args.whiten) if args.whiten else recordings, dropped


def parse_rate(text: str) -> float:
    """Read ``"125"`` or ``"125Hz"``.

    Raises:
        RKMError: it is no positive number.
    """
    try:
        rate = float(text.lower().removesuffix("hz"))
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise RKMError(f"--resample takes samples a second, as 125 or 125Hz, not {text!r}")
    return rate


def dropped_channels(args: argparse.Namespace, recordings: Recordings) -> list[int]:
    """The numbers, from 0, of ``--drop-channels``.

    Raises:
        RKMError: there is no such channel.
    """
    names = recordings.channels or []
    numbers = {name: number for number, name in enumerate(names)}
    numbers |= {str(number + 1): number for number in range(recordings.width) if str(number + 1) not in numbers}
    unknown = [name for name in args.drop_channels if name not in numbers]
    if unknown:
        known = ", ".join(names) or f"1 to {recordings.width}"
        raise RKMError(f"{recordings.source} has no channel {unknown[0]!r}; its channels are {known}")
    return sorted({numbers[name] for name in args.drop_channels})


def divided(args: argparse.Namespace, train: Recordings) -> dict[str, Recordings]:
    """The recordings of each part, by its name."""
    if args.split == "group" and not args.one_class_groups:
        check_groups(train)
    rows: Parts = split_recordings(
        train, args.split, args.valid_fraction, args.test_fraction, args.leave_out, args.seed
    )
    if args.split != "group" and train.groups is not None:
        both = {train.groups[i] for i in rows.train} & {train.groups[i] for i in [*rows.valid, *rows.test]}
        if both:
            print(
                f"note: {len(both)} groups have recordings on both sides of the division: --split group keeps them "
                "apart", file=sys.stderr,
            )  # fmt: skip
    return {name: train.subset(numbers) for name, numbers in rows._asdict().items() if numbers}


def classes_of(train: Recordings) -> list[str]:
    """The classes in order.

    Raises:
        RKMError: there is one only.
    """
    classes = ordered(set(train.known_labels()))
    if len(classes) < 2:
        raise RKMError(f"{train.source}: all training recordings are of the class {classes[0]!r}: give two or more")
    return classes


def check_known(part: Recordings, classes: list[str], name: str) -> None:
    """Raise RKMError for a class that no training recording has."""
    labels = part.known_labels()
    unknown = next((i for i, label in enumerate(labels) if label not in classes), None)
    if unknown is not None:
        raise RKMError(
            f"{part.source}: recording {part.names[unknown]} in the {name} part is of the class {labels[unknown]!r}, "
            f"which no training recording has; the classes are {', '.join(classes)}: leave it out, or train on some"
        )


def write(out: Path, parts: dict[str, Recordings], preparation: SignalPreparation) -> None:
    """Write the parts' files and ``signals.json``, and print their sizes."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    window, stride = preparation.window, preparation.stride
    lines = []
    for name, part in parts.items():
        starts = window_starts(part, window, stride)
        numbers = [preparation.classes.index(label) for label in part.known_labels()]
        signals = [preparation.standardized(signal) for signal in part.signals]
        windows = write_split(partial, name, signals, numbers, starts, window)
        groups = "" if part.groups is None else f" of {len(set(part.groups))} groups"
        rest = 0 if window is None else sum(
            len(signal) - first[-1] - window for signal, first in zip(signals, starts, strict=True)
        )  # fmt: skip
        left = f"; {rest:,} steps at ends of recordings are too short for a window" if rest else ""
        lines.append(f"{name}: {len(part):,} recordings{groups}, {windows:,} windows{left}")
    preparation.save(partial)
    partial.rename(out)
    rate = "" if preparation.rate is None else f" at {preparation.rate:g} Hz"
    length = "whole recordings" if window is None else f"windows of {window:,} steps, one every {stride:,}"
    print("\n".join(lines))
    print(f"{preparation.width} channels{rate}; {length}")
    print(f"{len(preparation.classes)} classes: {', '.join(preparation.classes)}")


if __name__ == "__main__":
    main()
