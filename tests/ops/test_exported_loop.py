"""Programs of ``torch.export`` and ``torch.jit.trace`` hold one loop, and run at other lengths and batches."""

import io

import pytest
import torch
from exported_networks import (
    EPISODES,
    HALF,
    SIZES,
    VARIANTS,
    Episodes,
    Whole,
    assert_same,
    no_warnings_but_of_torchscript_s_end,
)
from helpers import assert_close, randomized
from torch.export import Dim

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops import exported_loop

BOTH = [{"cell": cell, "feedback": feedback} for cell in CELLS for feedback in (None, False)]


def network(masked=False, dtype=torch.float64, **arguments):
    return Whole(randomized(RKM(3, 4, dtype=dtype, **arguments)), masked).eval()


def exported(net, steps=5, batch=2, **options):
    sizes = {"time": Dim.DYNAMIC, "batch": Dim.DYNAMIC}
    shapes = [{axis: sizes[name] for axis, name in axes.items()} for axes in net.axes()]
    shapes = (*shapes[:3], tuple(shapes[3:])) if shapes[3:] else tuple(shapes)
    return torch.export.export(net, net.inputs(steps, batch), dynamic_shapes=shapes, **options)


def scans(program):
    return [node for node in program.graph.nodes if node.target is torch.ops.higher_order.scan]


@pytest.mark.parametrize(("arguments", "masked"), HALF)
def test_an_exported_program_has_a_loop_a_layer_and_direction_and_runs_at_any_size(arguments, masked):
    net = network(masked, **arguments)
    program = exported(net)
    assert len(scans(program)) == net.rkm.num_layers * (1 + net.rkm.bidirectional)
    for steps, batch in SIZES:
        assert_same(program.module(), net, net.inputs(steps, batch))


def test_a_program_s_size_does_not_depend_on_the_example_s():
    net = network(ngram=2)
    counts = {steps: len(exported(net, steps).graph.nodes) for steps in (4, 40)}
    assert counts[4] == counts[40]


def test_a_program_holds_pytorch_s_own_operators_alone():
    for node in exported(network(masked=True, layer_norm=True, ngram=2)).graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "aten", node.target


def test_strict_export_records_the_loop_too():
    net = network(masked=True, ngram=2)
    program = exported(net, strict=True)
    assert len(scans(program)) == 1
    assert_same(program.module(), net, net.inputs(7, 3))


def test_a_program_survives_saving():
    net = network(layer_norm=True)
    file = io.BytesIO()
    torch.export.save(exported(net), file)
    file.seek(0)
    assert_same(torch.export.load(file).module(), net, net.inputs(7, 3))


def test_a_whole_rkm_is_exported_with_its_state():
    rkm = randomized(RKM(3, 4, ngram=2, num_layers=2)).eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(rkm, (torch.randn(5, 2, 3),), dynamic_shapes=({0: Dim.DYNAMIC},)), file)
    file.seek(0)
    x = torch.randn(9, 2, 3)
    output, state = torch.export.load(file).module()(x)
    wanted, final = rkm(x)
    assert_close(output, wanted)
    for one, other in zip(state.tensors(), final.tensors(), strict=True):
        assert_close(one, other)


def test_an_exported_program_can_be_trained():
    net = network()
    program, inputs = exported(net).module(), net.inputs(7, 3)
    program(*inputs)[0].sum().backward()
    net(*inputs)[0].sum().backward()
    for name, parameter in net.named_parameters():
        assert_close(program.get_parameter(name).grad, parameter.grad, name)


def test_a_backend_asked_for_by_name_is_obeyed_or_refused():
    net = network(backend="reference")
    program = torch.export.export(net, net.inputs(5, 2))
    assert not scans(program)
    assert_same(program.module(), net, net.inputs(5, 2))
    traced = torch.jit.trace(net, net.inputs(5, 2))
    assert_same(traced, net, net.inputs(5, 3))
    with pytest.raises(RuntimeError, match=r"Expected \d elements in a list but found \d"):
        traced(*net.inputs(6, 2))
    net = network(backend="batched")
    with pytest.raises(RKMError, match=r"cannot run this: torch\.jit\.trace"):
        torch.jit.trace(net, net.inputs(5, 2))


