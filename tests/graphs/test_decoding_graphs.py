import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import DEVICES, assert_close, product_type, run_at_once
from torch import nn

from fairseq_rkm import RKM, RKMError
from fairseq_rkm.graphs import decoding_graphs
from fairseq_rkm.graphs.decoding_graphs import DecodingGraphs
from fairseq_rkm.graphs.recording import record
from fairseq_rkm.modules import RKMState, Stepper

AVAILABLE = DecodingGraphs.available


@pytest.fixture(autouse=True)
def _available(monkeypatch):
    """On a CPU too, where :func:`helpers.run_at_once` stands in."""
    monkeypatch.setattr(DecodingGraphs, "available", lambda self, _like: not self.refused)


def refuse(_run, _pool):
    raise RKMError("no")


class Decoder(nn.Module):
    """A step of one layer, without fairseq's or attention's part in it; ``steps`` counts those not replayed."""

    def __init__(self, device, stand_in=None, ngram=2):
        super().__init__()
        self.embedding = nn.Embedding(20, 5)
        self.rkm = RKM(5, 7, ngram=ngram)
        self.graphs = DecodingGraphs(stand_in or (record if device == "cuda" else run_at_once))
        self.steps = 0
        self.to(device).requires_grad_(False)

    def begin(self, replayed=True):
        self.steppers = [Stepper(self.rkm)]
        if replayed:
            self.steppers = self.graphs.hold(self.steppers, self.parameters())

    def step(self, tokens, order, hidden, memory, context):
        self.steps += 1
        hidden, memory, context = (x.index_select(0, order).transpose(0, 1) for x in (hidden, memory, context))
        output, state = self.steppers[0](self.embedding(tokens).unsqueeze(0), RKMState(hidden, memory, [context]))
        return output[0], *(x.transpose(0, 1) for x in state.tensors())

    def decode(self, sequence, replayed):
        """The outputs of a sequence of (tokens, order), from zeros."""
        self.begin(replayed)
        rows, like = len(sequence[0][0]), self.embedding.weight
        state = [like.new_zeros(rows, 1, 7), like.new_zeros(rows, 1, 7), like.new_zeros(rows, self.rkm.ngram - 1, 5)]
        outputs = []
        for tokens, order in sequence:
            inputs = [torch.tensor(x, device=like.device) for x in (tokens, order)]
            step = self.graphs if replayed else lambda function, given: function(*given)
            output, *state = step(self.step, [*inputs, *state])
            outputs.append(output)
        return outputs


# Beams that cross, a batch that shrinks, and one that grows again.
LONG = [([1, 2, 3, 4], [0, 1, 2, 3]), ([5, 6, 7, 8], [1, 1, 0, 3]), ([9, 1], [3, 0]), ([2, 2], [1, 0]), ([3], [1])]
SHORT = [([4, 5], [0, 1]), ([6, 7], [1, 0]), ([8, 9, 1], [1, 1, 0])]
WIDE = [([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]), ([1, 2, 3, 4, 5, 7], [5, 4, 3, 2, 1, 0]), ([4], [5])]


@pytest.mark.parametrize("device", DEVICES)
def test_replayed_steps_are_the_same_steps(device):
    decoder = Decoder(device)
    for sequence, recorded_rows in [(LONG, 4), (SHORT, 4), (WIDE, 6), (LONG, 6)]:
        wanted = decoder.decode(sequence, replayed=False)
        given = decoder.decode(sequence, replayed=True)
        for got, want in zip(given, wanted, strict=True):
            assert_close(got, want, dtype=product_type(torch.float32, device))
        assert [graph.rows for graph in decoder.graphs.recorded.values()] == [recorded_rows]
    decoder.decode([(list(range(8)), list(range(8)))], replayed=True)
    assert [graph.rows for graph in decoder.graphs.recorded.values()] == [6], "done once before it is recorded"
    decoder.steps = 0
    decoder.decode(LONG, replayed=True)
    assert decoder.steps == (0 if device == "cuda" else len(LONG)), "one graph serves what it has room for"


@pytest.mark.usefixtures("poisoned")
def test_rows_that_have_never_been_filled_are_harmless():
    """The batch is smaller when the graph is recorded than when its shapes were met."""
    decoder = Decoder("cpu")
    shrinking = [LONG[0], ([9, 1], [3, 0]), ([2, 2], [1, 0])]
    wanted = decoder.decode(shrinking, replayed=False)
    for got, want in zip(decoder.decode(shrinking, replayed=True), wanted, strict=True):
        assert_close(got, want)
    assert [graph.rows for graph in decoder.graphs.recorded.values()] == [4]


