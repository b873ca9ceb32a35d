"""Every flag, on the command line and in hydra, with values that mean nothing: refused in a sentence, or built."""

import contextlib
import copy
import dataclasses
import io
import math
from types import SimpleNamespace

import pytest
import torch
from fairseq import options, utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import MODEL_REGISTRY
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.data.signals import SignalPreparation
from fairseq_rkm.fairseq_patches.configuration import check_root
from fairseq_rkm.flag_ranges import CHECKED_BY_THEIR_READERS, FAIRSEQS, FILE, OURS, Range, flag_of
from fairseq_rkm.models.classification.rkm_classifier import RKMClassifier
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModel
from fairseq_rkm.models.signals.rkm_signal_classifier import RKMSignalClassifier
from fairseq_rkm.models.translation.rkm_model import RKMModel

fairseq_rkm.register()

REGISTRIES = {
    "model": MODEL_REGISTRY,
    "task": TASK_REGISTRY,
    "criterion": CRITERION_REGISTRY,
    "optimizer": OPTIMIZER_REGISTRY,
}
NUMBERS = {
    int: [-(10**30), -2, -1, 0, 1, 10**30],
    float: [-math.inf, -1e300, -1.0, 0.0, 0.5, 1.0, 2.0, 1e300, math.inf, math.nan],
}
EMPTY = ["", " "]
SMALL = {
    name: 4
    for side in ("encoder", "decoder")
    for name in (f"{side}_embed_dim", f"{side}_hidden_size")
} | {"classifier_hidden_size": 4, "encoder_layers": 1, "decoder_layers": 1}  # fmt: skip
COMMAND = {
    "rkm_lm": "--task language_modeling",
    "rkm": "--task translation",
    "rkm_classifier": "--task sentence_prediction --criterion sentence_prediction",
    "rkm_signal_classifier": "--task signal_classification --criterion sentence_prediction",
    "signal_classification": "--arch rkm_signal_classifier --criterion sentence_prediction",
    "stateful_language_modeling": "--arch rkm_lm",
    "cross_entropy_ar_tar": "--task language_modeling --arch rkm_lm",
    "adamw_average": "--task language_modeling --arch rkm_lm",
    "nt_asgd": "--task language_modeling --arch rkm_lm",
}
"""Beside which other flags those of a component are given."""
SWITCH = {"model": "--arch", "task": "--task", "criterion": "--criterion", "optimizer": "--optimizer"}


def values_for(field) -> list | None:
    """Values to try of a field of a dataclass; None for switches, choices and what is taken from elsewhere."""
    if field.name.startswith("_") or (isinstance(field.default, str) and field.default.startswith("${")):
        return None
    kinds = {field.type, *getattr(field.type, "__args__", ())}
    numbers = next((values for kind, values in NUMBERS.items() if kind in kinds), None)
    return numbers or (EMPTY if str in kinds else None)


def cases(components: dict) -> list[tuple]:
    """``(section, component, flag, value)``."""
    return [
        (section, name, field.name, value)
        for (section, name), fields in components.items()
        for field in fields
        for value in values_for(field) or []
    ]


COMPONENTS = {
    (section, name): dataclasses.fields(getattr(component, "__dataclass"))
    for section, registry in REGISTRIES.items()
    for name, component in registry.items()
    if component.__module__.startswith("fairseq_rkm.")
}
FLAGS = {(section, flag) for section, _, flag, _ in cases(COMPONENTS)}
PLAIN = {key: fields for key, fields in COMPONENTS.items() if not key[1].startswith("rkm_lm_")}
"""Without the presets, whose flags are rkm_lm's."""


def allowed(section: str, flag: str, value) -> bool:
    """Whether the table takes a value."""
    within = OURS[section][flag]
    return bool(value.strip()) if within == FILE else within.holds(value)


MINIMAL = {
    name: OmegaConf.to_container(OmegaConf.structured(FairseqConfig.__dataclass_fields__[name].default))
    for name in ("common", "dataset")
} | {"checkpoint": {}}
"""What any configuration has."""


def configuration(section: str, values: dict) -> OmegaConf:
    """As hydra gives it to fairseq: with nothing but what was given in the sections that fairseq does not know."""
    return OmegaConf.create({**MINIMAL, section: {**MINIMAL.get(section, {}), **values}})


def check(section: str, values: dict) -> str | None:
    """The sentence that refuses a configuration."""
    root = configuration(section, values)
    try:
        check_root(root.common)
    except RKMError as error:
        return str(error)
    return None


def test_every_flag_of_ours_has_a_range_or_a_reader_that_checks_it():
    assert {flag for section, flag in FLAGS if flag not in OURS[section]} <= set(CHECKED_BY_THEIR_READERS)
    assert {(section, flag) for section, table in OURS.items() for flag in table} <= FLAGS, "flags that are gone"
    assert len(FLAGS) > 40