@pytest.mark.parametrize("arguments", BOTH, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trace_is_the_cell_at_any_size(arguments, masked, dtype):
    if arguments["feedback"] is None or CELLS[arguments["cell"]].has_feedback:
        net = network(masked, dtype, **arguments)
        traced = torch.jit.trace(net, net.inputs(5, 2))
        for steps, batch in SIZES:
            assert_same(traced, net, net.inputs(steps, batch))


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_trace_is_quiet_and_can_be_saved_and_loaded(arguments, masked):
    net = network(masked, **arguments)
    with no_warnings_but_of_torchscript_s_end():
        traced = torch.jit.trace(net, net.inputs(5, 2))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for steps, batch in [*SIZES, (0, 2)]:
        assert_same(loaded, net, net.inputs(steps, batch))


@pytest.mark.parametrize("arguments", EPISODES)
def test_resets_and_memories_are_recorded(arguments):
    net = Episodes(randomized(RKM(3, 4, dtype=torch.float64, **arguments))).eval()
    with no_warnings_but_of_torchscript_s_end():
        traced = torch.jit.trace(net, net.inputs(1, 2))
    shapes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    program = torch.export.export(net, net.inputs(5, 2), dynamic_shapes=(shapes, shapes, shapes))
    for steps, batch in SIZES:
        assert_same(traced, net, net.inputs(steps, batch))
        assert_same(program.module(), net, net.inputs(steps, batch))


def test_a_trace_reads_weights_that_are_changed_later_and_can_be_trained():
    net = network(layer_norm=True)
    traced, inputs = torch.jit.trace(net, net.inputs(5, 2)), net.inputs(7, 3)
    net.rkm.weight_hh_l0.data.mul_(0.5)
    assert_same(traced, net, inputs)
    traced(*inputs)[0].sum().backward()
    given = net.rkm.weight_hh_l0.grad.clone()
    net.zero_grad()
    net(*inputs)[0].sum().backward()
    assert_close(given, net.rkm.weight_hh_l0.grad)


def test_half_precision_keeps_its_memory_in_float32():
    net = network(dtype=torch.float32, layer_norm=True).bfloat16()
    x, hidden, cell = net.inputs(5, 2)
    traced = torch.jit.trace(net, (x, hidden, cell.float()), check_trace=False)  # its tolerance is for float32
    program = torch.export.export(net, (x, hidden, cell.float()))
    wanted = net(x, hidden, cell.float())
    for results in (traced(x, hidden, cell.float()), program.module()(x, hidden, cell.float())):
        for given, other in zip(results, wanted, strict=True):
            assert given.dtype == other.dtype
            assert_close(given, other, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="before 2.13 AOTInductor fails on scans of dynamic sizes")
def test_aot_inductor_compiles_the_loop(tmp_path):
    net = network(masked=True, ngram=2, num_layers=2)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(exported(net), package_path=str(tmp_path / "rkm.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for steps, batch in SIZES:
        assert_same(compiled, net, net.inputs(steps, batch))


KERNELS = [
    {"kernel": "polynomial", "cell": "rkm_cifg"},
    {"kernel": "gaussian", "ngram": 2, "layer_norm": True},
    {"kernel": "arccos", "cell": "ran", "learn_kernel": False},
    {"kernel": "arccos", "kernel_degree": 0, "cell": "lstm"},
]


@pytest.mark.parametrize("arguments", KERNELS, ids=str)
def test_candidates_through_a_kernel_are_recorded(arguments):
    net = network(masked=True, **arguments)
    program = exported(net)
    assert len(scans(program)) == 1
    traced = torch.jit.trace(net, net.inputs(5, 2))
    for steps, batch in SIZES:
        assert_same(program.module(), net, net.inputs(steps, batch))
        assert_same(traced, net, net.inputs(steps, batch))


def test_resets_and_memories_through_a_kernel_are_recorded():
    net = Episodes(randomized(RKM(3, 4, kernel="gaussian", ngram=2, dtype=torch.float64))).eval()
    traced = torch.jit.trace(net, net.inputs(5, 2))
    for steps, batch in SIZES:
        assert_same(traced, net, net.inputs(steps, batch))


def test_an_export_by_a_pytorch_without_a_loop_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(exported_loop, "TELLS_EXPORTS", False)
    with pytest.raises(RKMError, match=r"needs PyTorch 2\.7 or newer"):
        exported(network())
