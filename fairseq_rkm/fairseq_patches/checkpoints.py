"""Checkpoints and archives of models are read as data, by :mod:`fairseq_rkm.checkpoints`."""

import argparse
import collections
import contextlib
import importlib
import types
import typing
from pathlib import Path
from typing import Any

import fairseq
import hydra
import omegaconf
import torch
from fairseq import checkpoint_utils, file_utils, models, tasks
from fairseq.distributed import utils as distributed_utils
from fairseq.models import BaseFairseqModel
from torch import nn

from fairseq_rkm.checkpoints import building, classes, contents, literals, reading, unpacking, weight_checks
from fairseq_rkm.checkpoints.loading import LOADING, Loading, Wanted
from fairseq_rkm.errors import RKMError, first_line
from fairseq_rkm.fairseq_patches.registry import patch, setting

BROADCAST_CLASSES: list[Any] = [
    argparse.Namespace,
    omegaconf.DictConfig,
    omegaconf.ListConfig,
    omegaconf.base.ContainerMetadata,
    omegaconf.base.Metadata,
    omegaconf.nodes.AnyNode,
    typing.Any,
    dict,
    list,
    int,
    set,
    collections.defaultdict,
    distributed_utils._TensorPlaceholder,
]
"""Classes that rank 0 broadcasts from a checkpoint after checking it: its configuration, and stand-ins for tensors."""

EVALUATING = (
    "criterions.ctc",
    "data.audio.raw_audio_dataset",
    "data.codedataset",
    "models.fconv",
    "models.fconv_lm",
    "models.fconv_self_att",
    "models.hubert.hubert",
    "models.lightconv_lm",
    "models.speech_to_text.s2t_wav_transformer",
    "models.transformer_lm",
    "models.wav2vec.wav2vec",
    "models.wav2vec.wav2vec2",
    "optim.adafactor",
    "optim.adam",
    "optim.adamax",
    "optim.cpu_adam",
    "optim.fused_lamb",
    "utils",
)
"""Modules of fairseq that call ``eval`` on flags, on a checkpoint's configuration or on lines of data."""


class _Torch(types.ModuleType):
    """PyTorch with another ``load``."""

    def __init__(self, load: Any) -> None:
        super().__init__("torch")
        self.load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@setting(
    "fairseq.checkpoint_utils.torch.load",
    why="a checkpoint may be damaged or forged, and fairseq looks at nothing of it before it is used",
    until="never",
)
def read_as_data() -> None:
    """Read checkpoints by :func:`fairseq_rkm.checkpoints.reading.load`."""
    checkpoint_utils.torch = _Torch(reading.load)


@setting(
    "fairseq.distributed.utils.torch.load",
    why="processes that resume receive from the first a configuration of omegaconf's, which torch refuses",
    until="fairseq broadcasts plain containers",
)
def receive_configurations() -> None:
    """Allow a broadcast's classes while the broadcast is read."""

    def load(*args: Any, **kwargs: Any) -> Any:
        with torch.serialization.safe_globals([*BROADCAST_CLASSES, *classes.allowed()]):
            received = torch.load(*args, weights_only=True, **kwargs)
        contents.count_values(received, contents.MOST_VALUES)
        return received

    distributed_utils.torch = _Torch(load)


@setting(
    "torch.serialization",
    why="torch 2.6 and later read checkpoints with weights_only=True, and fairseq's hold flags beside tensors",
    until="fairseq's checkpoints hold plain containers alone",
)
def allow_flags() -> None:
    """Allow ``argparse.Namespace`` in files that parts of fairseq read with torch's own ``load``."""
    torch.serialization.add_safe_globals([argparse.Namespace])


@setting(
    "eval in fairseq's modules",
    why="fairseq evaluates strings of configurations, and a checkpoint brings its configuration",
    until="fairseq uses ast.literal_eval",
)
def evaluate_literals_only() -> None:
    """Let ``eval`` mean :func:`fairseq_rkm.checkpoints.literals.evaluate` in the modules of :data:`EVALUATING`."""
    for name in EVALUATING:
        with contextlib.suppress(ImportError):  # the module may need a package that is missing
            vars(importlib.import_module(f"{fairseq.__name__}.{name}"))["eval"] = literals.evaluate


@patch(
    checkpoint_utils,
    "load_checkpoint_to_cpu",
    why="a checkpoint whose names are damaged ends in a stack trace",
    until="fairseq says what is wrong with the file",
)
def explain(load: Any) -> Any:
    """Make ``load_checkpoint_to_cpu`` say what is wrong with a file that it cannot read."""

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        loading = LOADING.get()
        try:
            state = load(path, *args, **kwargs)
            if loading is not None:
                loading.weights = state["model"]
                if loading.wanted is not None:
                    _check_wanted(str(path), state["cfg"], loading.wanted)
        except (RKMError, FileNotFoundError):
            raise
        except UNUSABLE as error:
            raise RKMError(f"cannot read {path}: {_unusable(error)}") from error
        return state

    return load_checkpoint_to_cpu


