"""Programs in ONNX of both exporters, run by onnxruntime at other lengths and batches than the example's."""

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
from helpers import randomized
from torch.export import Dim

from fairseq_rkm import CELLS, RKM

onnx = pytest.importorskip("onnx", reason="needs onnx (pip install '.[onnx]')")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install '.[onnx]')")
pytest.importorskip("onnxscript", reason="needs onnxscript (pip install '.[onnx]')")

pytestmark = pytest.mark.filterwarnings("ignore")
EXPORTERS = ["torch.jit.trace", "torch.export"]
PROBLEMS = [("torch.jit.trace", arguments, masked) for arguments in VARIANTS for masked in (False, True)]
PROBLEMS += [
    pytest.param("torch.export", arguments, masked, marks=pytest.mark.slow if "bidirectional" in arguments else ())
    for arguments, masked in HALF
]


def network(masked=False, **arguments):
    return Whole(randomized(RKM(3, 4, **arguments)), masked).eval()


def export(net, exporter, path, steps=5, batch=2):
    """The program's operators, with those of a loop's body."""
    if exporter == "torch.export":
        sizes = {"time": Dim("time"), "batch": Dim("batch")}
        shapes = [{axis: sizes[name] for axis, name in axes.items()} for axes in net.axes()]
        shapes = (*shapes[:3], tuple(shapes[3:])) if shapes[3:] else tuple(shapes)
        options = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False}
    else:
        options = {"dynamo": False, "dynamic_axes": dict(zip(net.names(), net.axes(), strict=True))}
    torch.onnx.export(net, net.inputs(steps, batch), path, input_names=net.names(), **options)
    return [node.op_type for node in onnx.load(path).graph.node]


def loaded(path):
    """The program as a function of tensors; onnxruntime alone runs it."""
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]

    def run(*inputs):
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


@pytest.mark.parametrize(("exporter", "arguments", "masked"), PROBLEMS)
def test_onnx_runs_at_any_size(exporter, arguments, masked, tmp_path):
    net, path = network(masked, **arguments), str(tmp_path / "rkm.onnx")
    operators = export(net, exporter, path)
    loops = sum(operators.count(name) for name in ("Loop", "Scan", "LSTM"))
    assert loops == net.rkm.num_layers * (1 + net.rkm.bidirectional)
    for steps, batch in SIZES:
        assert_same(loaded(path), net, net.inputs(steps, batch))


KERNELS = [
    ("polynomial", "rkm_lstm", "torch.jit.trace"),
    ("arccos", "lstm", "torch.jit.trace"),
    ("gaussian", "rkm_cifg", "torch.export"),
]


@pytest.mark.parametrize(("kernel", "cell", "exporter"), KERNELS)
def test_a_kernel_is_itself_in_onnx(kernel, cell, exporter, tmp_path):
    net, path = network(kernel=kernel, cell=cell), str(tmp_path / "rkm.onnx")
    assert "LSTM" not in export(net, exporter, path)
    for steps, batch in SIZES:
        assert_same(loaded(path), net, net.inputs(steps, batch))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("feedback", [None, False])
def test_every_cell_is_itself_in_onnx(cell, feedback, tmp_path):
    net, path = network(masked=True, cell=cell, feedback=feedback), str(tmp_path / "rkm.onnx")
    export(net, "torch.jit.trace", path)
    for steps, batch in SIZES:
        assert_same(loaded(path), net, net.inputs(steps, batch))


@pytest.mark.parametrize("arguments", EPISODES)
def test_resets_and_memories_come_along(arguments, tmp_path):
    net, path = Episodes(randomized(RKM(3, 4, **arguments))).eval(), str(tmp_path / "rkm.onnx")
    axes = {"x": {0: "time", 1: "batch"}, "mask": {0: "batch", 1: "time"}, "reset": {0: "batch", 1: "time"}}
    torch.onnx.export(net, net.inputs(5, 2), path, dynamo=False, input_names=list(axes), dynamic_axes=axes)
    for steps, batch in SIZES:
        assert_same(loaded(path), net, net.inputs(steps, batch))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({}, True),
        ({"bias": False, "ngram": 3, "num_layers": 2, "bidirectional": True}, True),
        ({"memory_clip": 1.0}, False),
        ({"layer_norm": True}, False),
        ({"feedback": False}, False),
    ],
)
def test_an_lstm_is_onnx_s_own_where_it_fits(exporter, arguments, fits, tmp_path):
    net, path = network(cell="lstm", **arguments), str(tmp_path / "rkm.onnx")
    operators = export(net, exporter, path)
    count = net.rkm.num_layers * (1 + net.rkm.bidirectional)
    assert operators.count("LSTM") == count * fits
    assert operators.count("Loop") + operators.count("Scan") == count * (not fits)
    for steps, batch in SIZES:
        assert_same(loaded(path), net, net.inputs(steps, batch))


def test_the_older_exporter_s_program_does_not_grow_with_the_example(tmp_path):
    net = network(masked=True, ngram=2)
    counts = {steps: len(export(net, "torch.jit.trace", str(tmp_path / "rkm.onnx"), steps)) for steps in (3, 30)}
    assert counts[3] == counts[30]


def test_a_program_exported_before_becomes_onnx(tmp_path):
    net, path = network(masked=True, cell="lstm"), str(tmp_path / "rkm.onnx")
    sizes = {"time": Dim("time"), "batch": Dim("batch")}
    shapes = [{axis: sizes[name] for axis, name in axes.items()} for axes in net.axes()]
    program = torch.export.export(net, net.inputs(5, 2), dynamic_shapes=(*shapes[:3], tuple(shapes[3:])))
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    for steps, batch in SIZES:
        assert_same(loaded(path), net, net.inputs(steps, batch))


def test_the_older_exporter_warns_of_its_end_alone(tmp_path):
    net, path = network(masked=True, ngram=2), str(tmp_path / "rkm.onnx")
    with no_warnings_but_of_torchscript_s_end():
        export(net, "torch.jit.trace", path)
