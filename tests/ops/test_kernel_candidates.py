"""Candidates through every kernel, in every cell and by every backend that has them."""

import gc

import pytest
import torch
from helpers import forward_and_gradients, random_mask, randomized
from torch.func import functional_call

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.modules import Stepper
from fairseq_rkm.ops import BACKENDS
from ops.test_backends import compare, problem
from ops.test_kernel_functions import by_definition, resolve_kernel

KERNELS = [
    {"kernel": "polynomial", "kernel_scale": 1.3, "kernel_offset": 0.7},
    {"kernel": "polynomial", "kernel_degree": 3, "kernel_scale": 1.3, "kernel_offset": 0.7},
    {"kernel": "gaussian", "kernel_scale": 1.3},
    {"kernel": "arccos"},
    {"kernel": "arccos", "kernel_degree": 0},
]
"""Their numbers are those of :mod:`ops.test_kernel_functions`; :func:`by_definition` reads them there."""


def name_of(kernel):
    return "".join(str(value) for key, value in kernel.items() if key in ("kernel", "kernel_degree"))


def bound_of(kernel):
    """A bound of the memory for a kernel that grows faster than its inputs: without, values leave all numbers."""
    return 1.5 if kernel["kernel"] == "polynomial" else None


of_kernels = pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
of_cells = pytest.mark.parametrize("cell", CELLS)


@of_kernels
@pytest.mark.parametrize("feedback", [None, False])
def test_a_call_leaves_nothing_to_the_garbage_collector(kernel, feedback):
    """Tensors in a circle keep a GPU's memory until Python looks for circles."""
    rkm = RKM(3, 4, feedback=feedback, **kernel)
    rkm(torch.randn(5, 2, 3))[0].sum().backward()
    gc.collect()
    gc.disable()
    try:
        rkm(torch.randn(5, 2, 3))
        rkm(torch.randn(5, 2, 3))[0].sum().backward()
        assert gc.collect() == 0
    finally:
        gc.enable()


@of_kernels
@of_cells
@pytest.mark.parametrize("feedback", [None, False])
def test_two_steps_by_hand(kernel, cell, feedback):
    """The reference against the linear cell whose candidate's bias is what each unit's kernel gives, by definition."""
    rkm = RKM(3, 4, cell=cell, ngram=2, feedback=feedback, memory_clip=None, backend="reference", dtype=torch.float64,
              learn_kernel=False, **kernel)  # fmt: skip
    linear = RKM(3, 4, cell=cell, ngram=2, feedback=feedback, memory_clip=None, backend="reference",
                 dtype=torch.float64)  # fmt: skip
    weights = {name: parameter.detach().clone() for name, parameter in randomized(rkm).named_parameters()}
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    row = resolve_kernel(rkm.kernel, rkm.kernel_degree)
    state = rkm.initial_state(1)
    output, _ = rkm(x)
    candidate = rkm.gate_slice("candidate")
    for t in range(2):
        window = torch.cat([x[t, 0], x[t - 1, 0] if t else torch.zeros(3, dtype=torch.float64)])
        filters, sees = weights["weight_ih_l0"][candidate], window
        if "candidate" in rkm.recurrent_gates:
            filters = torch.cat([filters, weights["weight_hh_l0"][candidate]], dim=1)
            sees = torch.cat([window, state.hidden[0, 0]])
        values = torch.stack([by_definition(row, filter_, sees) for filter_ in filters])
        own = {name: value.clone() for name, value in weights.items()}
        own["weight_ih_l0"][candidate] = 0
        if "candidate" in rkm.recurrent_gates:
            own["weight_hh_l0"][candidate] = 0
        own["bias_l0"][candidate] += values
        with torch.no_grad():
            wanted, state = functional_call(linear, own, (x[t : t + 1], state))
        torch.testing.assert_close(output[t].detach(), wanted[0])


@pytest.mark.usefixtures("poisoned")
@of_kernels
@of_cells
def test_all_variants(kernel, cell):
    for feedback in (None, False):
        options = {"cell": cell, "feedback": feedback, "learn_sigma": True, **kernel}
        bound = {"memory_clip": bound_of(kernel)}
        compare("batched", **bound, **options)
        compare("batched", ngram=3, layer_norm=True, mask="mixed", **options)
        same = {"ngram": 3, "ngram_padding": "same"}
        compare("batched", bidirectional=True, mask="left", num_layers=2, **same, **bound, **options)
        compare("batched", bias=False, memory_clip=0.4, learn_kernel=False, **options)
        compare("batched", ngram=2, reset=True, return_memory=True, steps=7, mask="mixed", **bound, **options)


@of_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(kernel, dtype):
    for cell in ("lstm", "linear_kernel", "ran", "gated_cnn"):
        compare("batched", dtype=dtype, cell=cell, steps=7, batch=3, sizes=(6, 9), return_memory=True, **kernel)
    compare("batched", dtype=dtype, cell="rkm_cifg", layer_norm=True, steps=7, batch=3, sizes=(6, 9), **kernel)


