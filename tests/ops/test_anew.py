"""Resets where PyTorch follows operators: compiled programs, fake tensors, tracing."""

import pytest
import torch
from helpers import assert_close, random_reset, randomized
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fairseq_rkm import RKM, RKMError
from fairseq_rkm.ops import anew, operators
from fairseq_rkm.ops.ngram import extend
from ops.test_segments import D, compare, leaves_of, random_problem, weights_of, with_gradients

DOUBLE = torch.float64


def results_and_gradients(call, rkm, x, reset):
    output, state, memories = call(x, reset)
    wanted = [x, *rkm.parameters()]
    loss = output.sin().sum() + state.hidden.sum() + state.cell.cos().sum() + (memories * memories).sum()
    return [output, memories, *state.tensors(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("backend", ["auto", "batched"])
def test_a_compiled_program_takes_any_mask_and_length(backend):
    torch._dynamo.reset()
    rkm = randomized(
        RKM(2, 3, num_layers=2, bidirectional=True, ngram=3, learn_initial_state=True, backend=backend, dtype=DOUBLE)
    )

    def call(x, reset):
        return rkm(x, reset=reset, return_memory=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    compiled(torch.randn(6, 5, 2, dtype=DOUBLE, requires_grad=True), random_reset(5, 6))
    compilations = counter.frame_count
    for steps, batch in ((5, 3), (7, 4), (9, 2)):
        x = torch.randn(steps, batch, 2, dtype=DOUBLE, requires_grad=True)
        for reset in (random_reset(batch, steps), torch.zeros(batch, steps, dtype=torch.bool)):
            given_ = results_and_gradients(compiled, rkm, x, reset)
            for value, wanted in zip(given_, results_and_gradients(call, rkm, x, reset), strict=True):
                assert_close(value, wanted)
    assert counter.frame_count == compilations


def test_the_operator_is_one_by_pytorch_s_rules():
    problem = random_problem(5, 3, 0.4, ngram=3)
    leaves = leaves_of(problem)
    inputs = extend(leaves["x"], 3, "causal", leaves["context"])
    given_ = operators.arguments(problem["cell"], inputs, weights_of(leaves), leaves["hidden"], leaves["memory"], None)
    arguments = ("auto", *given_, problem["reset"], leaves["fresh_hidden"], leaves["fresh_memory"], 0)
    torch.library.opcheck(torch.ops.fairseq_rkm.anew.default, arguments)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_program_holds_the_operator_and_not_the_mask():
    rkm = randomized(RKM(2, 3, dtype=DOUBLE)).requires_grad_(False)
    x, masks = torch.randn(5, 3, 2, dtype=DOUBLE), [random_reset(3, 5), torch.ones(3, 5, dtype=torch.bool)]
    program = make_fx(lambda x, reset: rkm(x, reset=reset)[0])(x, masks[0])
    assert any(node.target is torch.ops.fairseq_rkm.anew.default for node in program.graph.nodes)
    for mask in masks:
        assert_close(program(x, mask), rkm(x, reset=mask)[0])
    recorded = torch.jit.trace(lambda x, reset: rkm(x, reset=reset)[0], (x, masks[0]))
    for mask in masks:
        assert_close(recorded(x, mask), rkm(x, reset=mask)[0])
    with FakeTensorMode():
        fake = RKM(2, 3), torch.zeros(5, 3, 2), torch.zeros(3, 5, dtype=torch.bool)
        assert fake[0](fake[1], reset=fake[2])[0].shape == (5, 3, 3)


def test_gradients_that_a_program_holds_are_not_differentiated_again():
    problem = random_problem(4, 2, 0.4)

    def by_operator(problem, leaves, weights):
        fresh = leaves["fresh_hidden"], leaves["fresh_memory"]
        common = leaves["x"], weights, leaves["hidden"], leaves["memory"], None
        return anew.ANEW("auto", problem["cell"], *common, problem["reset"], fresh, 0)

    def direct(problem, leaves, weights):
        fresh = leaves["fresh_hidden"], leaves["fresh_memory"]
        common = leaves["x"], weights, D, leaves["hidden"], leaves["memory"], None
        return anew.recurrence(problem["cell"], *common, "auto", anew.Reset(problem["reset"]), fresh)

    compare(with_gradients(problem, by_operator), with_gradients(problem, direct))
    leaves = leaves_of(problem)
    output, *_ = by_operator(problem, leaves, weights_of(leaves))
    (first,) = torch.autograd.grad(output.sin().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RKMError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), leaves["input"])


@pytest.mark.gpu
def test_a_cuda_graph_takes_any_mask():
    rkm = randomized(RKM(2, 3, ngram=2)).cuda().requires_grad_(False)
    x, mask = torch.randn(5, 3, 2, device="cuda"), random_reset(3, 5).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        rkm(x, reset=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = rkm(x, reset=mask)
    for share in (0.0, 0.5, 1.0):
        mask.copy_(torch.rand(3, 5, device="cuda") < share)
        graph.replay()
        assert_close(output, rkm(x, reset=mask)[0], dtype="tf32")
