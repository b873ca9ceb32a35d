import pytest
import torch
from helpers import assert_close, randomized

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.modules import Stepper


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ngram", [1, 2, 4])
@pytest.mark.parametrize(("layer_norm", "bias"), [(False, True), (True, False)])
def test_steps_equal_the_layer(cell, ngram, layer_norm, bias):
    for feedback in (None, False):
        rkm = randomized(
            RKM(
                5, 7, cell=cell, ngram=ngram, feedback=feedback, layer_norm=layer_norm, bias=bias, learn_sigma=True,
                weight_dropout=0.5, dtype=torch.float64,
            )
        ).eval()  # fmt: skip
        x = torch.randn(6, 3, 5).double()
        whole, final = rkm(x)
        _, state = rkm(x[:2])
        stepper = Stepper(rkm)
        for t in range(2, 6):
            output, state = stepper(x[t : t + 1], state)
            assert_close(output[0], whole[t])
        assert_close(state.hidden, final.hidden)
        assert_close(state.cell, final.cell)
        assert (state.context is None) == (final.context is None)
        if ngram > 1:
            assert_close(state.context[0], final.context[0])


def test_a_clipped_memory_is_clipped_at_each_step():
    rkm = RKM(5, 7, memory_clip=0.05, dtype=torch.float64)
    x = torch.randn(2, 3, 5).double()
    whole, final = rkm(x)
    output, state = Stepper(rkm)(x[1:], rkm(x[:1])[1])
    assert_close(output[0], whole[1])
    assert_close(state.cell, final.cell)
    assert final.cell.abs().max() == 0.05


def test_a_missing_context_is_zero():
    rkm = RKM(5, 7, ngram=3, dtype=torch.float64)
    x, hidden, memory = torch.randn(1, 2, 5).double(), *torch.randn(2, 1, 2, 7).double()
    whole, _ = rkm(x, (hidden, memory, None))
    assert_close(Stepper(rkm)(x, rkm(x)[1]._replace(hidden=hidden, cell=memory, context=None))[0], whole)


def test_half_precision_keeps_its_memory_in_float32():
    rkm = RKM(5, 7, layer_norm=True, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 5).bfloat16()
    whole, final = rkm(x)
    output, state = Stepper(rkm)(x[1:], rkm(x[:1])[1])
    assert_close(output[0], whole[1])
    assert state.hidden.dtype == torch.bfloat16
    assert state.cell.dtype == final.cell.dtype == torch.float32


@pytest.mark.parametrize("flags", [{"num_layers": 2}, {"bidirectional": True}, {"ngram": 3, "ngram_padding": "same"}])
def test_what_has_no_single_steps_is_refused(flags):
    with pytest.raises(RKMError, match="single steps are for one layer"):
        Stepper(RKM(5, 7, **flags))