def test_what_a_step_gave_is_left_alone_by_the_next():
    """A graph leaves its outputs where it left the last ones."""
    at = {}

    def record_in_place(run, _pool):
        run()
        return lambda: at["output"].add_(1)

    def step(x):
        at["output"] = x + 1
        return (at["output"],)

    graphs = DecodingGraphs(record_in_place)
    outputs = [graphs(step, [torch.zeros(2, 3)])[0] for _ in range(3)]
    assert [output.unique().tolist() for output in outputs] == [[1], [2], [3]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", ["in place", "moved", "other type", "other place"])
def test_graphs_see_weights_that_have_changed(device, change):
    decoder = Decoder(device)
    decoder.decode(LONG, replayed=True)
    assert len(decoder.graphs.recorded) == 1
    if change == "in place":
        for weight in decoder.parameters():
            weight.mul_(-2)
    elif change == "moved":
        decoder.rkm.weight_ih_l0 = nn.Parameter(-decoder.rkm.weight_ih_l0, requires_grad=False)
    elif change == "other place":
        decoder.embedding.weight = nn.Parameter(-decoder.embedding.weight, requires_grad=False)
    else:
        decoder.double()
    decoder.begin()
    assert len(decoder.graphs.recorded) == (change == "in place")
    assert (decoder.graphs.recorder is not None) == (change == "in place"), "it is of a device"
    for got, want in zip(decoder.decode(LONG, True), decoder.decode(LONG, False), strict=True):
        assert_close(got, want, dtype=product_type(got.dtype, device))


def test_under_inference_mode_and_then_not():
    decoder = Decoder("cpu")
    for _ in range(2):
        with torch.inference_mode():
            inside = decoder.decode(LONG, replayed=True)
        outside = decoder.decode(LONG, replayed=True)
        for got, want in zip(inside, outside, strict=True):
            assert_close(got, want)


def test_the_graph_not_used_for_longest_goes(monkeypatch):
    monkeypatch.setattr(decoding_graphs, "MOST_GRAPHS", 2)
    graphs = DecodingGraphs(run_at_once)
    for width in (1, 1, 2, 2, 1, 3, 3):
        assert torch.equal(graphs(lambda x: (x + 1,), [torch.zeros(2, width)])[0], torch.ones(2, width))
    assert [kind[0][0] for kind in graphs.recorded] == [(1,), (3,)]


def test_steps_that_read_much_are_done_without(monkeypatch):
    monkeypatch.setattr(decoding_graphs, "MOST_ELEMENTS", 5)
    graphs = DecodingGraphs(run_at_once)
    for size in (5, 5, 6, 6):
        graphs(lambda x: (x + 1,), [torch.zeros(size)])
    assert [graph.rows for graph in graphs.recorded.values()] == [5]


def test_where_a_step_cannot_be_recorded_decoding_goes_on_without(caplog):
    decoder = Decoder("cpu", refuse)
    with caplog.at_level(logging.WARNING):
        given = decoder.decode(LONG, replayed=True)
    assert [record.message for record in caplog.records] == ["no: decoding goes on without"]
    assert decoder.graphs.refused
    for got, want in zip(given, decoder.decode(LONG, replayed=False), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_threads_may_decode_with_one_model(device):
    decoder = Decoder(device)
    decoder.decode(LONG, replayed=True)
    sequences = [[(list(range(k, k + 4)), [0, 1, 2, 3])] * 40 for k in range(8)]
    wanted = [decoder.decode(sequence, replayed=False) for sequence in sequences]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda sequence: decoder.decode(sequence, replayed=True), sequences * 4))
    for outputs, rights in zip(given, wanted * 4, strict=True):
        assert_close(outputs[-1], rights[-1], dtype=product_type(torch.float32, device))


def test_a_copy_has_no_graphs():
    decoder = Decoder("cpu")
    decoder.decode(LONG, replayed=True)
    twin = copy.deepcopy(decoder)
    assert decoder.graphs.recorded
    assert not twin.graphs.recorded
    for got, want in zip(twin.decode(LONG, True), decoder.decode(LONG, False), strict=True):
        assert_close(got, want)


def test_where_steps_are_replayed(monkeypatch):
    monkeypatch.setattr(DecodingGraphs, "available", AVAILABLE)
    graphs = DecodingGraphs()
    assert not graphs.available(torch.zeros(1))
    steppers = [Stepper(RKM(5, 7))]
    assert graphs.hold(steppers, []) is steppers
    assert not graphs.steppers, "on a CPU nothing is kept"
    for _ in range(3):
        graphs(lambda x: (x + 1,), [torch.zeros(2)])
    assert not graphs.recorded.met
    tensor = type("OnGPU", (), {"is_cuda": True})()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs.available(tensor)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: True)
    assert not graphs.available(tensor)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not graphs.available(tensor)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graphs.refused = True
    assert not graphs.available(tensor)
