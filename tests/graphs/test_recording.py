import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.graphs.recording import GraphRecorder, Recordings, copy_all, record, refuse


def test_copies_keep_the_types_of_their_targets():
    targets = [torch.zeros(2, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.int64)]
    copy_all(targets, [torch.ones(2, dtype=torch.int32), torch.full((2,), 0.5), torch.tensor([2, 3])])
    assert [target.tolist() for target in targets] == [[1, 1], [0.5, 0.5], [2, 3]]
    assert [target.dtype for target in targets] == [torch.int64, torch.float32, torch.int64]


def test_copies_of_what_is_not_contiguous():
    wide, tall = torch.zeros(3, 4), torch.zeros(4, 3)
    targets = [wide[:2], tall.t()[:2], torch.zeros(0, 2)]
    copy_all(targets, [torch.ones(4, 2).t(), torch.full((2, 4), 2.0), torch.zeros(0, 2)])
    assert wide.tolist() == [[1] * 4] * 2 + [[0] * 4]
    assert tall.tolist() == [[2, 2, 0]] * 4


@pytest.mark.parametrize("free", [5, 50])
@pytest.mark.parametrize("fails", [False, True])
def test_recording_gives_memory_back_only_where_little_is_left(monkeypatch, free, fails):
    done = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            done.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            done.append("end")

        def replay(self):
            done.append("replay")

    def run():
        done.append("run")
        if fails:
            raise RuntimeError("no\nand why")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 20)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    expected = [*(["empty"] if free == 5 else []), ("begin", "pool", "thread_local"), "run", "end"]
    if fails:
        with pytest.raises(RKMError, match=r"a CUDA graph could not be recorded \(no\)$"):
            record(run, "pool")
        assert done == expected
    else:
        record(run, "pool")()
        assert done == [*expected, "replay"]


@pytest.mark.gpu
def test_a_replay_comes_after_what_was_before_and_before_what_comes_after():
    recorder = GraphRecorder(torch.device("cuda", torch.cuda.current_device()))
    x, y = torch.zeros(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")

    def run():
        for _ in range(20):
            y.copy_(x).add_(1)

    with recorder.own_stream():
        run()
        replay = recorder.record(run)
    for value in range(5):
        x.fill_(value)
        with recorder.own_stream():
            replay()
        assert y.sub(value + 1).abs().max() == 0


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_said():
    code = (
        "import torch; from fairseq_rkm.graphs.recording import record\n"
        "with torch.cuda.stream(torch.cuda.Stream()): record(lambda: torch.ones(3, device='cuda').sum().item(), None)"
    )
    # In a process of its own, in which PyTorch draws no random numbers any more afterwards.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "a CUDA graph could not be recorded" in result.stderr.splitlines()[-1]


def test_a_recording_that_fails_ends_with_the_remedy():
    def fail(_run, _pool):
        raise RKMError("no graph")

    with pytest.raises(RKMError, match=r"^no graph: use the other$"):
        GraphRecorder(torch.device("cpu"), fail, "use the other").record(lambda: None)
    with pytest.raises(RKMError, match=r"^no graph$"):
        GraphRecorder(torch.device("cpu"), fail).record(lambda: None)


def test_the_first_reason_that_applies_is_told():
    refuse("--graphs", {"need a GPU": False})
    with pytest.raises(RKMError, match=r"^--graphs are not for this$"):
        refuse("--graphs", {"need a GPU": False, "are not for this": True, "nor for that": True})


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=40), st.integers(1, 4), st.booleans())
def test_a_key_is_recorded_when_it_is_met_again(meetings, most, replace):
    recordings, met = Recordings(most, replace), {}
    for key, rows in meetings:
        before = dict(zip(recordings, recordings.values(), strict=True))
        found = recordings.find(key, lambda rows=rows: rows, rows)
        if key in before and before[key] >= rows:
            assert found == before[key], "what is recorded serves fewer rows"
        elif met.get(key, -1) < rows:
            assert found is None, "met for the first time"
            met[key] = rows
        elif key in before or replace or len(before) < most:
            assert found == rows
            assert list(recordings)[-1] == key
            assert replace or set(before) <= set(recordings)
        else:
            assert found is None, "there are enough"
        assert len(recordings) <= most