UNUSABLE = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    hydra.errors.HydraException,
    omegaconf.errors.OmegaConfBaseException,
)
"""Errors of fairseq's code on a state or a configuration that fairseq did not write."""


def _unusable(error: BaseException) -> str:
    return (
        f"it is damaged, or was not written by this version of fairseq ({type(error).__name__}: {first_line(error)}). "
        "Use an earlier one (checkpoint_best.pt, or a checkpoint of an earlier epoch)"
    )


def _check_wanted(path: str, cfg: Any, wanted: Wanted) -> None:
    """Refuse another kind of model or task. fairseq's ``setup_task`` and ``build_model`` find kinds the same way."""
    model, task = getattr(cfg, "model", None), getattr(cfg, "task", None)
    name = getattr(model, "_name", None) or getattr(model, "arch", None)
    kind = models.ARCH_MODEL_REGISTRY.get(str(name)) or models.MODEL_REGISTRY.get(str(name))
    if kind is None or not issubclass(kind, wanted.model):
        raise RKMError(f"{path} is of a model {str(name)!r}, which does not {wanted.use}")
    name = getattr(task, "task", None)
    name = name if isinstance(name, str) else getattr(task, "_name", None)
    kind = tasks.TASK_REGISTRY.get(str(name))
    if kind is None or not issubclass(kind, wanted.tasks):
        raise RKMError(f"{path} is of a task {str(name)!r}, which does not {wanted.use}")


@patch(
    checkpoint_utils,
    "load_model_ensemble_and_task",
    why="a checkpoint's configuration may be damaged, or ask for more memory than there is",
    until="never",
)
def load_bounded(load: Any) -> Any:
    """Make ``load_model_ensemble_and_task`` tell :func:`build_bounded` the weights."""

    def load_model_ensemble_and_task(filenames: Any, *args: Any, **kwargs: Any) -> Any:
        outer = LOADING.get()
        loading = Loading(outer.wanted if outer else None)
        given = kwargs.get("state")
        if given is not None:
            loading.weights = given["model"]
        token = LOADING.set(loading)
        names = ", ".join(map(str, filenames))
        try:
            return load(filenames, *args, **kwargs)
        except RKMError as error:
            if any(str(name) in str(error) for name in filenames):
                raise
            raise RKMError(f"{names}: {error}") from error
        except (OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # A bare Exception is how fairseq tells users of a mistake.
            if not isinstance(error, UNUSABLE) and type(error) is not Exception:
                raise
            raise RKMError(f"cannot use {names}: {_unusable(error)}") from error
        finally:
            LOADING.reset(token)

    return load_model_ensemble_and_task


@patch(
    models,
    "build_model",
    why="a checkpoint's configuration may ask for more memory than there is",
    until="never",
)
def build_bounded(build: Any) -> Any:
    """Make ``build_model`` take memory in proportion to the checkpoint's weights, if there is a checkpoint."""

    def build_model(*args: Any, **kwargs: Any) -> Any:
        loading = LOADING.get()
        with building.Bounded(loading.weights) if loading else contextlib.nullcontext():
            return build(*args, **kwargs)

    return build_model


@patch(
    BaseFairseqModel,
    "load_state_dict",
    why="weights that are NaN, or of another kind of number, load in silence",
    until="fairseq looks at the weights that it loads",
)
def check_weights(load: Any) -> Any:
    """Make ``load_state_dict`` check the weights' values, and list wrong names or sizes in one sentence."""

    def load_state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def check(_: nn.Module, state_dict: Any, *__: Any) -> None:
            weight_checks.check(model, state_dict)

        # A hook runs after fairseq has renamed and pruned the weights.
        hook = model.register_load_state_dict_pre_hook(check)
        try:
            return load(model, *args, **kwargs)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise RKMError(f"the checkpoint's weights are not this model's: {' '.join(lines[1:4] or lines)}") from error
        finally:
            hook.remove()

    return load_state_dict


@patch(
    file_utils,
    "load_archive_file",
    why="an archive's files may lie outside its folder, and fairseq deletes the user's archive",
    until="fairseq unpacks with tarfile's data filter into a folder of its own",
)
def unpack_aside(_: Any) -> Any:
    """Make ``load_archive_file`` unpack into fairseq's cache, and leave the archive as it is."""

    def load_archive_file(archive_file: Any) -> str:
        try:
            found = Path(file_utils.cached_path(archive_file, cache_dir=None))
        except OSError as error:
            raise RKMError(f"no model at {archive_file}: neither a folder, nor an archive, nor its URL") from error
        unpacked = Path(file_utils.PYTORCH_FAIRSEQ_CACHE, "unpacked")
        return str(found if found.is_dir() else unpacking.unpack(found, unpacked))

    return load_archive_file
