"""Layers side by side against layers in order: on a CPU with stand-ins, which run work in any order that is allowed."""

import itertools
from contextlib import contextmanager

import pytest
import stand_ins
import torch
from helpers import assert_close, forward_and_gradients, join_scales, product_type, random_mask, randomized
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.graphs.graphed_function import GraphedFunction
from fairseq_rkm.modules.side_by_side import stretches
from fairseq_rkm.ops import wavefront
from ops.test_backends import check_missing_numbers_stay_where_they_are, problem
from ops.test_higher_derivatives import derivatives

FEEDBACK = [name for name, cell in CELLS.items() if cell.has_feedback]


@contextmanager
def watched():
    """The numbers of stretches of the calls within whose layers run side by side."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        run = wavefront.recurrence
        patch.setattr(wavefront, "recurrence", lambda *problem: ran.append(problem[2].chunks) or run(*problem))
        yield ran


@contextmanager
def side_by_side(chunks=3, lanes=2):
    """Within, all stacks run side by side that can; gives :func:`watched`'s list."""
    with pytest.MonkeyPatch.context() as patch, watched() as ran:
        stand_ins.run_side_by_side(patch, chunks, lanes)
        yield ran


def stack(cell="rkm_lstm", sizes=(3, 5), layers=3, dtype=torch.float64, backend="batched", **arguments):
    return randomized(RKM(*sizes, num_layers=layers, cell=cell, dtype=dtype, backend=backend, **arguments))


def both_orders(run, **options):
    """What ``run`` gives, in order and side by side, from the same random numbers."""
    results = []
    torch.manual_seed(3)
    results.append(run())
    with side_by_side(**options) as ran:
        torch.manual_seed(3)
        results.append(run())
    assert ran, "it ran in order"
    return results


def compare(rkm, steps=7, batch=4, mask="none", chunks=3, lanes=2, state=True):
    dtype = rkm.weight_ih_l0.dtype
    x, hidden, memory, context = problem(rkm, steps, batch, dtype)
    padding = random_mask(mask, batch, steps)

    def run():
        if state:
            return forward_and_gradients(rkm, x, hidden, memory, context, padding)
        with torch.no_grad():
            output, final = rkm(x, padding_mask=padding)
        return dict(enumerate([output, *final.tensors()]))

    wanted, given = both_orders(run, chunks=chunks, lanes=lanes)
    assert wanted.keys() == given.keys()
    for what, value in wanted.items():
        assert_close(given[what], value, what)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_all_variants(cell, ngram):
    for mask, dropout, learned in itertools.product(("none", "mixed"), (0.0, 0.4), (False, True)):
        rkm = stack(
            cell, ngram=ngram, dropout=dropout, weight_dropout=dropout, learn_sigma=learned, bias=not learned,
            learn_initial_state=learned,
        )  # fmt: skip
        for state in (True, False):
            compare(rkm, mask=mask, state=state)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=40, deadline=None)
@drawn(
    steps=st.integers(1, 12), batch=st.integers(1, 5), size=st.integers(1, 6), layers=st.integers(2, 5),
    chunks=st.integers(1, 13), lanes=st.integers(1, 4), ngram=st.integers(1, 4),
    mask=st.sampled_from(["none", "left", "right", "mixed"]), state=st.booleans(),
)  # fmt: skip
def test_any_sizes(steps, batch, size, layers, chunks, lanes, ngram, mask, state):
    rkm = stack("lstm", (3, size), layers, ngram=ngram)
    compare(rkm, steps, batch, mask, chunks, lanes, state)


def test_gradcheck():
    rkm = stack(sizes=(2, 3), layers=2, ngram=2, learn_sigma=True, memory_clip=None)
    x, hidden, memory, context = problem(rkm, 4, 2, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, hidden, memory, *context)]

    def run(x, hidden, memory, *rest):
        output, state = rkm(x, (hidden, memory, list(rest[:2])))
        return output, *state.tensors()

    with side_by_side() as ran:
        assert torch.autograd.gradcheck(run, [*leaves, *rkm.parameters()])
    assert ran


