"""RKM under ``torch.compile``: one graph, for all lengths and batches, with eager's values and gradients."""

import copy
import shutil
import warnings

import pytest
import torch
from helpers import DEVICES, assert_close, random_mask, randomized
from torch import nn
from torch._dynamo.utils import counters

from fairseq_rkm import CELLS, RKM, RKMState
from fairseq_rkm.modules.rkm import outside_old_compilers

CXX = pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _forgotten():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def results_of(module, arguments, parameters, autocast=False):
    """Output, final state and gradients, with the same dropouts at each call."""
    torch.manual_seed(0)
    with torch.autocast(arguments[0].device.type, torch.bfloat16, enabled=autocast):
        output, state = module(*arguments)
    assert type(state) is RKMState
    results = [output, *state, *(state.context or [])]
    loss = sum(result.float().square().sum() for result in results)
    return results, torch.autograd.grad(loss, parameters, allow_unused=True)


def compare(module, problems, tolerance=None, autocast=False, backend="aot_eager", **compiling):
    """The compiled module against the eager one; every graph is whole, and no warning is given."""
    parameters, first = list(module.parameters()), copy.deepcopy(module)
    compiled = torch.compile(module, backend=backend, fullgraph=True, **compiling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"Guards may run slower on Python 3\.13\.0")  # PyTorch's, of its compiler
        for arguments in problems:
            given = results_of(compiled, arguments, parameters, autocast)
            wanted = results_of(first, arguments, list(first.parameters()), autocast)
            for ours, theirs in zip(given, wanted, strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    assert (one is None) == (other is None)
                    if one is not None:
                        assert one.dtype == other.dtype
                        assert_close(one, other, dtype=tolerance)


def inputs(device="cpu", lengths=(5, 6, 9), features=7, dtype=torch.float32):
    """Of other batches, too; none is as large as another dimension, which PyTorch would take for the same variable."""
    batches = (41 + i for i in range(len(lengths)))
    return [
        torch.randn(t, batch, features, dtype=dtype, device=device) for t, batch in zip(lengths, batches, strict=True)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell", CELLS)
def test_twenty_lengths_are_one_graph(device, cell):
    rkm = randomized(RKM(7, 4, cell=cell)).to(device)
    tolerance = "tf32" if device == "cuda" else None
    compare(rkm, [(x,) for x in inputs(device, range(2, 22))], tolerance, dynamic=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["total"] == 1, "a number of the module was compiled as a variable"


def test_automatic_sizes_are_compiled_twice():
    compare(RKM(7, 4), [(x,) for x in inputs(lengths=range(2, 22))])
    assert counters["stats"]["unique_graphs"] == 2


STACK = {
    "num_layers": 2,
    "bidirectional": True,
    "ngram": 3,
    "layer_norm": True,
    "dropout": 0.3,
    "weight_dropout": 0.2,
    "state_dropout": 0.1,
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [STACK, STACK | {"cell": "linear_kernel", "learn_sigma": True}])
def test_stacks_with_state_mask_and_dropouts(options):
    rkm, problems = randomized(RKM(7, 4, batch_first=True, **options)), []
    for x in inputs():
        with torch.no_grad():
            _, state = rkm(x.transpose(0, 1))
        problems.append((x.transpose(0, 1), state, random_mask("mixed", x.size(1), x.size(0))))
    compare(rkm, problems, dynamic=True)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["batched", "reference"])
def test_a_named_backend_is_compiled_as_itself(backend):
    compare(RKM(7, 4, backend=backend), [(x,) for x in inputs()], dynamic=True)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float64, False), (torch.float32, True)]
)
def test_other_dtypes_and_autocast(dtype, autocast):
    compare(RKM(7, 4, dtype=dtype), [(x,) for x in inputs(dtype=dtype)], autocast=autocast, dynamic=True)


def test_plain_pairs_are_taken_and_states_passed_on():
    rkm = RKM(7, 4)

    def twice(x, pair):
        output, state = rkm(x, pair)
        more, state = rkm(x, state.detach())
        return output + more, state

    x, pair = torch.randn(5, 2, 7), tuple(torch.randn(2, 1, 2, 4).unbind())
    given, state = torch.compile(twice, backend="aot_eager", fullgraph=True)(x, pair)
    wanted, final = twice(x, pair)
    assert_close(given, wanted)
    assert_close(state.cell, final.cell)


def test_without_gradients_and_in_inference_mode():
    rkm, x = RKM(7, 4).eval(), torch.randn(5, 2, 7)
    compiled = torch.compile(rkm, backend="aot_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(compiled(x)[0], rkm(x)[0])


class Classifier(nn.Module):
    """A network around a recurrence."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = RKM(7, 8, ngram=2), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(0))


@CXX
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_training_by_inductor_follows_eager(device, mode):
    torch.manual_seed(0)
    network = Classifier().to(device)
    losses = []
    for module in (copy.deepcopy(network), network):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        call = torch.compile(module, fullgraph=True, mode=mode) if module is network else module
        generator = torch.Generator().manual_seed(0)
        steps = []
        for _ in range(6):
            x, target = torch.randn(5, 4, 7, generator=generator), torch.randint(3, (4,), generator=generator)
            loss = nn.functional.cross_entropy(call(x.to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach().cpu())
        losses.append(torch.stack(steps))
    assert_close(losses[1], losses[0], dtype="tf32" if device == "cuda" else None)
    assert losses[1][-1] != losses[1][0]


def test_a_second_derivative_of_a_compiled_program_is_refused_by_pytorch():
    compiled = torch.compile(RKM(7, 4), backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 2, 7, requires_grad=True)
    (first,) = torch.autograd.grad(compiled(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def test_a_compiler_that_cannot_read_an_rkm_leaves_it_alone():
    """Before PyTorch 2.8 it ends in RecursionError."""

    class Old(RKM):
        forward = outside_old_compilers(RKM.forward, "2.7.1+cu126")

    x = torch.randn(3, 2, 4)
    rkm = Old(4, 4)
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    output = torch.compile(lambda x: rkm(x)[0] + 1, backend=compiler)(x)
    assert torch.equal(output, rkm(x)[0] + 1)
    assert graphs, "what is around the module is compiled"
    assert not any("fairseq_rkm" in str(graph.graph) for graph in graphs)
    assert outside_old_compilers(RKM.forward, "2.8.0") is RKM.forward
