"""Divide recordings into parts for training, validation and test. Windows are cut afterwards, within a part."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fairseq_rkm.data.signals.recordings import Recordings
from fairseq_rkm.errors import RKMError

SPLITS = ("archive", "random", "group")


class Parts(NamedTuple):
    """The recordings of each part, by number from 0."""

    train: list[int]
    valid: list[int]
    test: list[int]


def split_recordings(
    recordings: Recordings,
    kind: str,
    valid_fraction: float,
    test_fraction: float = 0.0,
    leave_out: Sequence[str] = (),
    seed: int = 1,
) -> Parts:
    """Divide recordings.

    Args:
        recordings: with classes.
        kind: ``"archive"`` leaves the test part empty, for one of its own. ``"random"`` draws a share of each class.
            ``"group"`` tests on the groups of ``leave_out``.
        valid_fraction: the share of recordings to validate on; with ``"group"`` whole groups are drawn.
        test_fraction: the share of recordings to test on, for ``"random"``.
        leave_out: names of groups, for ``"group"``.
        seed: of the draw.

    Raises:
        RKMError: there are too few recordings or groups, or a group has one class only or is unknown.
    """
    draw = random.Random(seed)
    every = list(range(len(recordings)))
    if kind == "group":
        return _by_group(recordings, valid_fraction, leave_out, draw)
    test = _stratified(recordings, every, test_fraction, draw, "test") if kind == "random" else []
    rest = sorted(set(every) - set(test))
    valid = _stratified(recordings, rest, valid_fraction, draw, "validate")
    return Parts(sorted(set(rest) - set(valid)), valid, test)


def _stratified(
    recordings: Recordings, rows: list[int], fraction: float, draw: random.Random, purpose: str
) -> list[int]:
    """A share of the rows of each class, at least one of each."""
    labels, held = recordings.known_labels(), []
    for label in sorted({labels[i] for i in rows}):
        of_class = [i for i in rows if labels[i] == label]
        count = max(1, round(fraction * len(of_class)))
        if count >= len(of_class):
            raise RKMError(
                f"{recordings.source}: the class {label!r} has {len(of_class)} recordings left, too few to {purpose} "
                "on some and train on others"
            )
        held += draw.sample(of_class, count)
    return sorted(held)


def _by_group(recordings: Recordings, fraction: float, leave_out: Sequence[str], draw: random.Random) -> Parts:
    groups = groups_of(recordings)
    known = ordered(set(groups))
    unknown = [name for name in leave_out if name not in known]
    if unknown or not leave_out:
        what = f"there is no group {unknown[0]!r}" if unknown else "--split group needs --leave-out"
        raise RKMError(f"{recordings.source}: {what}; the groups are {', '.join(known)}")
    rest = [name for name in known if name not in leave_out]
    count = max(1, round(fraction * len(rest)))
    if count >= len(rest):
        raise RKMError(
            f"{recordings.source}: {len(rest)} groups are left, too few to train on some and validate on {count}"
        )
    held = set(draw.sample(rest, count))
    of = {name: [i for i, group in enumerate(groups) if group == name] for name in known}

    def rows(names: Sequence[str]) -> list[int]:
        return sorted(i for name in names for i in of[name])

    return Parts(rows([name for name in rest if name not in held]), rows(ordered(held)), rows(leave_out))


def leave_one_group_out(recordings: Recordings) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield for each group its name, the numbers of all other recordings, and of its own."""
    groups = groups_of(recordings)
    names = ordered(set(groups))
    if len(names) < 2:
        raise RKMError(f"{recordings.source} has one group only, {names[0]!r}: nothing is left to train on")
    for name in names:
        rows = [i for i, group in enumerate(groups) if group == name]
        yield name, [i for i, group in enumerate(groups) if group != name], rows


def groups_of(recordings: Recordings) -> list[str]:
    """Each recording's group.

    Raises:
        RKMError: the recordings have none.
    """
    if recordings.groups is None:
        raise RKMError(f"{recordings.source} has no groups: give them as group, as a column, or by --groups FILE")
    return recordings.groups


def check_groups(recordings: Recordings) -> None:
    """Refuse groups that have one class only.

    Raises:
        RKMError: names them.
    """
    groups, labels = groups_of(recordings), recordings.known_labels()
    classes: dict[str, set[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        classes.setdefault(group, set()).add(label)
    single = [name for name in ordered(classes) if len(classes[name]) == 1]
    if single:
        shown = ", ".join(f"{name} ({next(iter(classes[name]))})" for name in single[:10])
        raise RKMError(
            f"{recordings.source}: {len(single)} of {len(classes)} groups have one class only: {shown}: their balanced "
            "accuracy means nothing, and leaving one out may leave a class unseen. Give --one-class-groups if that is "
            "meant"
        )


def ordered(names: Sequence[str] | set[str] | dict[str, set[str]]) -> list[str]:
    """Names in order: numbers by size, others by name after them.

    >>> ordered({"10", "9", "b"})
    ['9', '10', 'b']
    """
    return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