@pytest.mark.parametrize("arguments", [{}, {"ngram": 2, "dropout": 0.3}], ids=str)
def test_three_orders_of_derivatives_are_the_reference_s(arguments):
    rkm = stack("lstm", layers=2, **arguments)
    given = problem(rkm, 4, 3, torch.float64)
    wanted, given = both_orders(lambda: derivatives(rkm, *given, random_mask("mixed", 3, 4)))
    for order in range(3):
        for value, other in zip(wanted[order], given[order], strict=True):
            assert_close(other, value)


def test_float32_and_autocast_to_bfloat16():
    compare(stack(dtype=torch.float32))
    rkm, x = stack("lstm", dtype=torch.float32, dropout=0.2), torch.randn(7, 4, 3)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            output, state = rkm(x)
        return [output, *state, *torch.autograd.grad(output.float().square().sum(), list(rkm.parameters()))]

    for wanted, given in zip(*both_orders(run), strict=True):
        assert wanted.dtype == given.dtype
        assert_close(given, wanted, dtype=torch.bfloat16)


def test_other_layouts_of_sequences():
    rkm = stack(ngram=2, batch_first=True)
    steps = [torch.randn(length, 3, dtype=torch.float64) for length in (2, 7, 4)]
    for x in (nn.utils.rnn.pack_sequence(steps, enforce_sorted=False), steps[1], torch.stack([steps[1]] * 2)):

        def run(x=x):
            output, state = rkm(x)
            return [output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output, *state.tensors()]

        for wanted, given in zip(*both_orders(run), strict=True):
            assert_close(given, wanted)


def test_a_sequence_in_pieces_is_the_sequence_whole():
    rkm, x = stack(ngram=3), torch.randn(9, 2, 3, dtype=torch.float64)
    wanted, final = rkm(x)
    with side_by_side(chunks=2):
        first, state = rkm(x[:4])
        second, state = rkm(x[4:], state)
    assert_close(torch.cat([first, second]), wanted)
    for given, expected in zip(state.tensors(), final.tensors(), strict=True):
        assert_close(given, expected)


@pytest.mark.parametrize("cell", ["rkm_lstm", "linear_kernel"])
def test_missing_numbers_stay_where_they_are(cell):
    with side_by_side() as ran:
        check_missing_numbers_stay_where_they_are("batched", cell=cell, num_layers=2)
    assert ran


def test_a_backward_can_be_repeated_and_gives_the_same_bits():
    rkm, x = stack(ngram=2, dropout=0.5), torch.randn(8, 3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *rkm.parameters()]
    with side_by_side(chunks=4):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            loss = rkm(x)[0].square().sum()
            runs += [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_gradients_of_some_inputs_alone_and_none():
    rkm, x = stack(), torch.randn(6, 2, 3, dtype=torch.float64)
    rkm.requires_grad_(False)
    with side_by_side() as ran:
        assert not rkm(x)[0].requires_grad
        _, (_, memory) = rkm(x.requires_grad_())
        (given,) = torch.autograd.grad(memory[1].sum(), [x])
    assert len(ran) == 2
    (wanted,) = torch.autograd.grad(rkm(x)[1][1][1].sum(), [x])
    assert_close(given, wanted)


def test_inference_mode():
    rkm, x = stack(ngram=2), torch.randn(6, 2, 3, dtype=torch.float64)

    def run():
        with torch.inference_mode():
            output, state = rkm(x)
        return [output, *state.tensors()]

    for wanted, given in zip(*both_orders(run), strict=True):
        assert given.is_inference()
        assert_close(given, wanted)


def test_checkpoints_and_anomaly_detection():
    rkm, x = stack(dropout=0.5), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)

    def run():
        with torch.autograd.detect_anomaly(check_nan=True):
            return torch.autograd.grad(checkpoint(lambda x: rkm(x)[0], x, use_reentrant=False).sum(), [x])[0]

    wanted, given = both_orders(run)
    assert_close(given, wanted)


