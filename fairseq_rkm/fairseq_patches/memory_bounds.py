"""A checkpoint keeps the memory's bound that it was trained with, even after the default has changed."""

import logging
from typing import Any

from fairseq import checkpoint_utils
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.trainer import Trainer
from omegaconf import OmegaConf, open_dict

from fairseq_rkm.fairseq_patches.registry import patch
from fairseq_rkm.modules import RKM

logger = logging.getLogger(__name__)

SETTING = "memory_clip"


@patch(
    checkpoint_utils,
    "load_checkpoint_to_cpu",
    why="a checkpoint made before --memory-clip auto, whose memory had no bound, would be given today's default",
    until="no such checkpoint is left",
)
def written_out(load: Any) -> Any:
    """Make ``load_checkpoint_to_cpu`` write the memory's bound into the configuration and the extra state."""

    def load_checkpoint_to_cpu(path: str, arg_overrides: dict | None = None, *args: Any, **kwargs: Any) -> Any:
        state = load(path, arg_overrides, *args, **kwargs)
        write_out(state, arg_overrides or {})
        return state

    return load_checkpoint_to_cpu


def write_out(state: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Write the bound that a checkpoint's ``memory_clip`` stands for into its configuration.

    The bound goes into the extra state as well, for a trainer. An absent or null setting stands for the model's
    ``memory_clip_before``. An override counts even where the checkpoint lacks the setting: fairseq alone would ignore
    it there.

    Args:
        state: a loaded checkpoint, changed in place; one of another model stays as it is.
        overrides: the dictionary of ``--model-overrides``, or a hub's keywords.
    """
    cfg: Any = state.get("cfg")
    model: Any = cfg.get("model") if OmegaConf.is_dict(cfg) else None
    if not OmegaConf.is_dict(model):
        return
    before = getattr(ARCH_MODEL_REGISTRY.get(model.get("_name")), "memory_clip_before", None)
    if before is None:
        return
    given = overrides.get("model")
    given = {**overrides, **(given if isinstance(given, dict) else {})}
    setting = given[SETTING] if SETTING in given else model.get(SETTING)
    if setting is None:
        setting = "none" if SETTING in given else before
    with open_dict(model):
        model[SETTING] = str(setting)
    if isinstance(state.get("extra_state"), dict):
        state["extra_state"][SETTING] = str(setting)


@patch(
    Trainer,
    "load_checkpoint",
    why="a run that goes on from a checkpoint builds its model from its own flags, whose default bound may be another",
    until="fairseq compares a run's model with its checkpoint's",
)
def with_its_bound(load: Any) -> Any:
    """Make ``Trainer.load_checkpoint`` bound a memory of bound ``auto`` as the checkpoint's was bounded."""

    def load_checkpoint(trainer: Trainer, filename: str, *args: Any, **kwargs: Any) -> Any:
        extra = load(trainer, filename, *args, **kwargs)
        setting = extra.pop(SETTING, None) if extra else None
        if setting is not None:
            adopt(trainer, setting, filename)
        return extra

    return load_checkpoint


def adopt(trainer: Any, setting: str, filename: str) -> None:
    """Bound the memory of a trainer's model as a checkpoint's was bounded, unless the run's flags name a bound.

    The trainer's configuration changes with it, so that new checkpoints hold the bound.

    Args:
        trainer: fairseq's, with its model built.
        setting: ``"auto"``, ``"none"`` or a number as text.
        filename: the checkpoint's, for messages.
    """
    model = trainer.cfg.model
    mine = model.get(SETTING)
    models = [trainer.model, *(() if trainer._ema is None else (trainer._ema.get_model(),))]
    layers = [module for built in models for module in built.modules() if isinstance(module, RKM)]
    own = [layer.memory_clip for layer in layers]
    for layer in layers:
        layer.set_memory_clip(setting)
    if [layer.memory_clip for layer in layers] == own:
        return
    if mine == "auto":
        logger.warning(
            f"{filename} was trained with --memory-clip {setting}: so is this run. Give --memory-clip NUMBER or none "
            "to choose another bound of the memory"
        )
        with open_dict(model):
            model[SETTING] = setting
        return
    for layer, clip in zip(layers, own, strict=True):
        layer.set_memory_clip(clip)
    logger.warning(
        f"{filename} was trained with --memory-clip {setting}; this run goes on with {mine}, as its flags say"
    )
