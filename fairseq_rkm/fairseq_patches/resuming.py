"""A run goes on from its newest whole checkpoint, and a run that has ended is left as it is."""

import logging
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from fairseq_rkm.errors import RKMError, first_line
from fairseq_rkm.fairseq_patches.registry import patch

logger = logging.getLogger(__name__)

DEFAULT = "checkpoint_last.pt"
"""fairseq's default of ``--restore-file``."""

PATIENCE = "fairseq_rkm_patience"
"""The key in a checkpoint of the count of ``--patience``."""

DAMAGE = (
    OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, pickle.UnpicklingError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Errors of reading a file whose bytes have changed since it was written."""

_last: list[tuple[str, str]] = []
"""While fairseq resumes without a named file: the last checkpoint's path, and the suffix of its name."""


@patch(
    Trainer,
    "load_checkpoint",
    why="a run whose checkpoint_last.pt is damaged does not resume, though other checkpoints are whole",
    until="fairseq resumes from the newest whole checkpoint",
)
def know_the_last(load: Any) -> Any:
    """Make ``Trainer.load_checkpoint`` tell :func:`newest_whole` which file it may replace by another."""

    def load_checkpoint(trainer: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        cfg, suffix = trainer.cfg.checkpoint, trainer.checkpoint_suffix
        last = os.path.join(cfg.save_dir, f"checkpoint_last{suffix}.pt")
        if cfg.restore_file == DEFAULT and filename == last:
            _last.append((last, suffix))
        try:
            return load(trainer, filename, *args, **kwargs)
        finally:
            _last.clear()

    return load_checkpoint


@patch(
    checkpoint_utils,
    "load_checkpoint_to_cpu",
    why="a run whose checkpoint_last.pt is damaged does not resume, though other checkpoints are whole",
    until="fairseq resumes from the newest whole checkpoint",
)
def newest_whole(load: Any) -> Any:
    """Make ``load_checkpoint_to_cpu`` read the newest whole checkpoint if a resuming run's last one is damaged."""

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except RKMError as error:
            # A whole file was refused for its contents.
            if not _last or path != _last[0][0] or is_whole(path):
                raise
            for other in whole_checkpoints(*_last[0]):
                try:
                    state = load(other, *args, **kwargs)
                except RKMError as problem:
                    logger.warning(str(problem))
                    continue
                logger.warning(
                    f"{path} is damaged: going on from {other}, the newest whole checkpoint, of update {updates(state)}"
                )
                return state
            raise RKMError(
                f"{path} is damaged ({first_line(error)}), and no other checkpoint in its folder is whole: bring one "
                "back from elsewhere, or begin anew with another --save-dir"
            ) from error

    return load_checkpoint_to_cpu


def is_whole(path: str) -> bool:
    """Return whether a file is a zip archive and all of its entries agree with their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except DAMAGE:
        return False


def whole_checkpoints(last: str, suffix: str) -> list[str]:
    """Return the paths of the other whole checkpoints of a folder, the one of the latest update first.

    Args:
        last: the path of ``checkpoint_last.pt``.
        suffix: the suffix of its name, before ``.pt``; a shard's or empty.
    """
    folder = os.path.dirname(last)
    name = re.compile(rf"checkpoint(\d+|_\d+_\d+|_best|\.best_.*){re.escape(suffix)}\.pt")
    found = []
    for path in (os.path.join(folder, entry) for entry in sorted(os.listdir(folder)) if name.fullmatch(entry)):
        if not is_whole(path):
            continue
        try:
            found.append((updates(torch.load(path, map_location="cpu", mmap=True, weights_only=True)), path))
        except DAMAGE as error:
            logger.warning(f"passed over {path}: {first_line(error)}")
    return [path for _, path in sorted(found, key=lambda entry: -entry[0])]


def updates(state: dict) -> int:
    """Return the number of updates of the training that a checkpoint holds."""
    return int(state["optimizer_history"][-1]["num_updates"])


@patch(
    Trainer,
    "save_checkpoint",
    why="the count of --patience is not saved, and begins anew at each resume",
    until="fairseq's checkpoints hold it",
)
def save_patience(save: Any) -> Any:
    """Make ``Trainer.save_checkpoint`` add how often validation has not improved."""

    def save_checkpoint(trainer: Any, filename: str, extra_state: dict) -> Any:
        count = _patience_counter()
        if trainer.cfg.checkpoint.patience > 0 and hasattr(count, "best"):
            extra_state = {**extra_state, PATIENCE: {"best": float(count.best), "runs": count.num_runs}}
        return save(trainer, filename, extra_state)

    return save_checkpoint


def _patience_counter() -> Any:
    """Return the function of fairseq's training command that keeps the count in its attributes; None elsewhere."""
    commands = (sys.modules.get(name) for name in ("__main__", "fairseq_cli.train"))
    counters = (getattr(command, "should_stop_early", None) for command in commands)
    return next((counter for counter in counters if counter is not None), None)


@patch(
    checkpoint_utils,
    "load_checkpoint",
    why="a finished command that is repeated trains another update, and overwrites its checkpoints",
    until="fairseq looks at --max-update, --patience and --stop-time-hours before it trains",
)
def leave_finished_runs(load: Any) -> Any:
    """Make ``load_checkpoint`` let a run that has ended train nothing."""

    def load_checkpoint(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        extra_state, iterator = load(cfg, trainer, **kwargs)
        if extra_state is None:
            return extra_state, iterator
        # Without updates the optimizer was reset, as --finetune-from-model does: another run begins.
        runs = 0 if cfg.reset_meters or not trainer.get_num_updates() else _restore_patience(extra_state)
        reached = _reached(trainer, iterator.next_epoch_idx, runs)
        if reached:
            logger.info(f"all is done: {reached}. Nothing is trained and nothing written")
            # fairseq's loop over epochs reads this next, and runs none.
            trainer.cfg.optimization.max_epoch = -1
        return extra_state, iterator

    return load_checkpoint


def _restore_patience(extra_state: dict) -> int:
    """Give the training command its count back, and return it: how often validation had not improved."""
    saved, count = extra_state.get(PATIENCE), _patience_counter()
    if saved is None or count is None:
        return 0
    count.best, count.num_runs = saved["best"], saved["runs"]
    return int(count.num_runs)


def _reached(trainer: Any, next_epoch: int, runs: int) -> str | None:
    """Return the limit that ended the checkpoint's run, and the flag that gives more; None if nothing ended it."""
    limits, patience = trainer.cfg.optimization, trainer.cfg.checkpoint.patience
    done, hours, rate = trainer.get_num_updates(), trainer.cumulative_training_time() / 3600, trainer.get_lr()
    if limits.max_update and done >= limits.max_update:
        return f"the checkpoint is of update {done}, and --max-update is {limits.max_update}; raise it to go on"
    if limits.max_epoch and next_epoch > limits.max_epoch:
        return f"epoch {next_epoch - 1} has ended, and --max-epoch is {limits.max_epoch}; raise it to go on"
    if 0 < limits.stop_time_hours < hours:
        limit = f"{limits.stop_time_hours:g}"
        return f"it has trained {hours:.3g} hours, more than --stop-time-hours {limit}; raise it to go on"
    if 0 < patience <= runs:
        return f"validation has not improved {runs} times, and --patience is {patience}; raise it to go on"
    if isinstance(rate, float) and rate <= limits.stop_min_lr:
        return f"the learning rate, {rate:g}, is not above --stop-min-lr {limits.stop_min_lr:g}; lower that to go on"
    return None
