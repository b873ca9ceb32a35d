import argparse
import logging
import sys
import warnings

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_rkm.fairseq_patches import console


def configuration() -> argparse.Namespace:
    parser = options.get_training_parser()
    return options.parse_args_and_arch(parser, ["data", "--arch", "transformer_lm", "--task", "language_modeling"])


def shown() -> list[str]:
    """What fairseq's reading of a command line and a deprecated call of its own make torch and hydra print."""
    convert_namespace_to_omegaconf(configuration())
    scope = {"__name__": "fairseq.tasks.fairseq_task"}
    exec("import warnings; warnings.warn('torch.cuda.amp.autocast is deprecated', FutureWarning)", scope)  # noqa: S102
    warnings.warn("a user's own", FutureWarning, stacklevel=1)
    return [str(warning.message) for warning in caught]


caught: list[warnings.WarningMessage] = []


@pytest.fixture(autouse=True)
def _recorded():
    with warnings.catch_warnings(record=True) as record:
        warnings.resetwarnings()
        caught[:] = []
        warnings.showwarning = lambda *arguments, **named: caught.append(warnings.WarningMessage(*arguments, **named))
        yield record


def test_fairseq_s_deprecations_are_kept_from_its_users():
    before = shown()
    assert len(before) > 4, "there is something to keep"
    caught.clear()
    console.no_deprecations_of_fairseq_s()
    assert shown() == ["a user's own"]


def test_a_user_who_asks_for_warnings_has_them():
    warnings.simplefilter("always")
    console.no_deprecations_of_fairseq_s()
    assert len(shown()) > 4


@pytest.mark.parametrize(
    ("program", "asked", "before", "level"),
    [
        ("/bin/fairseq-eval-lm", None, logging.DEBUG, logging.INFO),
        ("/bin/fairseq-eval-lm", "debug", logging.DEBUG, logging.DEBUG),
        ("/bin/fairseq-eval-lm", None, logging.ERROR, logging.ERROR),
        ("mine.py", None, logging.DEBUG, logging.DEBUG),
    ],
)
def test_commands_log_at_their_level(monkeypatch, program, asked, before, level):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(logging.root, "level", before)
    if asked is None:
        monkeypatch.delenv("LOGLEVEL", raising=False)
    else:
        monkeypatch.setenv("LOGLEVEL", asked)
    console.level_of_fairseq_s_commands()
    assert logging.root.level == level
