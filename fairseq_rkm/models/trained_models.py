"""Load trained models for use from Python, with fairseq's hub interface."""

import os
from pathlib import Path
from typing import Any

from fairseq import hub_utils

import fairseq_rkm
from fairseq_rkm.checkpoints.loading import Wanted, only
from fairseq_rkm.errors import RKMError


def load(wanted: Wanted, folder: str, checkpoint_file: str, data: str, **kwargs: Any) -> dict[str, Any]:
    """Load models and their task as fairseq's ``hub_utils.from_pretrained`` does.

    Args:
        wanted: the classes of the models and their task; nothing else is built.
        folder: the folder of ``checkpoint_file``, or an archive of the folder, or the archive's URL.
        checkpoint_file: a checkpoint, or several separated by colons for an ensemble.
        data: the folder of the dictionaries; ``"."`` is the models' own.
        kwargs: fairseq's options that differ from training's.

    Returns:
        ``args``, ``task`` and ``models``.

    Raises:
        RKMError: the checkpoint is missing or damaged, carries code, or is of another kind of model.
    """
    fairseq_rkm.register()
    if "://" not in folder:
        _check_files(Path(folder), checkpoint_file.split(os.pathsep))
    with only(wanted):
        loaded: dict[str, Any] = hub_utils.from_pretrained(folder, checkpoint_file, data, **kwargs)
    return loaded


def _check_files(path: Path, checkpoints: list[str]) -> None:
    if not path.exists():
        raise RKMError(f"no model at {path}: give the folder of a trained model's checkpoint")
    missing = [file for file in checkpoints if path.is_dir() and not (path / file).is_file()]
    if missing:
        raise RKMError(f"no checkpoint {missing[0]} in {path}: name it by checkpoint_file")