@pytest.mark.gpu
@of_kernels
@of_cells
def test_on_a_gpu(kernel, cell):
    for feedback in (None, False):
        options = {"device": "cuda", "cell": cell, "feedback": feedback, "memory_clip": bound_of(kernel), **kernel}
        compare("auto", mask="mixed", ngram=3, return_memory=True, **options)
    compare("auto", device="cuda", cell=cell, dtype=torch.bfloat16, layer_norm=True, sizes=(6, 9), **kernel)


@pytest.mark.parametrize("backend", ["reference", "batched"])
@of_kernels
@of_cells
def test_gradcheck(backend, kernel, cell):
    for feedback in (None, False):
        rkm = randomized(RKM(2, 3, cell=cell, ngram=2, feedback=feedback, backend=backend, dtype=torch.float64,
                             memory_clip=None, **kernel))  # fmt: skip
        x, hidden, memory, context = problem(rkm, 3, 2, torch.float64)
        names = [name for name, _ in rkm.named_parameters()]
        mask = torch.tensor([[False, False, False], [False, False, True]])

        def run(x, hidden, memory, context, *parameters, rkm=rkm, names=names):
            arguments = (x, (hidden, memory, [context]), mask)  # noqa: B023
            output, state = functional_call(rkm, dict(zip(names, parameters, strict=True)), arguments)
            return output, state.hidden, state.cell

        leaves = [x, hidden, memory, context[0], *rkm.parameters()]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@of_kernels
def test_derivatives_of_the_second_order_are_the_reference_s(kernel):
    given = []
    for backend in ("batched", "reference"):
        torch.manual_seed(0)
        rkm = randomized(RKM(3, 4, backend=backend, dtype=torch.float64, memory_clip=None, **kernel))
        x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(rkm(x)[0].square().sum(), x, create_graph=True)
        given.append(torch.autograd.grad(gradient.square().sum(), [x, *rkm.parameters()], allow_unused=True))
    for one, other in zip(*given, strict=True):
        torch.testing.assert_close(one, other)


EXTREMES = {"zeros": 0.0, "large": 1e4, "small": 1e-30}


@pytest.mark.parametrize("backend", ["reference", "batched"])
@of_kernels
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_give_numbers(backend, kernel, extreme, dtype):
    for cell in CELLS:
        for feedback in (None, False):
            rkm = RKM(3, 4, cell=cell, feedback=feedback, ngram=2, backend=backend, dtype=dtype, **kernel)
            x = EXTREMES[extreme] * torch.randn(4, 2, 3, dtype=dtype)
            x[1] = 0
            x[2, 0] = EXTREMES[extreme] * rkm.weight_ih_l0[0, :3].detach()  # along a filter
            hidden, memory = torch.zeros(2, 1, 2, 4, dtype=dtype)
            context = [torch.zeros(1, 2, 3, dtype=dtype)]
            results = forward_and_gradients(rkm, x, hidden, memory, context, random_mask("mixed", 2, 4))
            for name, value in results.items():
                assert value.isfinite().all(), (cell, feedback, name)


@of_kernels
@of_cells
def test_a_sequence_in_pieces_and_by_single_steps_is_the_sequence(kernel, cell):
    rkm = randomized(RKM(3, 4, cell=cell, ngram=2, dtype=torch.float64, **kernel)).eval()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        whole, final = rkm(x)
        first, state = rkm(x[:3])
        second, state = rkm(x[3:], state)
        torch.testing.assert_close(torch.cat([first, second]), whole)
        for one, other in zip(state.tensors(), final.tensors(), strict=True):
            torch.testing.assert_close(one, other)
        stepper, state, steps = Stepper(rkm), rkm.initial_state(2), []
        for t in range(7):
            output, state = stepper(x[t : t + 1], state)
            steps.append(output)
        torch.testing.assert_close(torch.cat(steps), whole)


@of_kernels
@of_cells
@pytest.mark.parametrize("learn_kernel", [False, True])
def test_calls_of_one_step_without_gradients_are_the_sequence(kernel, cell, learn_kernel):
    rkm = randomized(RKM(3, 4, cell=cell, dtype=torch.float64, learn_kernel=learn_kernel, **kernel)).eval()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        whole, state, steps = rkm(x)[0], rkm.initial_state(2), []
        for t in range(5):
            output, state = rkm(x[t : t + 1], state)
            steps.append(output)
    torch.testing.assert_close(torch.cat(steps), whole)


@of_kernels
@of_cells
def test_kernels_add_parameters_and_no_weights(kernel, cell):
    rkm, linear = RKM(30, 40, cell=cell, ngram=3, **kernel), RKM(30, 40, cell=cell, ngram=3)
    assert rkm.num_weights() == linear.num_weights()
    more = {name: p.shape for name, p in rkm.named_parameters() if name not in dict(linear.named_parameters())}
    own = resolve_kernel(rkm.kernel, rkm.kernel_degree).parameters
    assert more == {f"kernel_{name}_log_l0": (40,) for name in own}
    fixed = RKM(30, 40, cell=cell, ngram=3, learn_kernel=False, **kernel)
    assert set(dict(fixed.named_parameters())) == set(dict(linear.named_parameters()))


