"""Streams side by side, by what they ask of CUDA: no GPU needed."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fairseq_rkm.ops import side_streams
from fairseq_rkm.ops.side_streams import Lanes

LOG = []


class Stream:
    """A stream that writes down what it is asked; PyTorch hands out few, and some of them twice."""

    made = 0
    device_index = 0

    def __init__(self, device):
        self.device, self.cuda_stream = device, Stream.made // 2
        Stream.made += 1

    def record_event(self):
        event = f"event {len(LOG)}"
        LOG.append((self.cuda_stream, "records", event))
        return event

    def wait_event(self, event):
        LOG.append((self.cuda_stream, "waits for", event))

    def wait_stream(self, other):
        LOG.append((self.cuda_stream, "waits for", other.cuda_stream))


@pytest.fixture
def now(monkeypatch):
    """The current stream, as an attribute."""
    Stream.made = 0
    LOG.clear()
    current = SimpleNamespace(stream=Stream("cuda:0"))
    monkeypatch.setattr(side_streams, "_STREAMS", {})
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(current, "stream", stream))
    return current


def test_lanes_are_different_streams_between_work_before_and_work_behind(now):
    def work(name):
        LOG.append((now.stream.cuda_stream, "runs", name))

    with Lanes("cuda:0", 3) as lanes:
        first = lanes.run(0, lambda: work("first"))
        lanes.run(2, lambda: work("second"), first)
        lanes.run(2, lambda: work("third"))
        lanes.run(1, lambda: work("fourth"), first)
    assert LOG == [
        (0, "records", "event 0"),
        (1, "waits for", "event 0"),
        (2, "waits for", "event 0"),
        (0, "runs", "first"),
        (0, "records", "event 4"),
        (2, "waits for", "event 4"),
        (2, "runs", "second"),
        (2, "records", "event 7"),
        (2, "runs", "third"),
        (2, "records", "event 9"),
        (1, "waits for", "event 4"),
        (1, "runs", "fourth"),
        (1, "records", "event 12"),
        (0, "waits for", 1),
        (0, "waits for", 2),
    ]
    assert now.stream.cuda_stream == 0


def test_an_error_leaves_the_current_stream_as_it_was(now):
    with pytest.raises(ZeroDivisionError), Lanes("cuda:0", 2) as lanes:
        lanes.run(1, lambda: 1 / 0)
    assert now.stream.cuda_stream == 0
    assert LOG[-1] == (0, "waits for", 1)


def test_a_stream_has_the_same_side_streams_at_each_call(now):
    for count in (3, 2, 4):
        with Lanes("cuda:0", count) as lanes:
            assert [stream.cuda_stream for stream in lanes._streams] == list(range(count))
