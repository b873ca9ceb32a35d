"""Checkpoints are read as data: no class that could run code, and a sentence for a damaged file."""

import argparse
import collections
import pickle
import re
import typing
from typing import Any

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils
from fairseq.distributed.utils import _TensorPlaceholder

from fairseq_rkm.errors import RKMError, first_line
from fairseq_rkm.fairseq_patches.registry import patch, setting

_reconstruct = np.ndarray(0).__reduce__()[0]

CHECKPOINT_CLASSES: list[Any] = [
    # The flags of models, criterions and optimizers that are not dataclass components.
    argparse.Namespace,
    # What rank 0 broadcasts when several processes resume: its configuration and stand-ins for tensors.
    omegaconf.DictConfig,
    omegaconf.ListConfig,
    omegaconf.base.ContainerMetadata,
    omegaconf.base.Metadata,
    omegaconf.nodes.AnyNode,
    typing.Any,
    dict,
    list,
    int,
    collections.defaultdict,
    _TensorPlaceholder,
    # The counts that translation's --eval-bleu sums, under the names that numpy 2 and numpy 1 write.
    np.ndarray,
    np.dtype,
    np.dtypes.Int64DType,
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
]
"""Classes that hold data and run no code when a checkpoint is read."""


@setting(
    "torch.serialization",
    why="torch 2.6 and later read checkpoints with weights_only=True, and fairseq's hold a few classes beside tensors",
    until="fairseq's checkpoints hold plain containers alone",
)
def allow_classes() -> None:
    """Allow the classes of :data:`CHECKPOINT_CLASSES`; any other is refused, and nothing of it runs."""
    torch.serialization.add_safe_globals(CHECKPOINT_CLASSES)


@patch(
    checkpoint_utils,
    "load_checkpoint_to_cpu",
    why="a damaged or refused checkpoint ends in a stack trace",
    until="fairseq says what is wrong with the file",
)
def explain(load: Any) -> Any:
    """``load_checkpoint_to_cpu`` with errors that say what is wrong with the file."""

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            if refused is None:
                raise RKMError(f"{path} is not a checkpoint, or is damaged: {first_line(error)}") from error
            raise RKMError(
                f"refused {path}: it carries the class {refused[1]}, and a checkpoint of fairseq holds none such. "
                "Nothing of it was run. Get the checkpoint from its authors as plain tensors"
            ) from error
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, KeyError, OSError) as error:
            raise RKMError(
                f"cannot read {path}: it is truncated or not a checkpoint ({first_line(error)}). Use an earlier one "
                "(checkpoint_best.pt, or a checkpoint of an earlier epoch)"
            ) from error

    return load_checkpoint_to_cpu
