"""The whole configuration is checked before anything is built: numbers, names, and flags that do not go together.

The command line and ``fairseq-hydra-train`` both pass through here. fairseq lets most mistakes pass: it trains with
them, or fails at an assertion later.
"""

import argparse
import ast
import difflib
import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from fairseq import tasks, utils
from fairseq.dataclass import utils as dataclass_utils
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import patch
from fairseq_rkm.flag_ranges import FAIRSEQS, OURS, check_section, flag_of
from fairseq_rkm.optim.adamw_average import parse_betas

logger = logging.getLogger(__name__)

WHY = (
    "numbers out of range, unknown names and flags that exclude each other end in assertions, some after training began"
)
UNTIL = "fairseq checks its configuration itself"


@patch(utils, "import_user_module", why=WHY, until=UNTIL)
def check_after_import(import_user_module: Callable) -> Callable:
    """Make ``import_user_module`` check a configuration: fairseq's commands call it first, with their flags.

    It does not import the plugin a second time. A user may name the folder by another path than Python imported it by
    (the set-up links the package beside fairseq), and fairseq would take that for another module of the same name.
    """

    def imported(args: Any) -> None:
        if not is_this_package(getattr(args, "user_dir", None)):
            import_user_module(args)
        check_root(args)

    # fairseq lists its imports in an attribute of the function, under the function's name in its module.
    imported.memo = getattr(import_user_module, "memo", set())  # type: ignore[attr-defined]
    return imported


def is_this_package(user_dir: str | None) -> bool:
    """Return whether ``--user-dir`` names the folder of this package, by whichever path."""
    return user_dir is not None and Path(user_dir).is_dir() and Path(user_dir).samefile(Path(__file__).parents[1])


@patch(dataclass_utils, "merge_with_parent", why=WHY, until=UNTIL)
def check_before_defaults(merge: Callable) -> Callable:
    """Make ``merge_with_parent`` check a configuration: fairseq-hydra-train calls it after the import of the plugin."""

    def merged(dc: Any, cfg: DictConfig, remove_missing: bool = False) -> Any:
        check_root(cfg)
        return merge(dc, cfg, remove_missing)

    return merged


@patch(tasks, "setup_task", why=WHY, until=UNTIL)
def check_before_task(setup_task: Callable) -> Callable:
    """Make ``setup_task`` check a configuration, in case fairseq reached it by another way."""

    def checked(cfg: Any, **kwargs: Any) -> Any:
        if not kwargs.get("from_checkpoint"):
            check_root(cfg)
        return setup_task(cfg, **kwargs)

    return checked


@patch(
    dataclass_utils,
    "_override_attr",
    why="a flag that must be a Python value and is none ends in a stack trace of Python's parser",
    until=UNTIL,
)
def tell_unreadable_values(override_attr: Callable) -> Callable:
    """Make ``_override_attr`` name the flag that cannot be read."""

    def overridden(sub_node: str, data_class: Any, args: argparse.Namespace) -> list[str]:
        try:
            overrides: list[str] = override_attr(sub_node, data_class, args)
        except (ValueError, SyntaxError, TypeError) as error:
            raise RKMError(_unreadable(sub_node, data_class, args, override_attr) or str(error)) from error
        return overrides

    return overridden


def _unreadable(sub_node: str, data_class: Any, args: argparse.Namespace, override_attr: Callable) -> str | None:
    """Return the sentence about the first flag of a section that fails by itself; None if no flag does."""
    for name in data_class.__dataclass_fields__:
        if not hasattr(args, name):
            continue
        try:
            override_attr(sub_node, data_class, argparse.Namespace(**{name: getattr(args, name)}))
        except (ValueError, SyntaxError, TypeError):
            return f"{flag_of(name)} cannot be read as a Python value: {getattr(args, name)!r}"
    return None


def check_root(node: Any) -> None:
    """Check the whole configuration that a section belongs to.

    Args:
        node: a section, or a whole configuration; anything else passes.

    Raises:
        RKMError: a fault, with a value to give in its place.
    """
    root = node._get_root() if isinstance(node, DictConfig) else None
    if not isinstance(root, DictConfig) or "common" not in root or "checkpoint" not in root:
        return
    check_names(root)
    for section in FAIRSEQS | OURS:
        check_section(section, _section(root, section), ours=_is_ours(root, section))
    check_optimizer(root)
    check_batches(root)
    check_lengths(root)
    check_overrides(root)
    check_paths(root)
    find_inputs(root)
    compare_user_dir(root)


