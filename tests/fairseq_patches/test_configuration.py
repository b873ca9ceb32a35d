"""Flags that do not go together, in the configuration that any of fairseq's commands has."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fairseq.data import bucket_pad_length_dataset
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
from omegaconf import OmegaConf
from test_flag_ranges import MINIMAL

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches import configuration
from fairseq_rkm.fairseq_patches.configuration import check_root
from fairseq_rkm.fairseq_patches.error_messages import sentence_of

fairseq_rkm.register()

REFUSED = [
    ({"model": {"_name": "rkm_lmm"}}, "unknown model 'rkm_lmm': did you mean rkm_lm"),
    ({"model": "rkm_lmm"}, "unknown model 'rkm_lmm': did you mean rkm_lm"),
    ({"task": {"_name": "zzzz"}}, "unknown task 'zzzz': there are stateful_language_modeling"),
    ({"criterion": {"_name": "cross_entropi"}}, "unknown criterion"),
    ({"optimizer": {"_name": "adamm"}}, "unknown optimizer 'adamm': did you mean adam"),
    ({"lr_scheduler": {"_name": "fixxed"}}, "unknown lr_scheduler"),
    ({"optimizer": {"_name": "adam", "adam_betas": "x"}}, "--adam-betas must be two numbers"),
    ({"optimizer": {"_name": "adam", "adam_betas": [0.9, 1.0]}}, "--adam-betas must be two numbers"),
    ({"common": {"fp16": True, "cpu": True}}, "--fp16 needs a CUDA GPU"),
    (
        {"common": {"memory_efficient_bf16": True}, "optimizer": {"_name": "nt_asgd"}},
        "--optimizer nt_asgd keeps float32 weights",
    ),
    (
        {"common": {"memory_efficient_fp16": True}, "optimizer": {"_name": "adamw_average"}},
        "--optimizer adamw_average keeps float32 weights",
    ),
    ({"task": {"_name": "translation", "num_batch_buckets": 2}}, "--num-batch-buckets needs --max-tokens"),
    ({"generation": {"min_len": 5, "max_len_a": 0, "max_len_b": 3}}, "--min-len 5 is more than the 3 tokens"),
    ({"generation": {"beam": 2, "nbest": 3}}, "--nbest 3 is more than --beam 2"),
    ({"generation": {"beam": 2, "nbest": 1, "sampling": True}}, "--sampling draws --beam 2 sentences"),
    *(
        ({"common_eval": {"model_overrides": text}}, "--model-overrides takes a dictionary")
        for text in ("x=1", "{1", "[1]", "", "__import__('os')")
    ),
]  # fmt: skip
TAKEN = [
    {"generation": {"min_len": 3, "max_len_a": 0, "max_len_b": 3, "beam": 2, "nbest": 2, "sampling": True}},
    {"common_eval": {"model_overrides": "{'dropout': 0.1}"}},
    {"common": {"memory_efficient_bf16": True}, "optimizer": {"_name": "adam", "adam_betas": "(0.9, 0.98)"}},
    {"common": {"fp16": True, "cpu": True, "fp16_no_flatten_grads": True}},
    {"model": {"_name": "rkm_lm_ptb"}, "task": {"_name": "stateful_language_modeling"}},
]


def root(changes: dict) -> OmegaConf:
    return OmegaConf.merge(OmegaConf.create(MINIMAL), changes)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes, message):
    with pytest.raises(RKMError) as refused:
        check_root(root(changes).common)
    assert message in str(refused.value)


@pytest.mark.parametrize("changes", TAKEN)
def test_taken(changes):
    check_root(root(changes).common)


def test_a_path_with_a_colon_that_is_one_file(tmp_path):
    path = tmp_path / "run 10:30.pt"
    path.touch()
    with pytest.raises(RKMError, match="fairseq reads a colon as the end"):
        check_root(root({"common_eval": {"path": str(path)}}).common)
    check_root(root({"common_eval": {"path": f"{tmp_path}/a.pt:{tmp_path}/b.pt"}}).common)


def test_lengths_that_exclude_each_other_for_a_source_are_told_in_a_sentence():
    error = AssertionError("min_len cannot be larger than max_len, please adjust these!")
    assert sentence_of(error).startswith("--min-len is more than")
    assert sentence_of(AssertionError("something else")) is None


def test_buckets_are_numpy_1s():
    sizes = np.array([1, 2, 3, 5, 8, 13, 21])
    assert bucket_pad_length_dataset.get_buckets(sizes, 2).tolist() == [5, 21]


@pytest.mark.parametrize("arch", ["rkm", "rkm_tiny", "lstm"])
def test_multilingual_translation_says_which_models_it_takes(arch):
    assert arch in ARCH_MODEL_REGISTRY
    with pytest.raises(RKMError, match=f"takes architectures with a model for each pair.*{arch} has one"):
        MultilingualTranslationTask.build_model(None, OmegaConf.create({"_name": arch}))


@pytest.fixture
def hydra_s(tmp_path, monkeypatch):
    """The folder of a command that hydra moved to another."""
    command, moved = tmp_path / "command", tmp_path / "moved"
    command.mkdir()
    moved.mkdir()
    monkeypatch.chdir(moved)
    now = SimpleNamespace(initialized=lambda: True, get=lambda: SimpleNamespace(runtime=SimpleNamespace(cwd=command)))
    monkeypatch.setattr(configuration, "HydraConfig", now)
    return command


def test_under_hydra_relative_data_is_looked_for_in_the_command_s_folder(hydra_s):
    (hydra_s / "data").mkdir()
    config = root({"task": {"_name": "stateful_language_modeling", "data": "data:none"}})
    check_root(config)
    assert config.task.data == f"{hydra_s / 'data'}:none"


def test_under_hydra_another_plugin_in_the_command_s_folder_is_told_of_once(hydra_s, caplog):
    (hydra_s / "other").mkdir()
    for given in ("other", str(Path(fairseq_rkm.__file__).parent), "none"):
        check_root(root({"common": {"user_dir": given}}))
    assert not caplog.messages
    (hydra_s / "other" / "__init__.py").touch()
    for _ in range(2):
        check_root(root({"common": {"user_dir": "other"}}))
    assert len(caplog.messages) == 1
    assert f"give common.user_dir={hydra_s / 'other'} for that folder" in caplog.messages[0]
