"""Lines that fairseq's commands print and nobody asked for."""

import logging
import os
import warnings

from fairseq_rkm.fairseq_patches.commands import in_fairseq_command
from fairseq_rkm.fairseq_patches.registry import setting


@setting(
    "logging.root",
    why="one of fairseq's models sets the root logger to DEBUG, so that commands print everybody's debugging lines",
    until="fairseq leaves the root logger to its commands, which set it to LOGLEVEL",
)
def level_of_fairseq_s_commands() -> None:
    """Set the root logger to ``LOGLEVEL`` (default: INFO) in fairseq's commands. Other programs keep their level."""
    if in_fairseq_command() and logging.root.level == logging.DEBUG:
        logging.root.setLevel(os.environ.get("LOGLEVEL", "INFO").upper())


HYDRA = (
    r"\s*The version_base parameter is not specified",
    r"hydra\.experimental\.\w+\(\) is no longer experimental",
    r"In '[^']*': Usage of deprecated keyword in package header",
    r"\s*'[^']*' is validated against ConfigStore schema",
    r"\s*Future Hydra versions will no longer change working directory",
    r"\s*The strict flag in the compose API is deprecated",
)
"""Beginnings of hydra's warnings about fairseq's use of it."""


@setting(
    "warnings",
    why="hydra and torch tell of fairseq's deprecated calls in twenty lines a command",
    until="fairseq makes these calls in today's way",
)
def no_deprecations_of_fairseq_s() -> None:
    """Ignore deprecation warnings of fairseq's calls, unless the user's filters (``-W``, ``PYTHONWARNINGS``) differ."""
    for message in HYDRA:
        _ignore(message=message)
    _ignore(category=FutureWarning, module=r"fairseq(_cli)?\.")


def _ignore(message: str = "", category: type[Warning] = Warning, module: str = "") -> None:
    warnings.filterwarnings("ignore", message, category, module, append=True)
