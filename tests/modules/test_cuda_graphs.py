import subprocess
import sys

import pytest
import torch

from fairseq_rkm.modules.cuda_graphs import GraphRecorder, copy_all


def test_copies_keep_the_types_of_their_targets():
    targets = [torch.zeros(2, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.int64)]
    copy_all(targets, [torch.ones(2, dtype=torch.int32), torch.full((2,), 0.5), torch.tensor([2, 3])])
    assert [target.tolist() for target in targets] == [[1, 1], [0.5, 0.5], [2, 3]]
    assert [target.dtype for target in targets] == [torch.int64, torch.float32, torch.int64]


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
