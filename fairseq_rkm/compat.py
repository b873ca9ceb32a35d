"""The one place that adapts fairseq 0.12 to the torch and Python at hand.

1. torch >= 2.6 loads checkpoints with ``weights_only=True``. The classes that fairseq's own checkpoints hold beside
   tensors are named here, and no more: any other class is refused, and nothing of it runs.
2. A checkpoint that is truncated or refused, and every :class:`~fairseq_rkm.errors.RKMError`, ends fairseq's commands
   with one sentence in place of a stack trace; so do flags of a configuration that are unknown or do not go together,
   and training that has diverged. In ``fairseq-hydra-train`` hydra is told to leave errors alone for that.
3. numpy 2 has no ``np.compat``, from which fairseq's blocks of tokens take Python's integer.
4. A warning that every CPU run would print at each epoch is silenced.
5. fairseq seeds torch before each update, and ``torch.manual_seed`` then files a stack trace for every kind of device
   that is not there, half a millisecond an update. Only the CPU and CUDA are seeded.
6. Under ``--amp`` fairseq divides each gradient by the loss scale twice, the second time after clipping, since it
   shows PyTorch's scaler two objects for one optimizer: SGD would take steps 128 and more times too small.
7. What the translation commands need besides stands in :mod:`fairseq_rkm.compat_translation`.
8. A run that ends in the middle of an epoch leaves fairseq's thread that prepares batches at work, which Python then
   kills wherever it is: within PyTorch that aborts the process, with status 134 after "done training". It is stopped.
9. fairseq leaves its process groups to Python's end, at which a thread of gloo's that still lets go of a tensor would
   be killed within PyTorch likewise. Those groups are left before.
10. The task ``sentence_prediction`` checks its data before training (see ``tasks/sentence_prediction_checks.py``).
11. ``--bf16`` copies weights and gradients to and from float32 one by one (see ``optim/half_precision.py``).
12. On a GPU the trainer waits for it at each update; with our optimizers it no longer does (``optim/late_norm.py`` and
    ``optim/late_log.py``).
13. On a command line fairseq takes ``--bf16`` for a wish for a TPU, and ends where there is none.
14. Where there is a GPU, fairseq takes the norm of gradients there, also of those that ``--cpu`` leaves on the host,
    which it then cannot clip by it.
"""

import argparse
import atexit
import collections
import contextlib
import functools
import os
import pickle
import queue
import re
import sys
import threading
import time
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils, options, utils
from fairseq.data import iterators
from fairseq.distributed.utils import _TensorPlaceholder
from fairseq.optim import AMPOptimizer, FP16Optimizer
from fairseq.trainer import Trainer

from fairseq_rkm import compat_translation
from fairseq_rkm.errors import RKMError
from fairseq_rkm.optim import half_precision, late_log, late_norm
from fairseq_rkm.tasks import sentence_prediction_checks
from fairseq_rkm.wrapping import wrap

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


DOCUMENTS = "--task sentence_prediction --criterion sentence_prediction --arch rkm_classifier"
"""What classifies documents: each of the three reads flags of the others."""

DIVERGED = (
    "training has diverged: gradients are not finite. Lower --lr, warm it up, or give --clip-norm; cells whose output "
    "is not squashed (rkm_lstm, rkm_cifg, linear_kernel_gated) may need a bounded memory: --layer-norm or "
    "--memory-clip 1"
)

HALF_PRECISION = {
    "_sync_fp16_grads_to_fp32": half_precision.gradients_to_float,
    "_sync_fp32_params_to_fp16": half_precision.weights_to_half,
    "zero_grad": half_precision.no_gradients,
}
"""Methods of fairseq's ``FP16Optimizer``."""


