import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
from fairseq import utils
from fairseq.optim import AMPOptimizer
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm import RKMError, compat


def test_seeding_is_torch_s_without_its_stack_traces(monkeypatch):
    fairseq_rkm.register()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    before = torch.random.get_rng_state()
    monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("a stack trace"))
    with utils.set_torch_seed(5):
        assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_process_ends_well_while_batches_are_prepared():
    """Without the repair it is aborted (status 134): the thread is in PyTorch nearly all of the time."""
    code = """
import torch, fairseq, fairseq_rkm
from fairseq.data.iterators import BufferedIterator
class Endless:
    def __len__(self):
        return 10**9
    def __iter__(self):
        while True:
            yield torch.randn(300, 300) @ torch.randn(300, 300)
next(BufferedIterator(10**6, Endless()))
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_mixed_precision_unscales_gradients_once():
    """With SGD the update is lr times the clipped gradient, whatever the loss scale."""
    fairseq_rkm.register()
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    cfg = {
        "optimizer": {"_name": "nt_asgd", "lr": [0.5], "task_name": None},
        "common": {"fp16_init_scale": 128, "min_loss_scale": 1e-4},
    }  # fmt: skip
    optimizer = AMPOptimizer.build_optimizer(OmegaConf.create(cfg), [weight])
    optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128)
    for scaled in (1.0, torch.inf):
        before = weight.detach().clone()
        optimizer.zero_grad()
        optimizer.backward(scaled * (weight * torch.tensor([6.0, 8.0])).sum())
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        expected = before if scaled > 1 else before - 0.5 * torch.tensor([0.6, 0.8])
        torch.testing.assert_close(weight.detach(), expected)
    assert optimizer.optimizer.param_groups[0]["updates"] == 1, "an overflow is no update"


def test_what_training_that_watches_bleu_leaves_in_a_checkpoint_is_read(tmp_path):
    """``translation --eval-bleu`` sums counts of n-grams as numpy's arrays."""
    torch.save({"counts": np.array([3, 1, 0, 0])}, tmp_path / "checkpoint.pt")
    with torch.serialization.safe_globals(compat.CHECKPOINT_CLASSES):
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["counts"].tolist() == [3, 1, 0, 0]


@pytest.mark.parametrize("name", ["gloo", "fake"])
def test_gloo_s_groups_are_left_before_python_ends(tmp_path, name):
    code = f"""
import atexit
import torch.distributed as distributed
from torch.testing._internal.distributed import fake_pg
atexit.register(lambda: print("in a group:", distributed.is_initialized()))  # runs after what is registered later
import fairseq_rkm
fairseq_rkm.register()
store = distributed.FileStore({str(tmp_path / "store")!r}, 1)
distributed.init_process_group({name!r}, store=store, rank=0, world_size=1)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"in a group: {name != 'gloo'}"


@pytest.mark.parametrize("aggregate", [None, lambda norm: 2 * norm])
@pytest.mark.parametrize("sizes", [[3], [2, 4]])
def test_gradients_on_the_host_are_clipped_beside_a_gpu(aggregate, sizes):
    """Which only a machine with a GPU can fail: there fairseq's own norm is on the GPU."""
    fairseq_rkm.register()
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    norm = utils.clip_grad_norm_(iter(weights), 1.0, aggregate)
    wanted = 2 * sum(sizes) ** 0.5 * (1 if aggregate is None else 2)
    assert norm.device == weights[0].grad.device
    assert norm.item() == pytest.approx(wanted)
    for weight in weights:
        torch.testing.assert_close(weight.grad, torch.full_like(weight, 2 / wanted))
    assert utils.clip_grad_norm_([torch.nn.Parameter(torch.zeros(1))], 1.0) == 0


def test_what_fairseq_has_wrapped_itself_is_wrapped_once():
    fairseq_rkm.register()
    assert utils.clip_grad_norm_.__wrapped__.__module__ == "fairseq.utils"
    assert utils.clip_grad_norm_.__code__.co_filename == compat.__file__
    before = utils.clip_grad_norm_
    fairseq_rkm.register()
    assert utils.clip_grad_norm_ is before


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RKMError("ngram must be at least 1"), "ngram must be at least 1"),
        (RuntimeError("-- Process 1 ended:\nfairseq_rkm.errors.RKMError: no data\n"), "no data"),
        (FloatingPointError("Minimum loss scale reached"), "Minimum loss scale reached"),
        (FloatingPointError("gradients are Nan/Inf"), compat.DIVERGED),
        (RuntimeError("-- Process 1 ended:\nFloatingPointError: gradients are Nan/Inf\n"), compat.DIVERGED),
        (Exception("Cannot load model parameters"), "Cannot load model parameters"),
        (RuntimeError("a defect"), None),
        (KeyError("a defect"), None),
    ],
)
def test_what_is_told_in_a_sentence(error, sentence):
    assert compat._sentence(error) == sentence
    later = TypeError("while that was handled")
    later.__context__ = error
    assert compat._sentence(later) == sentence