def _section(root: DictConfig, name: str) -> Any:
    """Return a section's values. Values that are missing or taken from elsewhere are placeholder strings."""
    found = root.get(name)
    if OmegaConf.is_config(found):
        return OmegaConf.to_container(found, resolve=False)
    return {"_name": found} if isinstance(found, str) else found or {}


def _name(root: DictConfig, section: str) -> str | None:
    values = _section(root, section)
    name = values.get("_name") if isinstance(values, dict) else getattr(values, "_name", None)
    return name if isinstance(name, str) and not name.startswith("${") else None


def _registry(section: str) -> dict[str, Any]:
    if section == "task":
        return TASK_REGISTRY
    if section == "model":
        return {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}
    known: dict[str, Any] = REGISTRIES.get(section, {}).get("registry", {})
    return known


def _is_ours(root: DictConfig, section: str) -> bool:
    found = _registry(section).get(_name(root, section) or "")
    return found is not None and found.__module__.startswith("fairseq_rkm.")


NAMED = ("task", "model", "criterion", "optimizer", "lr_scheduler")


def check_names(root: DictConfig) -> None:
    """Raise RKMError for a model, task, criterion, optimizer or scheduler that is not registered."""
    for section in NAMED:
        name, known = _name(root, section), _registry(section)
        if name is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(_short(known)))}"
            raise RKMError(f"unknown {section} {name!r}: {hint}")


def _short(known: Iterable[str]) -> list[str]:
    """Return this package's names, or all names if it has none."""
    return [name for name in known if name.startswith(("rkm", "stateful"))] or list(known)


def check_optimizer(root: DictConfig) -> None:
    """Raise RKMError for unreadable betas, and for a precision that the optimizer or the machine does not support."""
    common, optimizer = root.common, _section(root, "optimizer")
    if isinstance(optimizer, dict) and optimizer.get("adam_betas") is not None:
        parse_betas(optimizer["adam_betas"])
    on_gpu = torch.cuda.is_available() and not common.cpu
    if common.fp16 and not on_gpu and not (common.fp16_no_flatten_grads or common.memory_efficient_fp16):
        raise RKMError("--fp16 needs a CUDA GPU (and no --cpu): use --bf16 here, or no such flag")
    if (common.memory_efficient_fp16 or common.memory_efficient_bf16) and _is_ours(root, "optimizer"):
        raise RKMError(
            f"--optimizer {_name(root, 'optimizer')} keeps float32 weights, since small steps and averages are lost in "
            "16 bits: use --fp16 or --bf16 in place of --memory-efficient-fp16 and --memory-efficient-bf16"
        )


def check_batches(root: DictConfig) -> None:
    """Raise RKMError for ``--num-batch-buckets`` without ``--max-tokens``, the size that batches are cut to."""
    task = _section(root, "task")
    buckets = task.get("num_batch_buckets") if isinstance(task, dict) else None
    if buckets and not root.dataset.max_tokens:
        raise RKMError("--num-batch-buckets needs --max-tokens, which says how many sentences of a length are a batch")


def check_lengths(root: DictConfig) -> None:
    """Raise RKMError for flags of generation that exclude each other."""
    generation = _section(root, "generation")
    least, share, most = (generation.get(name) for name in ("min_len", "max_len_a", "max_len_b"))
    if None not in (least, share, most) and share == 0 and least > most:
        raise RKMError(f"--min-len {least} is more than the {most} tokens of --max-len-b: raise the latter or lower it")
    if generation.get("beam") and (generation.get("nbest") or 1) > generation["beam"]:
        raise RKMError(f"--nbest {generation['nbest']} is more than --beam {generation['beam']}: a beam has no more")
    if generation.get("sampling") and generation.get("nbest") != generation.get("beam"):
        raise RKMError(
            f"--sampling draws --beam {generation.get('beam')} sentences and shows --nbest {generation.get('nbest')}: "
            "give both the same number"
        )