def adapt() -> None:
    """Do all of the above; a second call changes nothing."""
    torch.serialization.add_safe_globals(CHECKPOINT_CLASSES)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]  # noqa: NPY201
    sentence_prediction_checks.adapt()
    wrap(checkpoint_utils, "load_checkpoint_to_cpu", _explain)
    wrap(utils, "clip_grad_norm_", _clip_where_gradients_are)
    if utils.xm is None:
        utils.set_torch_seed = _SetTorchSeed
        wrap(options, "parse_args_and_arch", _without_tpu)
    AMPOptimizer.step = _step_once_unscaled
    wrap(Trainer, "clip_grad_norm", late_norm.late)
    wrap(Trainer, "_reduce_and_log_stats", late_log.late)
    for name, copy in HALF_PRECISION.items():
        wrap(FP16Optimizer, name, functools.partial(half_precision.at_once, copy))
    for leave in (_stop_preparing_batches, _leave_process_groups):
        atexit.unregister(leave)
        atexit.register(leave)
    compat_translation.adapt()
    if _in_fairseq_command() and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_error
        # Without it hydra prints errors itself, with a stack trace, and ends.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")


class _SetTorchSeed(utils.set_torch_seed):
    """``fairseq.utils.set_torch_seed`` that seeds only the devices that fairseq runs on (TPUs apart)."""

    def __init__(self, seed: int) -> None:
        self.rng_state = utils.get_rng_state()
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)


def _without_tpu(parse: Any) -> Any:
    """``parse_args_and_arch`` of fairseq where ``torch_xla``, through which it reaches TPUs, is not installed."""

    def parse_args_and_arch(*args: Any, **kwargs: Any) -> Any:
        parsed = parse(*args, **kwargs)
        flags = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(flags, "bf16", False):
            flags.tpu = False
        return parsed

    return parse_args_and_arch


def _clip_where_gradients_are(clip: Any) -> Any:
    """``clip_grad_norm_`` of fairseq with the norm brought to the gradients' device."""

    def clip_grad_norm_(params: Any, max_norm: float, aggregate_norm_fn: Any = None) -> torch.Tensor:
        params = [params] if torch.is_tensor(params) else list(params)
        gradients = (p.grad for p in params if getattr(p, "grad", None) is not None)
        device = next((gradient.device for gradient in gradients), None)

        def beside_gradients(norm: torch.Tensor) -> torch.Tensor:
            return (norm if aggregate_norm_fn is None else aggregate_norm_fn(norm)).to(device)

        norm: torch.Tensor = clip(params, max_norm, beside_gradients)
        return norm

    return clip_grad_norm_


def _stop_preparing_batches() -> None:
    """Let each thread finish the batch that it is at: nobody will take it. One that takes 10 seconds is left alone."""
    for thread in threading.enumerate():
        if not isinstance(thread, iterators.BackgroundConsumer):
            continue
        thread._max_len = 0
        stop = time.monotonic() + 10
        while thread.is_alive() and time.monotonic() < stop:
            with contextlib.suppress(queue.Empty):  # room for what it waits to hand over
                thread._queue.get(timeout=0.02)


def _leave_process_groups() -> None:
    """Wait for gloo's threads; NCCL's groups are left alone, which would wait for processes that may have failed."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def _step_once_unscaled(optimizer: AMPOptimizer) -> None:
    """``AMPOptimizer.step``, by the optimizer whose gradients ``clip_grad_norm`` has unscaled."""
    optimizer.scaler.step(optimizer.optimizer)
    optimizer.scaler.update()


def _explain(load: Any) -> Any:
    """``load_checkpoint_to_cpu`` of fairseq with errors that say what is wrong with the file."""

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
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        if isinstance(link, RKMError):
            return str(link)
        if isinstance(link, omegaconf.errors.InterpolationKeyError):
            return f"{_first_line(link)}: --task, --criterion and --arch must go together, as {DOCUMENTS} do"
        if isinstance(link, (omegaconf.errors.ValidationError, omegaconf.errors.ConfigKeyError)):
            return f"configuration key {link.full_key}: {_first_line(link)}"
        if isinstance(link, FloatingPointError):
            return _advised(str(link))
        in_worker = re.search(rf"({RKMError.__module__}.{RKMError.__name__}|FloatingPointError): (.*)", str(link))
        if in_worker:
            return _advised(in_worker[2])
    # A bare Exception is how fairseq itself tells users of a mistake.
    told = (str(link) for link in chain if isinstance(link, OSError) or type(link) is Exception)
    return next(told, None)


def _advised(message: str) -> str:
    """A message, or in place of fairseq's of gradients that are not finite what to do about them."""
    return DIVERGED if message == "gradients are Nan/Inf" else message