def test_the_linear_kernel_is_the_cell_as_it_was():
    torch.manual_seed(0)
    named = RKM(3, 4, kernel="linear")
    torch.manual_seed(0)
    plain = RKM(3, 4)
    assert named._cell == plain._cell
    assert named.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(5, 2, 3)
    assert torch.equal(named(x)[0], plain(x)[0])


def test_a_polynomial_of_degree_1_is_linear():
    rkm = RKM(3, 4, kernel="polynomial", kernel_degree=1, kernel_offset=0.0, learn_kernel=False, dtype=torch.float64)
    linear = RKM(3, 4, dtype=torch.float64)
    linear.load_state_dict(rkm.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(rkm(x)[0], linear(x)[0])


@of_kernels
def test_candidates_start_around_zero(kernel):
    rkm = RKM(30, 400, cell="cnn", sigma_i2=0.999, **kernel)
    with torch.no_grad():
        start = rkm(torch.zeros(1, 1, 30))[0]
    assert abs(start.mean().item()) < 0.01


def test_a_bounded_kernel_bounds_the_memory():
    bounds = {name_of(kernel): RKM(3, 4, **kernel).memory_clip for kernel in KERNELS}
    assert bounds == {"polynomial": 1.0, "polynomial3": 1.0, "gaussian": None, "arccos": 1.0, "arccos0": None}
    assert RKM(3, 4, kernel="gaussian", memory_clip=0.5).memory_clip == 0.5
    torch.manual_seed(0)
    rkm = RKM(3, 4, kernel="gaussian")
    with torch.no_grad():
        rkm.weight_hh_l0.mul_(1e3)  # the linear cell's memory would be beyond float32
        _, state = rkm(torch.randn(500, 2, 3))
    assert state.cell.abs().max() < 500 * (1 + rkm.bias_l0.abs().max())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kernel": "rbf"}, "unknown kernel 'rbf'; choose one of linear, polynomial, gaussian, arccos"),
        ({"kernel": "polynomial", "kernel_degree": 0}, "must be a whole number from 1 to 8, not 0"),
        ({"kernel": "gaussian", "kernel_scale": 0.0}, "kernel_scale must be above 0 and finite, not 0.0"),
        ({"kernel": "gaussian", "kernel_scale": -1}, "kernel_scale must be above 0 and finite, not -1"),
        ({"kernel": "gaussian", "kernel_scale": float("nan")}, "kernel_scale must be above 0 and finite, not nan"),
        ({"kernel": "gaussian", "kernel_scale": "1"}, "kernel_scale must be a number, not '1'"),
        ({"kernel": "polynomial", "kernel_offset": -0.1}, "kernel_offset must be at least 0 and finite, not -0.1"),
        ({"kernel": "polynomial", "kernel_offset": 0.0}, "learned starts above 0; learn_kernel=False fixes it at 0"),
        ({"kernel": "gaussian", "kernel_offset": 1.0}, "the kernel 'gaussian' has no offset: leave kernel_offset out"),
        ({"kernel_scale": 1.0}, "the kernel 'linear' has no scale: leave kernel_scale out"),
        ({"kernel": "arccos", "learn_kernel": 1}, "learn_kernel must be True or False, not 1"),
        ({"kernel": "gaussian", "proj_size": 2}, "projections with feedback are for the linear kernel"),
    ],
)
def test_what_is_no_kernel_is_refused(arguments, sentence):
    with pytest.raises(RKMError, match=sentence):
        RKM(3, 4, **arguments)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"batched", "reference", "scan", "stepwise"}))
def test_a_backend_without_kernels_refuses_them(backend):
    rkm = RKM(3, 4, kernel="gaussian", backend=backend)
    with pytest.raises(RKMError, match=f"backend '{backend}' cannot run this: it has the linear kernel alone, not 'ga"):
        rkm(torch.randn(2, 1, 3))


def test_projections_without_feedback_take_kernels():
    rkm = randomized(RKM(3, 4, kernel="gaussian", proj_size=2, feedback=False, dtype=torch.float64))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    outputs = []
    for backend in ("batched", "reference"):
        rkm.backend = backend
        outputs.append(rkm(x)[0])
    assert outputs[0].shape == (5, 2, 2)
    torch.testing.assert_close(*outputs)


def test_an_lstm_is_linear():
    lstm = torch.nn.LSTM(3, 4)
    rkm = RKM(3, 4, cell="lstm", kernel="arccos")
    with pytest.raises(RKMError, match="through the kernel 'arccos'"):
        rkm.load_state_dict(lstm.state_dict())
    with pytest.raises(RKMError, match="only cell='lstm' with the linear kernel"):
        rkm.to_lstm()
