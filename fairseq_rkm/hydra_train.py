"""fairseq-hydra-train, with a relative ``common.user_dir`` as the shell that runs it sees it.

    python -m fairseq_rkm.hydra_train --config-dir DIR --config-name NAME common.user_dir=../x/fairseq_rkm

hydra changes to a new folder before fairseq imports ``common.user_dir``, and no code of the plugin has run by then.
Here the plugin is loaded first. The configuration is settled once hydra has composed it, so that a folder in YAML, an
interpolation and each job of a sweep are treated as a folder on the command line.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_rkm import RKMError, register

if TYPE_CHECKING:
    from omegaconf import DictConfig

LOG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "fairseq": {"format": "%(asctime)s | %(levelname)s | %(name)s | %(message)s", "datefmt": "%Y-%m-%d %H:%M:%S"}
    },
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "fairseq", "stream": "ext://sys.stdout"}},
    "root": {"level": os.environ.get("LOGLEVEL", "INFO").upper(), "handlers": ["console"]},
}
"""The log of ``common.reset_logging`` (``fairseq.utils.reset_logging``), as ``logging.config`` takes it."""


def main() -> None:
    """Run the command line."""
    register()  # fairseq takes a package that is imported already, as this one is, for registered
    import hydra
    from fairseq.dataclass.initialize import hydra_init
    from hydra._internal.utils import get_args

    sys.argv[1:] = absolute_config_path(sys.argv[1:])
    given = get_args()
    if given.config_name:
        find_config(given.config_name, given.config_dir, given.config_path)
    hydra_init(given.config_name or "config")
    # The same as fairseq's entry point, whose function hydra would call before any of this package.
    hydra.main(config_path="pkg://fairseq.config", config_name="config")(train)()


def train(cfg: "DictConfig") -> float:
    """Train by a configuration that hydra has composed, in the folder that hydra has chosen.

    Args:
        cfg: the configuration.

    Returns:
        The best value of the validation's metric, for hydra's sweepers.

    Raises:
        RKMError: ``common.user_dir`` is not there.
    """
    register()  # a launcher of hydra's may call this in a process of its own
    from fairseq import utils
    from fairseq_cli.hydra_train import _hydra_main

    settle_user_dir(cfg)
    utils.import_user_module(cfg.common)  # names of the configuration, looked up below, may be another plugin's
    keep_log_format(cfg)
    best: float = _hydra_main(cfg)
    return best


def keep_log_format(cfg: "DictConfig") -> None:
    """Have ``common.reset_logging`` hold in the processes that fairseq starts for further GPUs.

    fairseq resets the log of this process alone. The process that writes the log of several would have Python's own
    format, without times, and what reads logs would find nothing in it.

    Args:
        cfg: a configuration that hydra has composed; changed in place.
    """
    from omegaconf import open_dict

    if cfg.common.reset_logging:
        with open_dict(cfg):
            cfg.job_logging_cfg = LOG


def settle_user_dir(cfg: "DictConfig") -> None:
    """Make ``common.user_dir`` absolute where it is a folder as seen from where the command was given.

    fairseq finds others beside itself, or in hydra's folder.

    Args:
        cfg: a configuration that hydra has composed; changed in place.

    Raises:
        RKMError: there is no such folder, or it is another copy of this package.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    given = cfg.common.user_dir
    if not given:
        return
    start, here = Path(HydraConfig.get().runtime.cwd), Path(__file__).parent
    folder = next((found for found in places(given, start) if found.is_dir()), None)
    if folder is None:
        raise RKMError(
            f"common.user_dir={given}: there is no such folder in {start}, where the command was given, nor in hydra's "
            f"folder {Path.cwd()}, nor beside fairseq. For this plugin write common.user_dir={here}"
        )
    if folder.name == here.name and not folder.samefile(here):
        raise RKMError(
            f"common.user_dir={given} is another copy than {here}, which runs now: write common.user_dir={here}, or "
            f"run PYTHONPATH={folder.resolve().parent} python -m {here.name}.hydra_train for the other"
        )
    with open_dict(cfg):
        cfg.common.user_dir = os.path.abspath(folder)  # a link keeps its name, which is the module's


def places(given: str, start: Path) -> list[Path]:
    """List where a folder of a plugin may be, in the order in which it is looked for.

    Args:
        given: the folder's path; ``~`` stands for the home folder.
        start: the folder where the command was given.
    """
    import fairseq

    beside = Path(fairseq.__file__).parent
    return [folder / os.path.expanduser(given) for folder in (start, Path.cwd(), beside, beside.parent)]


def find_config(name: str, *folders: str | None) -> None:
    """Look for a configuration before hydra does, which takes a name without a file for fairseq's defaults.

    Args:
        name: of the configuration, as ``--config-name`` has it.
        folders: ``--config-dir`` and ``--config-path``; None where not given.

    Raises:
        RKMError: no folder has a file of this name.
    """
    given = [Path(folder) for folder in folders if folder]
    if name == "config" or any("://" in str(folder) for folder in folders):
        return  # fairseq's defaults, or a package
    if absent := [folder for folder in given if not folder.is_dir()]:
        raise RKMError(f"--config-dir or --config-path {absent[0]}: no such folder in {Path.cwd()}")
    file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    if any((folder / file).is_file() for folder in given):
        return
    where = " and ".join(map(str, given)) or "fairseq's own folder: give its folder by --config-dir"
    there = sorted({path.stem for folder in given for path in folder.glob("*.yaml")})
    raise RKMError(f"--config-name {name}: no {file} in {where}" + (f"; there are {', '.join(there)}" if there else ""))


def absolute_config_path(words: list[str]) -> list[str]:
    """Return a command line in which ``--config-path`` of a folder that is here is absolute.

    hydra looks for a relative one beside the program, and for ``--config-dir`` here.
    """
    flags = ("--config-path", "-cp")
    changed = list(words)
    for at, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in flags and equals and Path(value).is_dir():
            changed[at] = f"{flag}={os.path.abspath(value)}"
        elif at and words[at - 1] in flags and Path(word).is_dir():
            changed[at] = os.path.abspath(word)
    return changed


if __name__ == "__main__":
    main()
