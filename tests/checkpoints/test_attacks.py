"""What was tried on a checkpoint, with its outcome."""

import argparse
import collections
import copy
import io
import os
import pickle
import re
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

from fairseq_rkm import RKMError


def weight(change):
    """A change to the largest weight."""

    def changed(state, _):
        name = max(state["model"], key=lambda name: state["model"][name].numel())
        state["model"][name] = change(state["model"][name])

    return changed


def model(value):
    return lambda state, _: state.update(model=value)


def setting(part, name, value):
    return lambda state, _: state["cfg"][part].__setitem__(name, value)


def extra(value):
    return lambda state, _: state["extra_state"].__setitem__("gift", value)


def nested(levels):
    value: Any = ["x"] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


def circle():
    value: list = []
    value.append(value)
    return value


class ForgedArray:
    """An array of Python objects over chosen bytes: numpy would take them for pointers."""

    def __init__(self, dtype="O", data=b"A" * 16, shape=(2,)):
        self.state = (1, shape, np.dtype(dtype), False, data)

    def __reduce__(self):
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


class ForgedType:
    """An array whose dtype takes its fields from the file."""

    def __reduce__(self):
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("i8"), 0)}, 8, 1, 0)


class Call:
    """A call of a function that PyTorch's own reader allows or not."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def to_args(**flags):
    """The configuration as fairseq wrote it before it had one."""

    def changed(state, folder):
        base = {"arch": "rkm_lm", "task": "language_modeling", "data": str(folder), "tokens_per_sample": 8}
        state["args"] = argparse.Namespace(**{**base, **state["cfg"]["model"], **flags})
        state["cfg"] = None

    return changed


REFUSED = {
    "code": (extra(Call(os.system, "true")), r"refused .*the class posix.system"),
    "a function of Python's": (extra(Call(eval, "1")), r"refused .*the class builtins.eval"),
    "a buffer without end": (extra(Call(bytearray, 10**15)), r"refused .*the class builtins.bytearray"),
    "a tensor made in memory": (extra(Call(torch.FloatTensor, 10**12)), r"refused .*the class torch.FloatTensor"),
    "an array of objects": (extra(ForgedArray()), "an array of 'O8', where numbers belong"),
    "an array of objects in the configuration": (setting("model", "x", ForgedArray()), "an array of 'O8'"),
    "an array of records": (extra(ForgedType()), "an array of 'V8', where numbers belong"),
    "an array larger than its bytes": (extra(ForgedArray("i8", b"A" * 16, (10**9,))), "claims the shape"),
    "containers that expand": (setting("model", "x", nested(20)), "written out, more than"),
    "containers that expand outside the configuration": (extra(nested(20)), "written out, more than"),
    "a container in itself": (extra(circle()), "contain themselves"),
    "an interpolation in model": (setting("model", "cell", "${oc.env:HOME}"), r"its setting cfg.model.cell is"),
    "an interpolation in task": (setting("task", "data", "${oc.env:HOME}"), r"its setting cfg.task.data is"),
    "an interpolation in args": (to_args(cell="${oc.env:HOME}"), r"its setting args.cell is"),
    "an interpolation in a namespace": (
        lambda state, _: state["cfg"].update(model=argparse.Namespace(_name="rkm_lm", cell="${oc.env:HOME}")),
        "its setting cfg.model.cell is",
    ),
    "a tensor in the configuration": (setting("model", "x", torch.zeros(2)), "cfg.model.x is a Tensor"),
    "a hidden size of 10^9": (setting("model", "decoder_hidden_size", 10**9), "asks for a model of|would take"),
    "20,000 units": (setting("model", "decoder_hidden_size", 20_000), "asks for a model of"),
    "10^9 layers": (setting("model", "decoder_layers", 10**9), "asks for a model of|would take"),
    "an n-gram of 10^9": (setting("model", "ngram", 10**9), "--ngram takes a whole number from 1 to 10,000"),
    "a hidden size of 10^9 in args": (to_args(decoder_hidden_size=10**9), "asks for a model of|would take"),
    "no model": (lambda state, _: state.pop("model"), "it has no model"),
    "a model that is a list": (model([torch.zeros(2)]), "a model that is a list"),
    "an empty model": (model({}), "a model that is empty"),
    "a sparse weight": (weight(lambda tensor: tensor.to_sparse()), "not a plain one"),
    "a weight on meta": (weight(lambda tensor: tensor.to("meta")), "not a plain one"),
    "a weight of int8": (weight(lambda tensor: tensor.to(torch.int8)), "is of int8, the model's of float32"),
    "a complex weight": (weight(lambda tensor: tensor.to(torch.complex64)), "is of complex64, the model's of float32"),
    "a weight of NaN": (weight(lambda tensor: tensor * torch.nan), "are NaN or infinite"),
    "an infinite weight": (weight(lambda tensor: tensor / 0), "are NaN or infinite"),
    "a weight that is a list": (weight(lambda tensor: tensor.tolist()), "is a list, not a tensor"),
    "a weight of one row": (weight(lambda tensor: tensor[:1].clone()), "are not this model's: size mismatch"),
    "a weight of one number": (weight(lambda tensor: tensor.flatten()[0].clone()), "are not this model's"),
    "an expanded weight": (weight(lambda tensor: tensor.flatten()[:1].clone().expand(tensor.shape)), "claims .* bytes"),
    "an expanded tensor": (extra(torch.zeros(1).expand(10**6, 10**6)), "claims .* bytes"),
    "a weight's other name": (lambda state, _: state["model"].update(other=torch.zeros(2)), "Unexpected key"),
    "a list": (None, "holds a list"),
    "neither cfg nor args": (lambda state, _: state.pop("cfg"), "neither cfg nor args"),
    "an unknown model": (setting("model", "_name", "gru"), "cannot use"),
    "an unknown task": (setting("task", "_name", "gru"), "cannot use"),
    "no task": (lambda state, _: state["cfg"].pop("task"), "cannot use"),
    "no history": (lambda state, _: state.pop("optimizer_history"), "damaged, or was not written"),
}
"""Changes to a checkpoint, and the sentence that each gets."""


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "stream"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence_that_names_the_file(state, load, tmp_path, case, legacy):
    change, message = REFUSED[case]
    if change is None:
        state = [1, 2]
    else:
        change(state, tmp_path)
    with pytest.raises(RKMError, match=f"(?s){message}") as told:
        load(state, _use_new_zipfile_serialization=not legacy)
    assert str(tmp_path / "checkpoint.pt") in str(told.value)


ACCEPTED = {
    "as it is": extra(None),
    "args in place of cfg": to_args(),
    "bfloat16": weight(lambda tensor: tensor.bfloat16()),
    "float64": weight(lambda tensor: tensor.double()),
    "arrays of counts": extra({"counts": np.array([3, 1, 0, 0]), "sums": [np.ones((2, 3), order="F")]}),
    "a number of numpy's": extra({"loss": np.float64(2.5)}),
    "a namespace": extra(argparse.Namespace(lr=[1])),
    "dictionaries": extra([collections.OrderedDict(a=1), collections.defaultdict(list)]),
    "shared and sliced tensors": lambda state, _: state["extra_state"].update(
        zip("ab", [torch.arange(9.0)[2:5]] * 2, strict=True)
    ),
    "a large integer and text": extra([2**62, -(2**62), "é" * 300, b"bytes", (1, 2.5, None, True), {"s"}]),
    "a parameter": weight(torch.nn.Parameter),
    "an empty tensor": extra(torch.zeros(0, 3)),
}
"""Changes after which a checkpoint loads."""


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "stream"])
@pytest.mark.parametrize("case", ACCEPTED)
def test_loaded(state, load, tmp_path, case, legacy):
    weights = copy.deepcopy(state["model"])
    ACCEPTED[case](state, tmp_path)
    loaded = load(state, _use_new_zipfile_serialization=not legacy).model.state_dict()
    for name, wanted in weights.items():
        torch.testing.assert_close(loaded[name], wanted, rtol=1e-2, atol=1e-2)


def rewritten(path, change):
    """An archive of PyTorch's with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def test_a_storage_that_claims_more_than_its_member_holds(state, load, tmp_path):
    state["extra_state"]["gift"] = torch.arange(77.0)
    torch.save(state, tmp_path / "checkpoint.pt")
    rewritten(tmp_path / "checkpoint.pt", lambda content: content.replace(b"K\x4d", b"K\xff"))
    with pytest.raises(RKMError, match="claims 1020 bytes, and the file has 308 for it"):
        load()


