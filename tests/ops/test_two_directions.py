"""Both directions of a layer at once against one after the other: on a CPU with a stand-in for the kernels."""

import gc
import itertools
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import stand_ins
import torch
from helpers import (
    assert_close,
    forward_and_gradients,
    join_scales,
    product_type,
    random_mask,
    random_reset,
    randomized,
)
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.graphs.graphed_function import GraphedFunction
from fairseq_rkm.modules import rkm as rkm_module
from fairseq_rkm.ops import dispatch, two_directions
from fairseq_rkm.ops.kernel_functions import resolve_kernel
from ops.test_backends import check_missing_numbers_stay_where_they_are, compare, problem
from ops.test_higher_derivatives import compare_derivatives, derivatives

FEEDBACK = [name for name, cell in CELLS.items() if cell.has_feedback]


@contextmanager
def watched():
    """The numbers of layers of the stacks within that run both directions at once."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        run = two_directions._Forward
        patch.setattr(
            two_directions, "_Forward", lambda passes, stack: ran.append(len(stack.layers)) or run(passes, stack)
        )
        yield ran


@contextmanager
def at_once():
    """Within, all layers run both directions at once that can; gives :func:`watched`'s list."""
    with pytest.MonkeyPatch.context() as patch, watched() as ran:
        stand_ins.run_at_once(patch)
        yield ran


