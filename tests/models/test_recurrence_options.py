"""The flags of the recurrence, and the module that they build."""

import pytest
from omegaconf import OmegaConf

from fairseq_rkm import RKMError
from fairseq_rkm.models.classification.rkm_classifier import RKMClassifierConfig
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModelConfig
from fairseq_rkm.models.recurrence_options import build_rkm
from fairseq_rkm.models.translation.rkm_model import RKMConfig


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
