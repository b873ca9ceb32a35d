"""The flags of the recurrence, and the module that they build."""

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_rkm import RKMError
from fairseq_rkm.models.classification.rkm_classifier import RKMClassifierConfig
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModelConfig
from fairseq_rkm.models.recurrence_options import build_rkm
from fairseq_rkm.models.translation.rkm_model import RKMConfig
from fairseq_rkm.models.word_layers import WORD_DEVIATION


@pytest.mark.parametrize("config", [RKMClassifierConfig, RKMLanguageModelConfig, RKMConfig])
def test_a_kernel_is_the_module_s(config):
    cfg = OmegaConf.structured(config())
    assert build_rkm(cfg, 3, 4, layer_norm=False).kernel == "linear"
    cfg.kernel, cfg.kernel_degree, cfg.kernel_offset, cfg.kernel_scale = "polynomial", 3, 0.5, 2.0
    rkm = build_rkm(cfg, 3, 4, layer_norm=False)
    assert (rkm.kernel, rkm.kernel_degree, rkm.kernel_offset, rkm.kernel_scale) == ("polynomial", 3, 0.5, 2.0)
    assert {"kernel_scale_log_l0", "kernel_offset_log_l0"} <= set(dict(rkm.named_parameters()))
    cfg.fixed_kernel = True
    assert not any("kernel" in name for name, _ in build_rkm(cfg, 3, 4, layer_norm=False).named_parameters())


def test_a_bounded_kernel_needs_no_bound_of_the_memory():
    cfg = OmegaConf.structured(RKMLanguageModelConfig())
    assert build_rkm(cfg, 3, 4, layer_norm=False).memory_clip == 1
    cfg.kernel = "gaussian"
    assert build_rkm(cfg, 3, 4, layer_norm=False).memory_clip is None


def test_a_gaussian_starts_at_the_length_of_what_it_sees():
    cfg = OmegaConf.structured(RKMLanguageModelConfig(kernel="gaussian"))

    def start(**arguments):
        return build_rkm(cfg, 300, 4, **arguments).kernel_scale_log_l0.exp().mean().item()

    assert start(feedback=False) == pytest.approx(300**0.5)
    assert start(deviation=WORD_DEVIATION) == pytest.approx(1.0)
    assert start(deviation=WORD_DEVIATION, ngram=4) == pytest.approx(2.0)
    words = torch.nn.Embedding(1000, 300)
    torch.nn.init.uniform_(words.weight, -0.1, 0.1)
    assert words.weight.norm(dim=1).mean().item() == pytest.approx(start(deviation=WORD_DEVIATION), rel=0.02)
    cfg.kernel_scale = 3.0
    assert start(deviation=WORD_DEVIATION) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"kernel": "polynomial", "kernel_degree": 0},
            "degree of the kernel 'polynomial' must be a whole number from 1",
        ),
        ({"kernel": "gaussian", "kernel_scale": 0.0}, "kernel_scale must be above 0"),
        ({"kernel": "gaussian", "kernel_offset": 1.0}, "has no offset: leave kernel_offset out"),
        ({"kernel_degree": 2}, "the kernel 'linear' has no degree: leave it out"),
    ],
)
def test_what_is_no_kernel_is_refused(flags, sentence):
    cfg = OmegaConf.structured(RKMLanguageModelConfig(**flags))
    with pytest.raises(RKMError, match=sentence):
        build_rkm(cfg, 3, 4, layer_norm=False)
