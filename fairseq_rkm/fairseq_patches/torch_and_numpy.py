"""fairseq 0.12 on current torch and numpy."""

import types
import warnings

import numpy as np
import torch
from fairseq import utils

from fairseq_rkm.fairseq_patches.registry import setting


@setting(
    "numpy.compat",
    why="fairseq's blocks of tokens take Python's integer from numpy.compat, which numpy 2 has not",
    until="fairseq runs on numpy 2",
)
def compat_of_numpy_1() -> None:
    """Give numpy 2 the one name of ``numpy.compat`` that fairseq reads."""
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]  # noqa: NPY201


@setting(
    "warnings",
    why="every run on a CPU would print at each epoch that memory cannot be pinned",
    until="fairseq pins memory only where there is a GPU",
)
def no_warning_of_pinned_memory() -> None:
    """Silence the warning that memory cannot be pinned."""
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")


@setting(
    "fairseq.utils.set_torch_seed",
    why="at each update torch.manual_seed files a stack trace for every absent kind of device, half a millisecond",
    until="torch files none, or fairseq seeds its own devices alone",
)
def seed_present_devices() -> None:
    """Seed only CPUs and CUDA devices, unless fairseq runs on TPUs."""
    if utils.xm is None:
        utils.set_torch_seed = SetTorchSeed


class SetTorchSeed(utils.set_torch_seed):
    """``fairseq.utils.set_torch_seed`` for CPUs and CUDA."""

    def __init__(self, seed: int) -> None:
        self.rng_state = utils.get_rng_state()
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