@contextmanager
def in_turn():
    """Within, no layer runs both directions at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rkm_module, "run_at_once", lambda *_: None)
        yield


def stack(cell="rkm_lstm", sizes=(3, 5), dtype=torch.float64, backend="batched", **arguments):
    arguments = {"num_layers": 2, **arguments}
    return randomized(RKM(*sizes, cell=cell, dtype=dtype, backend=backend, bidirectional=True, **arguments))


def both_ways(run):
    """What ``run`` gives, one direction after the other and both at once, from the same random numbers."""
    torch.manual_seed(3)
    with in_turn():
        results = [run()]
    with at_once() as ran:
        torch.manual_seed(3)
        results.append(run())
    assert ran, "it ran in turn"
    return results


def compare_ways(rkm, steps=7, batch=4, mask="none", state=True):
    x, hidden, memory, context = problem(rkm, steps, batch, rkm.weight_ih_l0.dtype)
    padding = random_mask(mask, batch, steps)

    def run():
        if state:
            return forward_and_gradients(rkm, x, hidden, memory, context, padding)
        with torch.no_grad():
            output, final = rkm(x, padding_mask=padding)
        return dict(enumerate([output, *final.tensors()]))

    wanted, given = both_ways(run)
    assert wanted.keys() == given.keys()
    for what, value in wanted.items():
        assert_close(given[what], value, what)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
@pytest.mark.parametrize(("ngram", "padding"), [(1, "causal"), (2, "causal"), (3, "causal"), (3, "same")])
def test_all_variants(cell, ngram, padding):
    for mask, dropout, learned in itertools.product(("none", "mixed"), (0.0, 0.4), (False, True)):
        rkm = stack(
            cell, ngram=ngram, ngram_padding=padding, dropout=dropout, weight_dropout=dropout, state_dropout=dropout,
            learn_sigma=learned, bias=not learned, learn_initial_state=learned,
        )  # fmt: skip
        for state in (True, False):
            compare_ways(rkm, mask=mask, state=state)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=40, deadline=None)
@drawn(
    steps=st.integers(1, 9), batch=st.integers(1, 5), size=st.integers(1, 6), layers=st.integers(1, 3),
    ngram=st.integers(1, 4), mask=st.sampled_from(["none", "left", "right", "mixed"]), state=st.booleans(),
)  # fmt: skip
def test_any_sizes(steps, batch, size, layers, ngram, mask, state):
    compare_ways(stack("lstm", (3, size), num_layers=layers, ngram=ngram), steps, batch, mask, state)


def test_gradcheck():
    rkm = stack(sizes=(2, 3), ngram=2, learn_sigma=True, memory_clip=None)
    x, hidden, memory, context = problem(rkm, 4, 2, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, hidden, memory, *context)]

    def run(x, hidden, memory, *rest):
        output, state = rkm(x, (hidden, memory, list(rest[:2])))
        return output, *state.tensors()

    with at_once() as ran:
        assert torch.autograd.gradcheck(run, [*leaves, *rkm.parameters()])
    assert ran


@pytest.mark.parametrize("arguments", [{}, {"ngram": 2, "dropout": 0.3}], ids=str)
def test_three_orders_of_derivatives_are_the_reference_s(arguments):
    rkm = stack("lstm", **arguments)
    given = problem(rkm, 4, 3, torch.float64)
    wanted, given = both_ways(lambda: derivatives(rkm, *given, random_mask("mixed", 3, 4)))
    for order in range(3):
        for value, other in zip(wanted[order], given[order], strict=True):
            assert_close(other, value)


def test_float32_and_autocast_to_bfloat16():
    compare_ways(stack(dtype=torch.float32))
    rkm, x = stack("lstm", dtype=torch.float32, dropout=0.2), torch.randn(7, 4, 3)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            output, state = rkm(x)
        return [output, *state, *torch.autograd.grad(output.float().square().sum(), list(rkm.parameters()))]

    for wanted, given in zip(*both_ways(run), strict=True):
        assert wanted.dtype == given.dtype
        assert_close(given, wanted, dtype=torch.bfloat16)


def test_weights_and_states_that_lie_otherwise_or_have_other_types():
    rkm = stack(dtype=torch.float32)
    for name in ("weight_ih_l0", "weight_hh_l1_reverse"):
        setattr(rkm, name, nn.Parameter(getattr(rkm, name).detach().t().contiguous().t()))
    x = torch.randn(4, 7, 3).transpose(0, 1)
    state = torch.randn(4, 5, 4, dtype=torch.float64).transpose(1, 2), torch.randn(4, 4, 5, dtype=torch.bfloat16)
    leaves = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in state), *rkm.parameters()]
    mask = random_mask("mixed", 7, 4).t()

    def run():
        output, final = rkm(x, state, mask)
        loss = output.square().sum() + final.hidden.sum() + final.cell.square().sum()
        return [output, *final, *torch.autograd.grad(loss, leaves)]

    for wanted, given in zip(*both_ways(run), strict=True):
        assert wanted.dtype == given.dtype
        assert_close(given, wanted, dtype=torch.bfloat16 if given.dtype == torch.bfloat16 else torch.float32)


def test_other_layouts_of_sequences():
    rkm = stack(ngram=2, batch_first=True)
    steps = [torch.randn(length, 3, dtype=torch.float64) for length in (2, 7, 4)]
    for x in (nn.utils.rnn.pack_sequence(steps, enforce_sorted=False), steps[1], torch.stack([steps[1]] * 2)):

        def run(x=x):
            output, state = rkm(x)
            return [output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output, *state.tensors()]

        for wanted, given in zip(*both_ways(run), strict=True):
            assert_close(given, wanted)


@pytest.mark.parametrize("cell", ["rkm_lstm", "linear_kernel"])
def test_missing_numbers_stay_where_they_are(cell):
    with at_once() as ran:
        check_missing_numbers_stay_where_they_are("batched", cell=cell, num_layers=2, bidirectional=True)
    assert ran


def test_the_state_of_a_row_that_is_padding_alone_does_not_reach_the_layer_above():
    rkm, x = stack(), torch.randn(5, 3, 3, dtype=torch.float64)
    state = [torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(2)]
    mask = random_mask("mixed", 3, 5)
    for tensor in state:
        tensor[:2, -1] = torch.nan

    def run():
        output, _ = rkm(x, state, mask)
        return torch.autograd.grad(output.sum(), [rkm.weight_ih_l1, rkm.weight_ih_l1_reverse])

    for wanted, given in zip(*both_ways(run), strict=True):
        assert_close(given, wanted)


def test_a_backward_can_be_repeated_and_gives_the_same_bits():
    rkm, x = stack(ngram=2, dropout=0.5), torch.randn(8, 3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *rkm.parameters()]
    with at_once():
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            loss = rkm(x)[0].square().sum()
            runs += [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_call_leaves_nothing_to_the_garbage_collector():
    """Tensors in a circle keep a GPU's memory until Python looks for circles."""
    rkm, x = stack(), torch.randn(6, 2, 3, dtype=torch.float64)
    with at_once():
        rkm(x)[0].sum().backward()
        gc.collect()
        gc.disable()
        try:
            rkm(x)
            rkm(x)[0].sum().backward()
            assert gc.collect() == 0
        finally:
            gc.enable()


