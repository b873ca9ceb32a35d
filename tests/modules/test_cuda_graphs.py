import subprocess
import sys

import pytest
import torch

from fairseq_rkm import RKMError
from fairseq_rkm.modules.cuda_graphs import GraphRecorder, copy_all, record


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
        with pytest.raises(RKMError, match=r"could not be recorded \(no\): train without --cuda-graphs$"):
            record(run, "pool")
        assert done == expected
    else:
        record(run, "pool")()
        assert done == [*expected, "replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_cannot_be_recorded_is_said():
    code = (
        "import torch; from fairseq_rkm.modules.cuda_graphs import record\n"
        "with torch.cuda.stream(torch.cuda.Stream()): record(lambda: torch.ones(3, device='cuda').sum().item(), None)"
    )
    # In a process of its own, in which PyTorch draws no random numbers any more afterwards.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "could not be recorded" in result.stderr.splitlines()[-1]
    assert "train without --cuda-graphs" in result.stderr.splitlines()[-1]
