"""Rows of a table as changes of a configuration, and the list of what they gave."""

import pytest
from fairseq.dataclass.initialize import add_defaults, hydra_init
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.experiments.language_model_parts import PARTS, changes_of, name_of, ranking, shortened
from fairseq_rkm.experiments.language_model_table import Row, configuration

CONFIGS = sorted(p.stem for p in configuration("ptb").parent.glob("*.yaml") if not p.stem.startswith("awd_"))


def composed(config, changes):
    """As fairseq-hydra-train makes it."""
    fairseq_rkm.register()
    GlobalHydra.instance().clear()
    hydra_init(config)
    with initialize_config_dir(str(configuration(config).parent), version_base="1.1"):
        cfg = compose(config, overrides=["task.data=data", *changes])
    add_defaults(cfg)
    return cfg


def test_a_row_changes_what_its_parts_name(tmp_path):
    row = Row(
        "ptb_fast", tmp_path, "lstm", 2, "shuffle+past_decode=0.01+skip+state_dropout=0.3+model.dropout=0.5", 0.33
    )
    assert row.name == "ptb_fast-lstm-shuffle+past_decode_0.01+skip+state_dropout_0.3+model.dropout_0.5-0.33-2"
    cfg = composed("ptb_fast", row.changes)
    assert (cfg.task.partial_shuffle, cfg.task.overlap, cfg.task.variable_bptt) == (True, 1, True)
    assert cfg.criterion.past_decode == 0.01
    assert (cfg.model.skip_connections, cfg.model.dropout, cfg.model.cell) == (True, 0.5, "lstm")
    assert cfg.model.dropout_state == 0.3
    assert (cfg.optimization.max_update, cfg.lr_scheduler.warmup_updates) == (9900, 990)
    assert cfg.common.seed == 2
    assert Row("ptb_fast", tmp_path, "lstm", 1).name == "ptb_fast-lstm-1"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_part_goes_with_every_configuration_and_its_length(config):
    whole, cfg = (
        composed(config, []),
        composed(config, [*shortened(configuration(config), 0.5), *changes_of("+".join(PARTS))]),
    )
    assert (cfg.task.overlap, cfg.task.partial_shuffle, cfg.task.variable_bptt) == (7, True, False)
    assert cfg.dataset.batch_size % 7, "the streams share no factor with the passes"
    for key in ("max_update", "max_epoch"):
        assert cfg.optimization[key] == whole.optimization[key] / 2
    assert shortened(configuration(config), 1) == []


@pytest.mark.parametrize("row", ["shufle", "shuffle+", "", "past_decode=", "none=1", "dropout=0.5", "model.dropout"])
def test_an_unknown_part_is_refused(row):
    with pytest.raises(RKMError, match=r"unknown part .*: there are none, .* skip, state_dropout"):
        changes_of(row)


def test_rows_are_listed_by_the_mean_over_seeds():
    assert changes_of("none") == []
    assert name_of("none") == ""
    assert ranking([("a", 60.0), ("b", 59.0), ("a", 57.0)]).splitlines() == [
        "     58.50  a  (mean of 2 seeds)", "     59.00  b",
    ]  # fmt: skip
