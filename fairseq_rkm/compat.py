"""The one place that adapts fairseq 0.12 to the torch and Python at hand.

1. torch >= 2.6 loads checkpoints with ``weights_only=True``. The classes that fairseq's own checkpoints hold beside
   tensors are named here, and no more: any other class is refused, and nothing of it runs.
2. A checkpoint that is truncated or refused, and every :class:`~fairseq_rkm.errors.RKMError`, ends fairseq's commands
   with one sentence in place of a stack trace.
3. numpy 2 has no ``np.compat``, from which fairseq's blocks of tokens take Python's integer.
4. A warning that every CPU run would print at each epoch is silenced.
5. fairseq seeds torch anew at each update, for which ``torch.manual_seed`` formats the caller's stack once for each
   kind of accelerator that is not in use, about a millisecond in all. Only what is in use is seeded instead.
6. The task ``sentence_prediction`` checks its data before training (see ``tasks/sentence_prediction_checks.py``).
"""

import argparse
import collections
import functools
import pickle
import re
import sys
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils, utils
from fairseq.distributed.utils import _TensorPlaceholder

from fairseq_rkm.errors import RKMError
from fairseq_rkm.tasks import sentence_prediction_checks

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
]
"""Classes that hold data and run no code when a checkpoint is read."""


def adapt() -> None:
    """Do all of the above; a second call changes nothing."""
    torch.serialization.add_safe_globals(CHECKPOINT_CLASSES)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]  # noqa: NPY201
    if utils.xm is None:
        utils.set_torch_seed.__init__ = _seed
    sentence_prediction_checks.adapt()
    if not hasattr(checkpoint_utils.load_checkpoint_to_cpu, "__wrapped__"):
        checkpoint_utils.load_checkpoint_to_cpu = _explain(checkpoint_utils.load_checkpoint_to_cpu)
    if _in_fairseq_command() and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_error


def _seed(self: utils.set_torch_seed, seed: int) -> None:
    """``set_torch_seed.__init__`` of fairseq: the same random numbers on CPU and GPU."""
    self.rng_state = utils.get_rng_state()
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def _explain(load: Any) -> Any:
    """``load_checkpoint_to_cpu`` of fairseq with errors that say what is wrong with the file."""

    @functools.wraps(load)
    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            if refused is None:
                raise RKMError(f"{path} is not a checkpoint, or is damaged: {_first_line(error)}") from error
            raise RKMError(
                f"refused {path}: it carries the class {refused[1]}, and a checkpoint of fairseq holds none such. "
                "Nothing of it was run. Get the checkpoint from its authors as plain tensors"
            ) from error
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, KeyError, OSError) as error:
            raise RKMError(
                f"cannot read {path}: it is truncated or not a checkpoint ({_first_line(error)}). Use an earlier one "
                "(checkpoint_best.pt, or a checkpoint of an earlier epoch)"
            ) from error

    return load_checkpoint_to_cpu


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _in_fairseq_command() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name.startswith("fairseq-") or (spec is not None and spec.name.startswith("fairseq_cli"))


def _print_error(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """``sys.excepthook``: one sentence for a user's mistake, the stack trace for anything else."""
    sentence = _sentence(error)
    if sentence is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"fairseq-rkm: error: {sentence}", file=sys.stderr)


def _sentence(error: BaseException | None) -> str | None:
    """The message of the user's mistake behind an error: fairseq wraps some, and so do its worker processes."""
    while error is not None:
        if isinstance(error, RKMError):
            return str(error)
        if isinstance(error, OSError):
            return str(error)
        in_worker = re.search(rf"{RKMError.__module__}.{RKMError.__name__}: (.*)", str(error))
        if in_worker:
            return in_worker[1]
        error = error.__cause__ or error.__context__
    return None