def check_overrides(root: DictConfig) -> None:
    """Raise RKMError unless ``--model-overrides`` is a dictionary in Python's notation."""
    given = _section(root, "common_eval").get("model_overrides")
    if given is None:
        return
    try:
        fits = isinstance(ast.literal_eval(given), dict)
    except (ValueError, SyntaxError):
        fits = False
    if not fits:
        raise RKMError(f"--model-overrides takes a dictionary such as \"{{'data': 'folder'}}\", not {given!r}")


def check_paths(root: DictConfig) -> None:
    """Raise RKMError for an existing path with a colon, which fairseq takes for a list of paths."""
    for flag, section, name in (("--path", "common_eval", "path"), ("data", "task", "data")):
        values = _section(root, section)
        path = values.get(name) if isinstance(values, dict) else None
        if isinstance(path, str) and ":" in path and "://" not in path and Path(path).exists():
            raise RKMError(f"{flag} {path}: fairseq reads a colon as the end of a path; rename it or link it")


INPUTS = {
    "task": ("data",),
    "model": ("encoder_embed_path", "decoder_embed_path"),
    "checkpoint": ("restore_file", "finetune_from_model"),
    "ema": ("ema_seed_model",),
    "common": ("quantization_config_path",),
    "bpe": (
        "sentencepiece_model", "sentencepiece_model_path", "bpe_codes", "bpe_vocab_file", "gpt2_encoder_json",
        "gpt2_vocab_bpe",
    ),
}  # fmt: skip
"""Flags that name files and folders for a run to read, by section."""

OUTPUTS = {"checkpoint": ("save_dir",), "common": ("tensorboard_logdir", "log_file")}
"""Flags that name files and folders for a run to write."""

IN_SAVE_DIR = CheckpointConfig.restore_file
"""The file to start from by default. fairseq looks for it in ``--save-dir``, wherever another of this name may be."""


def find_inputs(root: DictConfig) -> None:
    """Under hydra, look for relative inputs in the folder where the command was given, and for ``~`` at home.

    hydra starts each run in a new folder. The run writes its files there, as hydra's users expect. No shell has
    replaced a ``~`` that stands in YAML.
    """
    if not HydraConfig.initialized():
        return
    start = Path(HydraConfig.get().runtime.cwd)
    for section, names in INPUTS.items():
        _replace_paths(root, section, names, lambda path: _found(path, start))
    for section, names in OUTPUTS.items():
        _replace_paths(root, section, names, os.path.expanduser)


def _replace_paths(root: DictConfig, section: str, names: Iterable[str], replacement: Callable[[str], str]) -> None:
    """Replace the paths of a section, each of a list by itself. Addresses (``s3://...``) stay."""
    values = _section(root, section)
    for name in names:
        given = values.get(name) if isinstance(values, dict) else None
        if not isinstance(given, str):
            continue
        given = OmegaConf.select(root, f"{section}.{name}", throw_on_resolution_failure=False)
        if not isinstance(given, str) or given in ("", IN_SAVE_DIR) or "://" in given:
            continue
        text = ":".join(replacement(path) for path in (given.split(":") if name == "data" else [given]))
        if text != given:
            with open_dict(root):
                root[section][name] = text
            logger.info("%s.%s: %s", section, name, text)


def _found(path: str, start: Path) -> str:
    """Return a path as an absolute one if it exists only from where the command was given; else as it is."""
    path = os.path.expanduser(path)
    return str(start / path) if not Path(path).exists() and (start / path).exists() else path


def compare_user_dir(root: DictConfig) -> None:
    """Under hydra, warn of a plugin in the command's folder that ``common.user_dir`` names and fairseq passed over.

    fairseq looks for a relative folder in hydra's new folder and beside itself. There it may find another version.
    """
    given = root.common.get("user_dir")
    if HydraConfig.initialized() and isinstance(given, str):
        meant = Path(HydraConfig.get().runtime.cwd) / given
        if (meant / "__init__.py").is_file() and not is_this_package(str(meant)):
            _tell_of_another_plugin(given, meant)


@functools.cache
def _tell_of_another_plugin(given: str, meant: Path) -> None:
    """Warn, once a process: the configuration is checked several times."""
    used = Path(__file__).parents[1]
    logger.warning("common.user_dir=%s is %s here; give common.user_dir=%s for that folder", given, used, meant)