def test_an_output_changed_in_place_is_refused_as_in_order():
    rkm, sentences = stack(), []

    def run():
        output, _ = rkm(torch.randn(6, 2, 3, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace") as error:
            output.mul_(2)
        sentences.append(str(error.value))

    both_orders(run)
    assert sentences[0] == sentences[1]


def test_vectorised_gradients():
    rkm, x = stack(layers=2), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(5, 4, 2, 5, dtype=torch.float64)

    def run():
        return torch.autograd.grad(rkm(x)[0], [x], directions, is_grads_batched=True)[0]

    wanted, given = both_orders(run)
    assert_close(given, wanted)


def test_a_wrong_weight_is_refused_in_the_same_sentence():
    rkm, x = stack(), torch.randn(6, 2, 3, dtype=torch.float64)
    rkm.weight_ih_l1 = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(RKMError) as wanted:
        rkm(x)
    with side_by_side() as ran, pytest.raises(RKMError) as given:
        rkm(x)
    assert ran
    assert str(given.value) == str(wanted.value)


IN_ORDER = [
    {"bidirectional": True}, {"layer_norm": True}, {"proj_size": 2}, {"ngram": 3, "ngram_padding": "same"},
    {"layers": 1}, {"feedback": False},
]  # fmt: skip


@pytest.mark.parametrize("arguments", IN_ORDER, ids=str)
def test_what_must_run_in_order_does(arguments):
    rkm = stack(**arguments)
    with side_by_side() as ran:
        rkm(torch.randn(6, 2, 3, dtype=torch.float64))
    assert not ran


def test_what_looks_into_a_stack_has_it_run_in_order():
    rkm, x = stack(dropout=0.5), torch.randn(6, 2, 3, dtype=torch.float64)
    seen, rkm.backend = [], "auto"
    with side_by_side() as ran:
        rkm(x, reset=torch.rand(2, 6) < 0.3)
        rkm(x, return_memory=True)
        torch.compile(rkm, backend="eager", fullgraph=True)(x)
        torch.func.vmap(lambda x: rkm.eval()(x)[0])(x.unsqueeze(0))
        torch.jit.trace(rkm.eval(), x, check_trace=False)
        rkm.dropout.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
        rkm.train()(x)
        rkm.wavefront = 1
        rkm(x)
    assert not ran
    assert seen == [(6, 2, 5)] * 4


@pytest.mark.slow
def test_an_exported_stack_runs_in_order():
    with side_by_side() as ran:
        torch.export.export(RKM(3, 5, num_layers=2), (torch.randn(6, 2, 3),))
    assert not ran


@pytest.mark.parametrize(
    ("number", "message"),
    [(0, "wavefront must be at least 1, not 0"), (2.0, r"wavefront must be a whole number, not 2\.0")],
)  # fmt: skip
def test_a_wrong_number_of_stretches_is_refused(number, message):
    rkm = stack()
    with pytest.raises(RKMError, match=message):
        rkm.wavefront = number
    rkm.wavefront = None


def test_on_a_cpu_it_never_runs_side_by_side():
    rkm = stack()
    rkm.wavefront = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wavefront, "recurrence", None)
        rkm(torch.randn(64, 2, 3, dtype=torch.float64))


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ON_GPUS = [
    {},
    {"cell": "lstm", "mask": "mixed"},
    {"cell": "rkm_cifg", "ngram": 3, "dropout": 0.4},
    {"cell": "linear_kernel_gated", "ngram": 2, "mask": "mixed", "dropout": 0.4, "learn_sigma": True},
]


def on_gpu(dtype=torch.float32, device="cuda", **arguments):
    return stack(sizes=(16, 64), dtype=dtype, backend="blockwise", memory_clip=None, **arguments).to(device)


def results_on_gpu(rkm, stretches, steps=50, batch=5, mask="none"):
    """What a call gives over so many stretches of time, from the same random numbers each time."""
    device, dtype = rkm.weight_ih_l0.device, rkm.weight_ih_l0.dtype
    torch.manual_seed(3)
    x, hidden, memory, context = problem(rkm, steps, batch, dtype)
    context = context and [tensor.to(device) for tensor in context]
    padding = random_mask(mask, batch, steps)
    padding = None if padding is None else padding.to(device)
    rkm.wavefront = stretches
    return forward_and_gradients(rkm, x.to(device), hidden.to(device), memory.to(device), context, padding)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", ON_GPUS, ids=str)
def test_on_a_gpu_numbers_are_those_in_order(arguments, dtype):
    arguments = dict(arguments)
    mask = arguments.pop("mask", "none")
    rkm = on_gpu(dtype, **arguments)
    with watched() as ran:
        wanted, given = (join_scales(results_on_gpu(rkm, number, mask=mask)) for number in (1, 4))
    assert ran == [4]
    for what, value in wanted.items():
        assert_close(given[what], value, what, product_type(given[what].dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [2, 4, 10])
def test_on_a_gpu_repeated_runs_give_the_same_bits(layers):
    rkm = on_gpu(torch.bfloat16, layers=layers, dropout=0.3)
    runs = [results_on_gpu(rkm, 5, steps=83, batch=20) for _ in range(4)]
    for run in runs[1:]:
        assert all(torch.equal(run[what], value) for what, value in runs[0].items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_as_a_graph_it_gives_the_same_bits(dtype):
    rkm = on_gpu(dtype, dropout=0.0)
    rkm.wavefront = 4
    x = torch.randn(50, 5, 16, device="cuda", dtype=dtype, requires_grad=True)
    leaves = [x, *rkm.parameters()]

    def run():
        output, state = rkm(x)
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
    assert ran == [4]
    for value in given:
        value.detach().fill_(torch.nan)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


@pytest.mark.gpu
def test_a_recorded_training_step_is_the_step_itself():
    torch.manual_seed(0)
    rkm = on_gpu(dropout=0.0)
    rkm.wavefront = 3
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
def test_layers_side_by_side_do_not_disturb_each_other():
    """Much memory is taken and freed meanwhile, by all streams, and calls come from two streams of the user's."""
    rkm = on_gpu(layers=4)
    streams, wanted = [torch.cuda.current_stream(), torch.cuda.Stream()], {}
    for turn in range(80):
        kind = turn % 8
        streams[turn % 2].wait_stream(streams[(turn + 1) % 2])
        with torch.cuda.stream(streams[turn % 2]):
            noise = [torch.full((2 + turn % 5, 40, 64), torch.nan, device="cuda") for _ in range(20)]
            del noise
            results = results_on_gpu(rkm, 2 + kind, steps=60 + kind, batch=16, mask="mixed" if kind % 2 else "none")
            with torch.no_grad():
                results["alone"] = rkm(torch.ones(60 + kind, 16, 16, device="cuda"))[0]
        torch.cuda.current_stream().wait_stream(streams[1])
        for what, expected in wanted.setdefault(kind, results).items():
            assert torch.equal(results[what], expected), what
        del results
    for kind, results in wanted.items():
        plain = results_on_gpu(rkm, 1, steps=60 + kind, batch=16, mask="mixed" if kind % 2 else "none")
        for what, value in plain.items():
            assert_close(results[what], value, what, product_type(value.dtype, "cuda"))


@pytest.mark.gpu
def test_by_itself_it_runs_where_it_pays():
    rkm = RKM(64, 64, num_layers=4, device="cuda")
    long, short = (torch.randn(steps, 16, 64, device="cuda") for steps in (2000, 8))
    with watched() as ran:
        rkm(short)
        assert not ran
        output, _ = rkm(long)
        output.sum().backward()
        assert len(ran) == 1
        assert ran[0] == stretches(rkm, long) > 1
    assert stretches(rkm, long, recorded=True) >= ran[0]
    assert stretches(rkm, short, recorded=True) == 1


@pytest.mark.gpu(count=2)
def test_it_runs_on_a_gpu_that_is_not_the_current_one():
    wanted, given = (results_on_gpu(on_gpu(device=device), 3) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for what, value in wanted.items():
        assert_close(given[what].cpu(), value.cpu(), what, product_type(value.dtype, "cuda"))
