"""The recipe's configurations, and the command lines that docs/language_models.md gives for the same runs."""

import re
import shlex
from pathlib import Path

import pytest
from fairseq import options
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import fairseq_rkm

EXAMPLE = Path(__file__).parents[2] / "examples/language_model"
RUNS = sorted(path.stem for path in (EXAMPLE / "config").glob("*.yaml") if not path.stem.startswith("awd_"))


def configuration(name, *changes) -> dict:
    """A YAML file as fairseq-hydra-train reads it."""
    fairseq_rkm.register()
    GlobalHydra.instance().clear()
    hydra_init(name)
    with initialize_config_dir(str(EXAMPLE / "config"), version_base="1.1"):
        cfg = compose(name, overrides=["task.data=data", *changes])
    add_defaults(cfg)
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)


def command_lines() -> list[list[str]]:
    """The arguments of the manual's fairseq-train commands."""
    text = (EXAMPLE.parents[1] / "docs" / "language_models.md").read_text().replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in re.findall(r"^fairseq-train .*rkm_lm_ptb.*$", text, re.M)]


def command(arguments) -> dict:
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, arguments)
    return OmegaConf.to_container(convert_namespace_to_omegaconf(args), resolve=True)


@pytest.mark.parametrize(
    ("number", "name", "changes"),
    [(0, "ptb", ["model.cell=lstm"]), (1, "ptb_fast", ["model.cell=rkm_lstm"])],
)
def test_the_manual_s_command_line_is_the_configuration_s_run(number, name, changes):
    one, other = configuration(name, *changes), command(command_lines()[number])
    for part in ("model", "task", "criterion", "optimizer", "lr_scheduler"):
        given, wanted = ({k: v for k, v in c[part].items() if k not in {"data", "adam_betas"}} for c in (other, one))
        assert given == wanted, part
    for part, keys in (
        ("optimization", ("lr", "clip_norm", "max_update", "max_epoch")),
        ("dataset", ("batch_size", "batch_size_valid", "validate_interval")),
        ("checkpoint", ("save_interval", "no_epoch_checkpoints")),
    ):
        assert {key: other[part][key] for key in keys} == {key: one[part][key] for key in keys}, part


@pytest.mark.parametrize("name", RUNS)
def test_each_configuration_names_its_command_and_its_preset(name):
    assert f"--config-name {name} " in (EXAMPLE / f"config/{name}.yaml").read_text()
    cfg = configuration(name)
    assert cfg["model"]["_name"] == f"rkm_lm_{name}"
    assert cfg["task"]["variable_bptt"]
    assert cfg["criterion"]["_name"] == "cross_entropy_ar_tar"
    if name.endswith(("_fast", "_best")):
        assert cfg["lr_scheduler"]["warmup_updates"] == cfg["optimization"]["max_update"] / 10


def test_there_is_a_configuration_for_each_preset():
    fairseq_rkm.register()
    presets = {name.removeprefix("rkm_lm_") for name in ARCH_MODEL_REGISTRY if name.startswith("rkm_lm_")}
    assert presets == set(RUNS)
