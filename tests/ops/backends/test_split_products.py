"""``stepwise`` with a backward product for each gate against the reference: on a GPU or in Triton's interpreter."""

import itertools

import pytest
import torch
from helpers import assert_close

from fairseq_rkm import RKM
from fairseq_rkm.ops import CELLS
from fairseq_rkm.ops.backends.stepwise import joined_loop, step_loop
from fairseq_rkm.ops.backends.stepwise.step_loop import MOST_SPLIT_ROWS, Kind
from ops.backends.feedback_kernels import DTYPES, FEEDBACK, outcomes
from ops.backends.triton_interpreter import DEVICE, INTERPRETED, run_interpreted, runs
from ops.test_backends import compare


@pytest.fixture
def shapes(monkeypatch):
    """Have all products of more than one row be split; the shapes of the loops' sums."""
    seen, plain = set(), step_loop.StepLoop._multiply

    def multiply(self, weights):
        seen.add((self.kind.backward, *self.sums.shape))
        plain(self, weights)

    monkeypatch.setattr(step_loop.StepLoop, "_multiply", multiply)
    monkeypatch.setattr(step_loop, "MOST_SPLIT_ROWS", dict.fromkeys(MOST_SPLIT_ROWS, 128))
    monkeypatch.setattr(joined_loop, "MOST_ROWS", dict.fromkeys(joined_loop.MOST_ROWS, 0))
    step_loop.LOOPS.clear()
    yield seen
    step_loop.LOOPS.clear()


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("cell", "dtype"), itertools.product(FEEDBACK, [torch.float32] if INTERPRETED else DTYPES)
)  # fmt: skip
def test_all_variants(cell, dtype, shapes):
    for bidirectional, mask, size in ((False, "none", 5), (True, "mixed", 8)):
        compare(
            "stepwise", device=DEVICE, dtype=dtype, cell=cell, mask=mask, bidirectional=bidirectional, sizes=(3, size),
            steps=7, batch=3, tf32=not INTERPRETED,
        )  # fmt: skip
        # Each gate's units are padded: 5 and 8 to 8.
        gates = len(CELLS[cell].recurrent_gates)
        assert {shape[1] for shape in shapes if shape[0]} == {gates}
        assert {shape[3] for shape in shapes} == {8, 8 * gates}
    assert {shape[1] for shape in shapes if not shape[0]} == {1}


@runs
@pytest.mark.usefixtures("shapes", "poisoned")
@pytest.mark.parametrize("more", [{"layer_norm": True}, {"kernel": "gaussian"}, {"learn_sigma": True}])
def test_layer_normalisation_and_kernels(more):
    rkm = RKM(3, 13, backend="stepwise", device=DEVICE, **more)
    exact = RKM(3, 13, backend="reference", device=DEVICE, **more).double()
    exact.load_state_dict(rkm.state_dict())
    x = torch.randn(6, 4, 3, device=DEVICE)
    for given, wanted in zip(outcomes(rkm, x), outcomes(exact, x.double()), strict=True):
        assert_close(given, wanted, dtype=torch.float32 if INTERPRETED else "tf32")


def test_products_are_split_where_this_was_faster():
    def pieces(dtype, rows, tf32=False, backward=True):
        return Kind(CELLS["rkm_lstm"], backward, rows, 512, dtype, False, False, True, tf32).pieces

    assert [pieces(torch.bfloat16, rows) for rows in (1, 8, 128, 192)] == [1, 4, 4, 1]
    assert [pieces(torch.float32, rows) for rows in (1, 8, 16)] == [1, 4, 1]
    assert [pieces(torch.float32, rows, tf32=True) for rows in (1, 8, 16)] == [1, 1, 1]
    assert pieces(torch.bfloat16, 8, backward=False) == 1


def test_products_of_16_bits_are_whole_where_pytorch_would_round_their_pieces(monkeypatch):
    monkeypatch.setattr(step_loop.torch.ops.aten, "bmm", object())
    for dtype, wanted in ((torch.bfloat16, 1), (torch.float32, 4)):
        assert Kind(CELLS["rkm_lstm"], True, 8, 512, dtype, False, False, True, False).pieces == wanted


@pytest.mark.slow
def test_these_under_the_interpreter():
    run_interpreted("test_split_products.py")
