"""What ``blockwise`` alone is tested for, on a GPU but for its sizes; the rest: ``test_feedback_kernels.py``."""

import itertools

import pytest
import torch
from helpers import assert_close

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.experiments.sweep_measurement import products_in
from fairseq_rkm.modules import rkm as rkm_module
from fairseq_rkm.ops.backends.blockwise.blockwise import HELD, MOST_UNITS, ROWS, shared_bytes
from ops.backends.feedback_kernels import DTYPES, FEEDBACK


@pytest.mark.gpu
def test_a_sequence_that_cudnn_refuses():
    x = torch.randn(70_000, 2, 8, device="cuda")
    given, wanted = (RKM(8, 16, backend=name, device="cuda") for name in ("blockwise", "stepwise"))
    wanted.load_state_dict(given.state_dict())
    with products_in("float32"):
        results = [rkm(x)[0] for rkm in (given, wanted)]
        assert_close(*results)
        for result in results:
            result.square().mean().backward()
        assert_close(given.weight_hh_l0.grad, wanted.weight_hh_l0.grad, dtype="tf32")


@pytest.mark.gpu
def test_directions_on_two_streams_do_not_disturb_each_other(monkeypatch):
    """Much memory is taken and freed meanwhile, by both streams."""
    monkeypatch.setattr(rkm_module, "run_at_once", lambda *_: None)
    both = RKM(16, 64, num_layers=2, bidirectional=True, backend="blockwise", device="cuda")
    wanted = {}
    for turn in range(60):
        torch.manual_seed(turn % 6)
        x = torch.randn(30 + turn % 3, 16, 16, device="cuda", requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            if turn < 6:
                patch.setattr(RKM, "_leaves_room", lambda *_: False)
            output, state = both(x)
            loss = output.square().sum() + state.hidden.sum() + (state.cell * state.cell).sum()
            given = [output, *state[:2], *torch.autograd.grad(loss, [x, *both.parameters()])]
        del output, state, loss
        for tensor, expected in zip(given, wanted.setdefault(turn % 6, given), strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.gpu
def test_auto_takes_it_for_small_layers_and_for_strict_float32():
    from fairseq_rkm.ops import BACKENDS, Weights, dispatch

    def picked(size, batch, dtype):
        weights = Weights(*(torch.zeros(4 * size, size, device="cuda", dtype=dtype) for _ in range(2)))
        x = torch.zeros(1, batch, size, device="cuda", dtype=dtype)
        backend = dispatch.pick("auto", CELLS["rkm_lstm"], x, weights)
        return next(name for name, row in BACKENDS.items() if row is backend)

    for size, batch, dtype in itertools.product((16, 64), (1, 32, 512), DTYPES):
        assert picked(size, batch, dtype) == "blockwise"
    with products_in("float32"):
        assert picked(128, 16, torch.float32) == "blockwise"
        assert picked(256, 16, torch.float32) == "stepwise"
    assert picked(512, 16, torch.bfloat16) == "persistent"
    assert picked(1024, 512, torch.bfloat16) == "stepwise"


@pytest.mark.parametrize("cell", FEEDBACK)
def test_a_block_fits_a_multiprocessor_of_an_h100(cell):
    for size, direction in itertools.product((1, 4, 63, 64, 65, 100, MOST_UNITS), ("forward", "backward")):
        for rows in HELD:
            assert shared_bytes(direction, CELLS[cell], size, rows) <= 232_448
        if size <= 64:
            assert all(shared_bytes(direction, CELLS[cell], size, rows) < 48 << 10 for rows in ROWS)
