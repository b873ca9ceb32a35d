from dataclasses import fields

import pytest

from fairseq_rkm import RKMError
from fairseq_rkm.flags import describe


def test_an_architecture_s_flags_are_all_described():
    from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModelConfig

    text = describe("rkm_lm")
    names = {f.name for f in fields(RKMLanguageModelConfig) if not f.name.startswith("_")} - {"criterion_name"}
    assert not {name for name in names if f"--{name.replace('_', '-')} " not in text.replace("\n", " ")}


def test_a_preset_s_defaults_are_the_preset_s():
    flag, default = "--decoder-layers DECODER_LAYERS", "(default: {})"
    for name, layers in (("rkm_lm", 2), ("rkm_lm_ptb", 3)):
        text = " ".join(describe(name).split())
        assert text.index(default.format(layers), text.index(flag)) - text.index(flag) < 80


@pytest.mark.parametrize(
    ("name", "heading", "flag"),
    [
        ("stateful_language_modeling", "flags of --task stateful_language_modeling:", "--tokens-per-sample"),
        ("nt_asgd", "flags of --optimizer nt_asgd:", "--non-monotone-window"),
        ("cross_entropy_ar_tar", "flags of --criterion cross_entropy_ar_tar:", "--alpha"),
        ("inverse_sqrt", "flags of --lr-scheduler inverse_sqrt:", "--warmup-updates"),
        ("lstm", "flags of --arch lstm:", "--encoder-bidirectional"),
        ("translation", "flags of --task translation:", "--source-lang"),
    ],
)
def test_all_kinds_of_components_have_flags(name, heading, flag):
    text = describe(name)
    assert text.startswith(heading)
    assert flag in text


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(RKMError, match=r"no component 'rkm-lm'; those of fairseq_rkm: adamw_average, .*rkm_lm,"):
        describe("rkm-lm")
