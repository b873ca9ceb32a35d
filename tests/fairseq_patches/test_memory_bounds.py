import argparse
import copy
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm import RKM, RKMError
from fairseq_rkm.fairseq_patches.memory_bounds import adopt
from fairseq_rkm.models.language_model import language_model_presets
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModel, RKMLanguageModelConfig

fairseq_rkm.register()
WORDS = Dictionary()
TASK = SimpleNamespace(source_dictionary=WORDS, target_dictionary=WORDS)
SIZES = {"decoder_embed_dim": 4, "decoder_hidden_size": 4, "decoder_layers": 1, "criterion_name": None}
ABSENT = object()


def build(**flags):
    return RKMLanguageModel.build_model(OmegaConf.structured(RKMLanguageModelConfig(**SIZES, **flags)), TASK)


def loaded(path, setting, name="rkm_lm", overrides=None, **flags):
    """The bound of a model built from a checkpoint whose configuration has this ``memory_clip``, and the setting."""
    config = RKMLanguageModelConfig if name == "rkm_lm" else language_model_presets.PTBConfig
    cfg = OmegaConf.to_container(OmegaConf.structured(config(**SIZES, **flags)), enum_to_str=True)
    cfg = {**cfg, "_name": name, "memory_clip": setting}
    if setting is ABSENT:
        del cfg["memory_clip"]
    history = [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 1}]
    extra = {"train_iterator": {"epoch": 1}}
    torch.save(
        {
            "args": None,
            "model": {"weight": torch.zeros(1)},
            "cfg": {"model": cfg},
            "optimizer_history": history,
            "extra_state": extra,
        },
        path,
    )
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path), overrides)
    model = models.build_model(copy.deepcopy(state["cfg"].model), TASK, from_checkpoint=True)
    return model.decoder.layers[0].memory_clip, state["extra_state"]["memory_clip"]


@pytest.mark.parametrize(
    ("setting", "clip", "written"),
    [(ABSENT, None, "none"), (None, None, "none"), (2.0, 2.0, "2.0"), ("auto", 1.0, "auto"), ("none", None, "none"),
     ("0.5", 0.5, "0.5")],
)  # fmt: skip
def test_a_checkpoint_keeps_its_bound(tmp_path, setting, clip, written):
    assert loaded(tmp_path / "checkpoint.pt", setting) == (clip, written)


@pytest.mark.parametrize(("setting", "clip"), [(ABSENT, 1.0), (None, 1.0), (2.0, 2.0), ("none", None)])
def test_a_preset_s_checkpoint_keeps_the_preset_s_bound(tmp_path, setting, clip):
    assert loaded(tmp_path / "checkpoint.pt", setting, "rkm_lm_ptb")[0] == clip


@pytest.mark.parametrize("setting", [ABSENT, None, 2.0, "auto", "none"])
def test_an_override_counts_whatever_the_checkpoint_has(tmp_path, setting):
    path = tmp_path / "checkpoint.pt"
    for given, clip in ((3, 3.0), ("auto", 1.0), ("none", None), (None, None)):
        assert loaded(path, setting, overrides={"memory_clip": given})[0] == clip
        assert loaded(path, setting, overrides={"model": {"memory_clip": given}})[0] == clip
    with pytest.raises(RKMError, match="memory_clip must be 'auto', 'none'"):
        loaded(path, setting, overrides={"memory_clip": -1})


def test_a_preset_s_bound_of_null_is_ambiguous_and_refused():
    cfg = OmegaConf.structured(language_model_presets.PTBConfig(**SIZES, memory_clip=None))
    with pytest.raises(RKMError, match=r"model\.memory_clip is null"):
        language_model_presets.PTBLanguageModel.build_model(cfg, TASK)


def clips(model):
    return {module.memory_clip for module in model.modules() if isinstance(module, RKM)}


@pytest.mark.parametrize(
    ("flags", "setting", "clip", "recorded"),
    [
        ({}, "none", None, "none"),
        ({}, "2.0", 2.0, "2.0"),
        ({}, "auto", 1.0, "auto"),
        ({"memory_clip": "3"}, "none", 3.0, "3"),
        ({"memory_clip": "none"}, "auto", None, "none"),
        ({"cell": "lstm"}, "none", None, "auto"),
        ({"layer_norm": True}, "none", None, "auto"),
    ],
)
def test_a_run_adopts_its_checkpoint_s_bound_unless_its_flags_name_one(flags, setting, clip, recorded):
    cfg = OmegaConf.create({"model": {"memory_clip": flags.get("memory_clip", "auto")}})
    average = build(**flags)
    trainer = SimpleNamespace(cfg=cfg, model=build(**flags), _ema=SimpleNamespace(get_model=lambda: average))
    adopt(trainer, setting, "checkpoint_last.pt")
    assert clips(trainer.model) == clips(average) == {clip}
    assert cfg.model.memory_clip == recorded


def test_the_flag_takes_words_and_numbers():
    parser = argparse.ArgumentParser()
    RKMLanguageModel.add_args(parser)
    for text, clip in (("auto", 1.0), ("none", None), ("2.5", 2.5)):
        given = parser.parse_args(["--memory-clip", text]).memory_clip
        assert clips(build(memory_clip=given)) == {clip}
