"""The backends as PyTorch's operators: declared as it demands, and right under the tools that follow operators."""

import copy

import pytest
import torch
from helpers import DEVICES, assert_close, random_mask, randomized
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops import BACKENDS, Weights
from fairseq_rkm.ops.backends.native import native
from fairseq_rkm.ops.cells import cell_of_key
from fairseq_rkm.ops.operators import arguments

compiled = pytest.mark.skipif(native._missing(CELLS["rkm_lstm"]) is not None, reason="needs a C compiler")
ON_CPU = [
    ("batched", torch.float64),
    ("reference", torch.float64),
    pytest.param("native", torch.float32, marks=compiled),
]


def operator(name):
    return getattr(torch.ops.fairseq_rkm, name).default


def operator_arguments(
    device="cpu", steps=3, mask="none", state=True, dtype=torch.float32, requires_grad=True, **options
):
    """What an operator takes, for a module's weights."""
    rkm = randomized(RKM(3, 5, dtype=dtype, **options)).to(device).requires_grad_(requires_grad)
    batch, narrow = 4, {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    wide = narrow | {"dtype": torch.promote_types(dtype, torch.float32)}
    inputs = torch.randn(steps + rkm.ngram - 1, batch, 3, **narrow)
    hidden, memory = torch.randn(batch, 5, **narrow), torch.randn(batch, 5, **wide)
    padding = random_mask(mask, batch, steps)
    keep = None if padding is None else ~padding.t().to(device)
    weights = rkm._weights("l0", None)
    if requires_grad:  # leaves, as a check of operators wants them
        weights = weights._replace(
            **{n: v.detach().requires_grad_() for n, v in weights._asdict().items() if torch.is_tensor(v)}
        )
    return arguments(rkm._cell, inputs, weights, *((hidden, memory) if state else (None, None)), keep)


def check_operator(name, **options):
    """A backend's operator, and that of its backward pass, by PyTorch's own test of operators."""
    given = operator_arguments(**options)
    opcheck(operator(name), given)
    plain = operator_arguments(**options, requires_grad=False)
    output, _, memory, *own = operator(name)(*plain)
    grads = torch.randn_like(output), None, torch.randn_like(memory)
    needs = [plain[i] is not None for i in (1, 2, 3, *range(5, 5 + len(Weights._fields)))]
    opcheck(operator(f"{name}_backward"), (*plain, own, *grads, needs))


@pytest.mark.parametrize(("name", "dtype"), ON_CPU)
@pytest.mark.parametrize(
    "options",
    [
        {"cell": "rkm_lstm", "ngram": 2, "mask": "mixed"},
        {"cell": "linear_kernel", "layer_norm": True, "learn_sigma": True, "state": False},
        {"cell": "gated_cnn", "bias": False},
    ],
    ids=lambda o: o["cell"],
)
def test_operators_are_declared_as_pytorch_demands(name, dtype, options):
    check_operator(name, dtype=dtype, **options)


@pytest.mark.parametrize(("name", "dtype"), [("batched", torch.bfloat16), ("reference", torch.float16)])
def test_operators_of_16_bits_keep_the_memory_s_32(name, dtype):
    given = operator_arguments(dtype=dtype)
    opcheck(operator(name), given, test_utils=("test_schema", "test_faketensor"))
    assert operator(name)(*given)[2].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["batched", "persistent", "blockwise", "stepwise", "scan"])
@pytest.mark.parametrize("mask", ["none", "mixed"])
def test_operators_on_gpus_are_declared_as_pytorch_demands(name, mask):
    feedback = False if name == "scan" else None
    normed = {"layer_norm": name != "blockwise"}
    for options in ({"cell": "rkm_cifg"}, {"cell": "linear_kernel", **normed, "learn_sigma": True}):
        check_operator(name, device="cuda", feedback=feedback, mask=mask, **options)
        check_operator(name, device="cuda", feedback=feedback, mask=mask, state=False, ngram=3, **options)


def test_an_operator_called_with_what_does_not_fit_refuses():
    given = list(operator_arguments())
    for place, wrong, message in (
        (1, torch.randn(3, 4, 3, dtype=torch.float64), r"torch\.float64 but the weights torch\.float32"),
        (2, torch.randn(3, 5), "the hidden state must be of shape"),
        (0, "rkm_lstm", "names no cell"),
        (0, "rnn/1/None", "names no cell"),
    ):
        with pytest.raises(RKMError, match=message):
            operator("batched")(*given[:place], wrong, *given[place + 1 :])
    given = operator_arguments(dtype=torch.float64)
    with pytest.raises(RKMError, match="backend 'native' cannot run this: it computes in float32"):
        operator("native")(*given)
    given = operator_arguments(requires_grad=False)
    output, _, _, *own = operator("batched")(*given)
    with pytest.raises(RKMError, match="a result of fairseq_rkm::batched must be"):
        operator("batched_backward")(
            *given, [o[:1] for o in own], output, None, None, [True] * 3 + [False] * len(Weights._fields)
        )


def test_a_cell_is_read_from_its_key():
    for cell in CELLS.values():
        for variant in (cell, cell.without_feedback(), cell.clipped(0.1), cell.clipped(1e-300)):
            assert cell_of_key(variant.key) == variant