def test_an_archive_that_unpacks_to_much_more(state, load, tmp_path):
    path = tmp_path / "checkpoint.pt"
    state["extra_state"]["gift"] = torch.zeros(1 << 20)
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(RKMError, match=r"its \d+ bytes unpack to \d+"):
        load()


def test_a_stream_that_claims_more_than_it_holds(load, tmp_path):
    file = io.BytesIO()
    torch.save({"gift": torch.arange(77.0)}, file, _use_new_zipfile_serialization=False)
    (tmp_path / "checkpoint.pt").write_bytes(file.getvalue().replace(b"K\x4d", b"J\x00\x00\x00\x40"))
    with pytest.raises(RKMError, match="its tensors claim 4294967296 bytes"):
        load()


def test_operations_that_pytorch_never_writes(load, tmp_path):
    for protocol in (0, 4):
        (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps({"model": {}}, protocol))
        with pytest.raises(RKMError, match=r"its pickle has the operation|not a checkpoint"):
            load()


def test_nothing_of_a_forged_array_is_numpy_s(state, load):
    """The sentence comes from the stand-in: numpy's own reader, which crashes, is not reached."""
    state["extra_state"]["gift"] = ForgedArray()
    with pytest.raises(RKMError) as told:
        load(state)
    assert re.search("where numbers belong", str(told.value))