@pytest.mark.parametrize("ngram", [1, 3])
def test_checks_are_made_once_for_all_lengths(ngram):
    rkm = stack(ngram=ngram)
    with at_once():
        for steps in (2, 5, 9):
            rkm(torch.randn(steps, 2, 3, dtype=torch.float64))
        assert len(two_directions._PROVEN) == (1 if ngram == 1 else 2)  # layers with n-grams have a node each
        for steps, batch in ((1, 2), (5, 4)):
            rkm(torch.randn(steps, batch, 3, dtype=torch.float64))
        assert len(two_directions._PROVEN) == (3 if ngram == 1 else 6)


def test_gradients_of_some_alone_and_none():
    rkm, x = stack(), torch.randn(6, 2, 3, dtype=torch.float64)
    rkm.requires_grad_(False)
    with at_once() as ran:
        assert not rkm(x)[0].requires_grad
    assert sum(ran) == 2
    for name in ("x", "weight_ih_l0_reverse", "weight_hh_l0", "weight_hh_l1_reverse", "bias_l1"):
        leaf = (x if name == "x" else getattr(rkm, name)).requires_grad_()
        wanted, given = both_ways(lambda leaf=leaf: torch.autograd.grad(rkm(x)[1][1][2:].sum(), [leaf])[0])
        assert_close(given, wanted, name)
        leaf.requires_grad_(False)


def test_an_output_may_be_changed_in_place():
    rkm, x = stack(), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)

    def run():
        output, _ = rkm(x)
        return torch.autograd.grad(output.mul_(2).tanh_().sum(), [x, *rkm.parameters()])

    for wanted, given in zip(*both_ways(run), strict=True):
        assert_close(given, wanted)


def test_inference_mode():
    rkm, x = stack(ngram=2), torch.randn(6, 2, 3, dtype=torch.float64)

    def run():
        with torch.inference_mode():
            output, state = rkm(x)
        return [output, *state.tensors()]

    for wanted, given in zip(*both_ways(run), strict=True):
        assert given.is_inference()
        assert_close(given, wanted)


def test_checkpoints_and_anomaly_detection():
    rkm, x = stack(dropout=0.5), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)

    def run():
        with torch.autograd.detect_anomaly(check_nan=True):
            return torch.autograd.grad(checkpoint(lambda x: rkm(x)[0], x, use_reentrant=False).sum(), [x])[0]

    wanted, given = both_ways(run)
    assert_close(given, wanted)


def test_vectorised_gradients():
    rkm, x = stack(), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(5, 4, 2, 10, dtype=torch.float64)

    def run():
        return torch.autograd.grad(rkm(x)[0], [x], directions, is_grads_batched=True)[0]

    wanted, given = both_ways(run)
    assert_close(given, wanted)


def test_a_dropout_that_is_looked_at_still_sees_zeros_at_padding():
    rkm, x = stack(dropout=0.5), torch.randn(6, 3, 3, dtype=torch.float64)
    mask, seen = random_mask("left", 3, 6), []
    rkm.dropout = nn.Sequential(rkm.dropout)
    rkm.dropout.register_forward_hook(lambda _module, given, output: seen.append(given[0]) or output + 1)

    def run():
        output, state = rkm(x, padding_mask=mask)
        return [output, *state, seen.pop()]

    for wanted, given in zip(*both_ways(run), strict=True):
        assert_close(given, wanted)


@pytest.mark.parametrize("name", ["weight_ih_l1", "weight_ih_l1_reverse"])
def test_a_wrong_weight_is_refused_in_the_same_sentence(name, monkeypatch):
    rkm, x = stack(), torch.randn(6, 2, 3, dtype=torch.float64)
    setattr(rkm, name, nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)))
    with in_turn(), pytest.raises(RKMError) as wanted:
        rkm(x)
    check, checked = two_directions._prove, []
    monkeypatch.setattr(two_directions, "_prove", lambda *stack: checked.append(stack) or check(*stack))
    with at_once(), pytest.raises(RKMError) as given:
        rkm(x)
    assert checked
    assert str(given.value) == str(wanted.value)


@pytest.mark.parametrize("arguments", [{"layer_norm": True}, {"proj_size": 2}, {"feedback": False}], ids=str)
def test_what_must_run_in_turn_does(arguments):
    with at_once() as ran:
        stack(**arguments)(torch.randn(6, 2, 3, dtype=torch.float64))
    assert not ran


def test_what_looks_into_a_layer_has_it_run_in_turn():
    rkm, x = stack(), torch.randn(6, 2, 3, dtype=torch.float64)
    rkm.backend = "auto"
    with at_once() as ran:
        rkm(x, reset=random_reset(2, 6))
        rkm(x, return_memory=True)
        torch.compile(rkm, backend="eager", fullgraph=True)(x)
        torch.func.vmap(lambda x: rkm.eval()(x)[0])(x.unsqueeze(0))
        torch.jit.trace(rkm.eval(), x, check_trace=False)
    assert not ran