@pytest.mark.parametrize("component", PLAIN, ids=":".join)
def test_hydra_refuses_what_the_table_does_not_hold_and_nothing_else(component):
    for section, name, flag, value in cases({component: PLAIN[component]}):
        if flag in CHECKED_BY_THEIR_READERS:
            continue
        sentence = check(section, {"_name": name, flag: value})
        if allowed(section, flag, value):
            assert sentence is None, sentence
        else:
            assert sentence is not None, f"{section}.{flag}={value!r} was taken"
            assert sentence.startswith(flag_of(flag))


@pytest.mark.parametrize("component", PLAIN, ids=":".join)
def test_the_command_line_refuses_the_same(component, monkeypatch):
    section, name = component
    for _, _, flag, value in cases({component: PLAIN[component]}):
        if flag in CHECKED_BY_THEIR_READERS or flag == "data":
            continue
        given = [SWITCH[section], name, *COMMAND[name].split(), f"{flag_of(flag)}={value}", "nowhere"]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                parsed = options.parse_args_and_arch(options.get_training_parser(), given)
        except SystemExit:  # argparse says what is wrong itself
            assert not allowed(section, flag, value)
            continue
        refused = check(section, {"_name": name, flag: getattr(parsed, flag)})
        assert (refused is None) == allowed(section, flag, value), f"{flag_of(flag)} {value!r}: {refused}"


@pytest.mark.parametrize(
    ("section", "flag", "within"),
    [(section, flag, within) for section, table in FAIRSEQS.items() for flag, within in table.items()],
)
def test_fairseqs_own_flags(section, flag, within):
    values = EMPTY if isinstance(within, str) else NUMBERS[float] + NUMBERS[int]
    for value in values:
        wanted = bool(value.strip()) if isinstance(within, str) else within.holds(value)
        problem = check(section, {flag: value})
        if not wanted:
            assert problem is not None, f"{section}.{flag}={value!r} was taken"
            assert problem.startswith(flag_of(flag))


def dictionary() -> Dictionary:
    words = Dictionary()
    for word in "abcdefgh":
        words.add_symbol(word)
    return words


WORDS = dictionary()
SIGNALS = SignalPreparation(["a", "b"], None, [0.0, 0.0], [1.0, 1.0])
TASK = SimpleNamespace(source_dictionary=WORDS, target_dictionary=WORDS, output_dictionary=WORDS, preparation=SIGNALS)
BUILDERS = {
    "rkm_lm": RKMLanguageModel, "rkm": RKMModel, "rkm_classifier": RKMClassifier,
    "rkm_signal_classifier": RKMSignalClassifier,
}  # fmt: skip


@pytest.mark.parametrize("arch", BUILDERS)
def test_what_the_table_takes_can_be_built_and_run_or_is_refused_in_a_sentence(arch):
    config = dataclasses.fields(MODEL_REGISTRY[arch].__dict__["__dataclass"])
    names = {field.name for field in config}
    base = OmegaConf.structured(MODEL_REGISTRY[arch].__dict__["__dataclass"])
    OmegaConf.set_struct(base, False)
    plain = {"criterion_name": None, "max_positions": 100}
    plain = {name: value for name, value in {**plain, **SMALL}.items() if name in names}
    tokens = torch.tensor([[4, 5, 6], [7, 8, 2]])
    run = {
        "rkm_lm": lambda model: model(tokens)[0],
        "rkm": lambda model: model(tokens, torch.tensor([3, 3]), tokens)[0],
        "rkm_classifier": lambda model: model(tokens)[0],
        "rkm_signal_classifier": lambda model: model(torch.randn(2, 5, 2))[0],
    }[arch]
    built = 0
    for _, _, flag, value in cases({("model", arch): config}):
        within = OURS["model"].get(flag)
        if within == FILE or (isinstance(within, Range) and not within.holds(value)):
            continue
        cfg = copy.deepcopy(base)
        try:
            for name, own in {**plain, flag: value}.items():
                cfg[name] = own
            output = run(BUILDERS[arch].build_model(cfg, TASK))
        except RKMError:
            continue
        output.float().sum().backward()
        built += 1
    assert built > 10


@pytest.mark.parametrize("value", [10**6, 999_999])
def test_weights_beyond_the_machines_memory_are_refused_before_memory_is_taken(value):
    cfg = OmegaConf.structured(MODEL_REGISTRY["rkm_lm"].__dict__["__dataclass"])
    cfg.criterion_name, cfg.decoder_hidden_size = None, value
    with pytest.raises(RKMError, match=r"units with .* would take .* GiB, and this machine has"):
        RKMLanguageModel.build_model(cfg, TASK)


def test_a_whole_command_line_goes_through_the_check():
    flags = "DATA --task stateful_language_modeling --arch rkm_lm --batch-size 2 --optimizer adamw_average --cpu"
    parsed = options.parse_args_and_arch(options.get_training_parser(), [*flags.split(), "--weight-decay", "nan"])
    cfg = convert_namespace_to_omegaconf(parsed)
    with pytest.raises(RKMError, match="--weight-decay must be a finite number, not nan"):
        utils.import_user_module(cfg.common)
