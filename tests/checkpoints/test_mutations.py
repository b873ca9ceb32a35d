"""A checkpoint with a flipped bit, a changed byte or a cut is refused in a sentence, or is what it was."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKMError, checkpoints


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_flipped_bit_or_a_cut(state, tmp_path, where, bit, cut):
    path = tmp_path / "whole.pt"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    content[at] ^= 1 << bit
    path.write_bytes(content[:at] if cut else content)
    try:
        read = checkpoints.load(path)
    except RKMError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert not cut
    for name, wanted in state["model"].items():
        assert torch.equal(read["model"][name], wanted)
    for name in ("cfg", "extra_state", "optimizer_history"):
        assert read[name] == state[name]


def test_a_tensor_marked_as_a_folder_is_not_left_unread(state, load, tmp_path):
    path = tmp_path / "whole.pt"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"whole/data/3") - 8] |= 0x10  # the low byte of its external attributes
    path.write_bytes(content)
    with pytest.raises(RKMError, match="whole/data/3 is marked as a folder"):
        load(path=path)


SETTINGS = st.sampled_from(
    [None, True, -1, 0, 2, 10**9, 1.5, float("nan"), "", "x", "${x}", "???", [], {}, [1], {"_name": 1}]
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_name_or_a_value_that_is_another(state, load, data):
    changed = copy.deepcopy(state)
    part = data.draw(st.sampled_from([changed, changed["cfg"], changed["cfg"]["model"], changed["cfg"]["task"]]))
    name = data.draw(st.sampled_from(sorted(part)))
    value = part.pop(name)
    part[data.draw(st.sampled_from([name, name[:-1] + "~"]))] = data.draw(st.sampled_from([value]) | SETTINGS)
    try:
        load(changed)
    except RKMError as error:
        assert "checkpoint" in str(error)  # noqa: PT017
    except OSError:
        assert name == "data"


@pytest.mark.parametrize("size", [0, 3, 10, 1000])
def test_a_cut_file(state, load, tmp_path, size):
    path = tmp_path / "cut.pt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RKMError, match=r"cannot read .*cut.pt"):
        load(path=path)