@pytest.mark.slow
def test_an_exported_layer_runs_in_turn():
    with at_once() as ran:
        torch.export.export(RKM(3, 5, bidirectional=True), (torch.randn(6, 2, 3),))
    assert not ran


def test_a_weight_of_another_kind_of_tensor_has_the_directions_run_in_turn():
    rkm, x = stack(backend="auto", num_layers=1), torch.randn(6, 2, 3, dtype=torch.float64)
    wanted, _ = rkm(x)
    with at_once() as ran:
        given = torch.func.functional_call(rkm, {"bias_l0": torch._neg_view(-rkm.bias_l0)}, (x,))[0]
    assert not ran
    assert_close(given, wanted)


def test_on_a_cpu_no_directions_run_at_once():
    with watched() as ran:
        RKM(3, 5, bidirectional=True)(torch.randn(6, 2, 3))
    assert not ran


def test_the_choice_follows_estimates_and_a_name(monkeypatch):
    """Both directions count as twice the batch, and directions in turn as twice the time."""
    asked = []

    def estimate(_cell, x, _weights):
        asked.append(x.size(1))
        return 10.0

    rows = {**dispatch.BACKENDS}
    rows["persistent"] = replace(rows["persistent"], step_time=lambda *_: 5.5)
    rows["blockwise"] = replace(rows["blockwise"], refuses=lambda *_: None, step_time=estimate)
    monkeypatch.setattr(dispatch, "BACKENDS", rows)
    monkeypatch.setattr(dispatch, "pick", lambda *_: rows["persistent"])
    monkeypatch.setattr(two_directions, "_KNOWN", {})
    sketch = SimpleNamespace(size=lambda at: (7, 4, 3)[at], dtype=torch.float32, device="cuda:0", is_cuda=True)
    sketch.numel, sketch.new_empty = (lambda: 84), (lambda _one: torch.empty(1))
    cell = CELLS["rkm_lstm"]
    for _ in range(2):
        assert two_directions.runs_at_once("auto", cell, sketch, 5)
    assert asked == [8]
    monkeypatch.setattr(two_directions, "_KNOWN", {})
    rows["persistent"] = replace(rows["persistent"], step_time=lambda *_: 4.5)
    assert not two_directions.runs_at_once("auto", cell, sketch, 5)
    assert two_directions.runs_at_once("blockwise", cell, sketch, 5)
    assert not two_directions.runs_at_once("stepwise", cell, sketch, 5)
    gaussian = cell.through(resolve_kernel("gaussian", None))
    assert not two_directions.runs_at_once("blockwise", gaussian, sketch, 5)
    assert asked == [8, 8]


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ON_GPUS = [
    {},
    {"cell": "lstm", "mask": "mixed", "num_layers": 2},
    {"cell": "rkm_cifg", "mask": "mixed", "ngram": 3},
    {"cell": "rkm_lstm", "ngram": 3, "ngram_padding": "same"},
    {"cell": "linear_kernel_gated", "mask": "left", "learn_sigma": True, "num_layers": 2},
    {"cell": "linear_kernel", "bias": False},
    {"cell": "ran", "mask": "right"},
]


KINDS = [(arguments, torch.float32) for arguments in ON_GPUS] + list(itertools.product(ON_GPUS[:2], DTYPES[:2]))
ODD = [(63, 33, 100), (5, 140, 128), (6, 300, 65), (4, 600, 127), (4, 1100, 64), (9, 3, 51), (1, 1, 4)]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("arguments", "dtype"), KINDS, ids=str)
def test_on_a_gpu_numbers_are_the_reference_s(arguments, dtype):
    given = {"steps": 9, "batch": 5, "sizes": (6, 37), **arguments}
    with watched() as ran:
        compare("blockwise", device="cuda", dtype=dtype, bidirectional=True, tf32=True, **given)
    assert ran


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("steps", "batch", "size", "dtype"), [(*sizes, torch.float32) for sizes in ODD] + [(*ODD[1], torch.bfloat16)]
)
def test_on_a_gpu_odd_sizes(steps, batch, size, dtype):
    compare(
        "blockwise", device="cuda", dtype=dtype, steps=steps, batch=batch, sizes=(5, size), tf32=True,
        bidirectional=True, num_layers=2,
    )  # fmt: skip