def pair(**options):
    """A module by ``"auto"``, and the same by the reference."""
    rkm = randomized(RKM(3, 4, **options))
    exact = copy.deepcopy(rkm)
    exact.backend = "reference"
    return rkm, exact


def targets(graph):
    return {str(node.target) for node in graph.graph.nodes}


@pytest.mark.parametrize("cell", CELLS)
def test_a_recorded_program_takes_any_length_and_gives_gradients(cell):
    """``make_fx`` with symbolic sizes records one operator a pass and layer, and no step of a loop."""
    rkm, exact = pair(cell=cell, ngram=2, num_layers=2)
    parameters = {name: p.detach() for name, p in rkm.named_parameters()}

    def function(module):
        def gradients(parameters, x):
            leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            output, _ = functional_call(module, leaves, (x,))
            return output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))

        return gradients

    recorded = make_fx(function(rkm), tracing_mode="symbolic")(parameters, torch.randn(6, 5, 3))
    assert sum("fairseq_rkm" in str(node.target) for node in recorded.graph.nodes) == 4
    for steps, batch in ((2, 2), (9, 7)):
        x = torch.randn(steps, batch, 3)
        for given, wanted in zip(recorded(parameters, x), function(exact)(parameters, x), strict=True):
            assert_close(given, wanted)


def test_recorded_gradients_are_differentiated_right_or_refused():
    rkm, exact = pair(cell="lstm")
    x = torch.randn(4, 2, 3)

    def penalty(module):
        def penalty_of(x):
            (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

        return penalty_of

    recorded = make_fx(penalty(rkm))(x.clone().requires_grad_())
    assert_close(recorded(-x), penalty(exact)(-x.requires_grad_()))

    def gradient(x):
        return torch.autograd.grad(rkm(x)[0].square().sum(), x)[0]

    first = make_fx(gradient)(x.clone().requires_grad_())(x)
    with pytest.raises(RKMError, match="gradients, which cannot be differentiated again"):
        first.sum().backward()


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("options", [{}, {"feedback": False}, {"cell": "lstm", "num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_memory_have_the_shapes_of_all_results(device, options, dtype):
    """A fake ``cuda`` tensor needs no GPU."""
    real = RKM(3, 4, dtype=dtype, layer_norm=True, **options)
    wanted, (hidden, memory) = real(torch.zeros(5, 2, 3, dtype=dtype))
    with FakeTensorMode():
        shapes = {"x": (5, 2, 3)} | {name: tuple(p.shape) for name, p in real.named_parameters()}
        # Autograd asks CUDA for a stream; a PyTorch without CUDA then ends Python.
        grad = {"requires_grad": device != "cuda" or torch.cuda.is_available()}
        fake = {n: torch.zeros(shape, dtype=dtype, device=device, **grad) for n, shape in shapes.items()}
        x = fake.pop("x")
        output, state = functional_call(real, fake, (x,))
        leaves = [x, *fake.values()]
        grads = torch.autograd.grad(output.float().sum(), leaves) if output.requires_grad else leaves
    for given, like in zip((output, *state, *grads), (wanted, hidden, memory, *leaves), strict=True):
        assert (given.shape, given.dtype, given.device.type) == (like.shape, like.dtype, device)


def test_a_module_on_the_meta_device_needs_no_mode():
    rkm = RKM(3, 4, num_layers=2, ngram=3, device="meta")
    output, state = rkm(torch.empty(500_000, 2, 3, device="meta"))
    output.sum().backward()
    assert output.shape == (500_000, 2, 4)
    assert state.hidden.shape == (2, 2, 4)
    assert rkm.weight_ih_l0.grad.shape == (16, 9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpoints_save_or_run_the_operator_again(device, saved, monkeypatch):
    rkm, exact = (module.to(device) for module in pair(num_layers=2, dropout=0.5))
    names, runs = {"native", "batched", "blockwise", "persistent", "stepwise"}, []

    def policy(_context, function, *_arguments, **_options):
        ours = function.namespace == "fairseq_rkm" and function._opname in names
        return CheckpointPolicy.MUST_SAVE if ours and saved else CheckpointPolicy.PREFER_RECOMPUTE

    for backend in BACKENDS.values():
        run = backend.operator.passes.forward
        counted = backend.operator.passes._replace(forward=lambda *a, run=run: runs.append(1) or run(*a))
        monkeypatch.setattr(backend.operator, "passes", counted)
    x = torch.randn(4, 2, 3, device=device)
    results = []
    for module in (rkm, exact):
        torch.manual_seed(0)
        contexts = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if module is rkm else {}
        loss = checkpoint(lambda x, m=module: m(x)[0].square().sum(), x, use_reentrant=False, **contexts)
        results.append(torch.autograd.grad(loss, list(module.parameters())))
        if module is rkm:
            assert len(runs) == (2 if saved else 4)
    for given, wanted in zip(*results, strict=True):
        assert_close(given, wanted, dtype="tf32" if device == "cuda" else None)


@pytest.mark.parametrize("options", [{}, {"cell": "ran", "ngram": 3}, {"cell": "gated_cnn"}])
def test_a_counter_of_flops_counts_what_the_reference_does(options):
    counts = []
    for module in pair(**options):
        x, state = torch.randn(5, 2, 3, requires_grad=True), torch.randn(2, 1, 2, 4, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            loss = module(x, tuple(state.unbind()))[0].square().sum()
            forward = counter.get_total_flops()
            loss.backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
