"""fairseq's exponential moving average of our models, which ``--store-ema`` keeps."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.dataclass.configs import EMAConfig
from fairseq.models.ema import EMA
from omegaconf import OmegaConf
from test_flag_ranges import BUILDERS, SMALL, TASK


@pytest.mark.parametrize("arch", BUILDERS)
@pytest.mark.parametrize("in_float32", [False, True])
def test_the_average_is_of_the_weights_and_leaves_the_fingerprint_alone(arch, in_float32):
    cfg = OmegaConf.structured(getattr(BUILDERS[arch], "__dataclass"))
    plain = {"criterion_name": None, "max_positions": 100, **SMALL}
    for name in plain.keys() & cfg.keys():
        cfg[name] = plain[name]
    model = BUILDERS[arch].build_model(cfg, TASK)
    ema = EMA(model, SimpleNamespace(**vars(EMAConfig(store_ema=True, ema_decay=0.75, ema_fp32=in_float32))))
    assert any(name.endswith("_version") for name in model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.step(model, 1)
    averaged = ema.get_model().state_dict()
    for name, tensor in before.items():
        if name.endswith("_version"):
            assert torch.equal(averaged[name], tensor)
        else:
            torch.testing.assert_close(averaged[name], 0.75 * tensor + 0.25 * (tensor + 1))
