"""``torch.ao.quantization``: modules beside an RKM are quantized; the RKM stays as it is, and says so if asked."""

import warnings

import pytest
import torch
from torch import nn

from fairseq_rkm import RKM

quantization = pytest.importorskip("torch.ao.quantization", reason="PyTorch has removed it")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = RKM(3, 8, num_layers=2, bidirectional=True, ngram=2), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("asked", [(nn.Linear,), (nn.Linear, nn.LSTM), (nn.Linear, RKM)], ids=str)
def test_dynamic_quantization_takes_the_linear_layers_beside_it(asked):
    network, x = Network().eval(), torch.randn(6, 5, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = quantization.quantize_dynamic(network, set(asked))
    assert any("an RKM has no quantized form" in str(w.message) for w in caught) == (RKM in asked)
    assert isinstance(quantized.out, torch.ao.nn.quantized.dynamic.Linear)
    assert torch.equal(quantized.rnn(x)[0], network.rnn(x)[0])
    assert (quantized(x) - network(x)).norm() < 0.02 * network(x).norm()