def on_gpu(dtype=torch.float32, device="cuda", memory_clip=None, **arguments):
    return stack(sizes=(16, 64), dtype=dtype, backend="blockwise", memory_clip=memory_clip, **arguments).to(device)


def results_on_gpu(rkm, steps=50, batch=5, mask="none"):
    """What a call gives, from the same random numbers each time."""
    device, dtype = rkm.weight_ih_l0.device, rkm.weight_ih_l0.dtype
    torch.manual_seed(3)
    x, hidden, memory, _ = problem(rkm, steps, batch, dtype)
    padding = random_mask(mask, batch, steps)
    padding = None if padding is None else padding.to(device)
    return forward_and_gradients(rkm, x.to(device), hidden.to(device), memory.to(device), None, padding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_numbers_are_those_in_turn(dtype):
    for arguments, mask in (
        ({"dropout": 0.4}, "none"),
        ({"learn_sigma": True, "cell": "linear_kernel_gated"}, "mixed"),
    ):
        # Without a bound float16 overflows.
        rkm = on_gpu(dtype, memory_clip=1.0, **arguments)
        with watched() as ran:
            given = join_scales(results_on_gpu(rkm, mask=mask))
        assert sum(ran) == 2
        with in_turn():
            wanted = join_scales(results_on_gpu(rkm, mask=mask))
        for what, value in wanted.items():
            assert_close(given[what], value, what, product_type(given[what].dtype, "cuda"))


@pytest.mark.gpu
def test_on_a_gpu_repeated_runs_give_the_same_bits():
    rkm = on_gpu(torch.bfloat16, num_layers=3, dropout=0.3)
    first, *others = (results_on_gpu(rkm, steps=83, batch=200, mask="mixed") for _ in range(3))
    for run in others:
        assert all(torch.equal(run[what], value) for what, value in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "mask"), [*((dtype, "none") for dtype in DTYPES), (torch.float32, "mixed")])
def test_recorded_as_a_graph_it_gives_the_same_bits(dtype, mask):
    rkm = on_gpu(dtype, dropout=0.0)
    x = torch.randn(50, 5, 16, device="cuda", dtype=dtype, requires_grad=True)
    padding = random_mask(mask, 5, 50)
    padding = None if padding is None else padding.cuda()
    leaves = [x, *rkm.parameters()]

    def run():
        output, state = rkm(x, padding_mask=padding)
        loss = output.float().square().sum() + state.cell.sum() + state.hidden.float().sum()
        return [output, *state, *torch.autograd.grad(loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = [run() for _ in range(3)][-1]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with watched() as ran, torch.cuda.graph(graph):
        given = run()
    assert sum(ran) == 2
    for value in given:
        value.detach().fill_(torch.nan)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


@pytest.mark.gpu
def test_a_recorded_training_step_is_the_step_itself():
    rkm = on_gpu(dropout=0.0)
    function = GraphedFunction(lambda x: (rkm(x)[0].square().sum(),), list(rkm.parameters()))
    x, losses = torch.randn(40, 5, 16, device="cuda"), []
    for _ in range(4):
        rkm.zero_grad()
        (loss,) = function(x)
        loss.backward()
        losses.append([loss.detach().clone(), *(parameter.grad.clone() for parameter in rkm.parameters())])
    assert len(function.recorded) == 1
    for run in losses[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, losses[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [{"cell": "lstm"}, {"cell": "linear_kernel", "num_layers": 2}], ids=str)
def test_on_a_gpu_missing_numbers_and_three_orders_of_derivatives(arguments):
    check_missing_numbers_stay_where_they_are("blockwise", torch.float32, "cuda", bidirectional=True, **arguments)
    compare_derivatives("blockwise", torch.float32, device="cuda", tolerance="tf32", bidirectional=True, **arguments)


@pytest.mark.gpu
def test_by_itself_it_runs_where_auto_takes_blockwise():
    with watched() as ran:
        for size, norm in ((64, False), (300, False), (64, True)):
            rnn = RKM(16, size, bidirectional=True, layer_norm=norm, device="cuda")
            rnn(torch.randn(20, 8, 16, device="cuda"))[0].sum().backward()
    assert len(ran) == 1


@pytest.mark.gpu(count=2)
def test_it_runs_on_a_gpu_that_is_not_the_current_one():
    wanted, given = (results_on_gpu(on_gpu(device=device)) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for what, value in wanted.items():
        assert_close(given[what].cpu(), value.cpu(), what, product_type(value.dtype, "cuda"))
