"""The short way through a few steps: it gives what the long way gives, and leaves all else to it."""

import itertools
import threading

import pytest
import torch
from helpers import DEVICES, assert_close, product_type, randomized, watch_short_way
from torch import nn
from torch.nn.utils import parametrizations

from fairseq_rkm import CELLS, RKM, RKMError, RKMState
from fairseq_rkm.modules import rkm as module
from fairseq_rkm.modules import short_calls
from fairseq_rkm.ops import few_steps
from fairseq_rkm.ops.backends.native import native
from modules.test_plain_calls import FOLLOWERS

in_c = native._missing(CELLS["rkm_lstm"]) is None
compiled = pytest.mark.skipif(not in_c, reason="needs a C compiler")


@pytest.fixture
def ways(monkeypatch):
    """Which way each call has gone."""
    return watch_short_way(monkeypatch, "take_steps")


def both(rkm, x, state, monkeypatch):
    """Outputs and states by both ways."""
    with torch.no_grad():
        given = rkm(x, state)
        with monkeypatch.context() as patch:
            patch.setattr(module, "take_steps", lambda *_: None)
            return given, rkm(x, state)


def assert_the_same(rkm, x, state, monkeypatch):
    given, wanted = both(rkm, x, state, monkeypatch)
    assert type(given[1]) is RKMState
    for name, a, b in zip(("output", "h", "c"), (given[0], *given[1]), (wanted[0], *wanted[1]), strict=True):
        assert a.dtype == b.dtype
        kind = "tf32" if x.is_cuda and x.dtype == torch.float32 else x.dtype
        assert_close(a, b, name, product_type(kind, x.device.type) if isinstance(kind, torch.dtype) else kind)


def watch_ways(monkeypatch):
    """Write down the names of the functions that take the steps."""
    taken, way_for = [], short_calls.way_for

    def watched(*problem):
        way = way_for(*problem)
        taken.append(None if way is None else way.__name__)
        return way

    monkeypatch.setattr(short_calls, "way_for", watched)
    return taken


def random_state(rkm, batch):
    return rkm.initial_state(batch).map(lambda t: torch.randn(t.shape, dtype=t.dtype, device=t.device))


def layers_of(cell, dtypes, device):
    """Layers of a cell with and without all that a short call may meet, and their dtypes."""
    options = itertools.product((None, False), (False, True), (1, 2), (False, True), (True, False), dtypes)
    for feedback, layer_norm, layers, batch_first, bias, dtype in options:
        rkm = RKM(
            3, 5, layers, cell=cell, feedback=feedback, layer_norm=layer_norm, batch_first=batch_first, bias=bias,
            dtype=dtype, sigma_i2=0.3, sigma_f2=0.7,
        )  # fmt: skip
        yield randomized(rkm).to(device), dtype


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_gives_what_the_long_way_gives(cell, device, ways, monkeypatch):
    dtypes = [torch.float64, torch.float32, *([torch.bfloat16, torch.float16] if device == "cuda" else [])]
    for rkm, dtype in layers_of(cell, dtypes, device):
        x = torch.randn(*((4, 1, 3) if rkm.batch_first else (1, 4, 3)), dtype=dtype, device=device)
        for state in (random_state(rkm, 4), None):
            ways.clear()
            assert_the_same(rkm, x, state, monkeypatch)
            assert ways == ["long" if rkm.layer_norm and dtype.itemsize < 4 else "short"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell", CELLS)
def test_some_steps_give_what_the_long_way_gives(cell, device, ways, monkeypatch):
    dtypes = [torch.float32, *([torch.bfloat16, torch.float16] if device == "cuda" else [])]
    for rkm, dtype in layers_of(cell, dtypes, device):
        more = (9,) if device == "cuda" and cell == "rkm_lstm" else ()
        for steps, state in itertools.product((3, *more), (random_state(rkm, 4), None)):
            x = torch.randn(*((4, steps, 3) if rkm.batch_first else (steps, 4, 3)), dtype=dtype, device=device)
            ways.clear()
            assert_the_same(rkm, x, state, monkeypatch)
            short = in_c if device == "cpu" else not (rkm.layer_norm and dtype.itemsize < 4)
            assert ways == ["short" if short else "long"]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_and_alignments_on_a_gpu(dtype, batch_first, monkeypatch):
    """Warps read 2 to 16 bytes at once and take 1 to 16 rows, tiles 4 to 16 bytes; more by other ways."""
    taken = watch_ways(monkeypatch)
    for cell, features, size, batches in (
        ("rkm_lstm", 64, 64, (1, 16)), ("ran", 63, 65, (2, 33)), ("rkm_cifg", 30, 130, (3, 7)), ("lstm", 700, 4, (33,)),
        ("rkm_lstm", 512, 1150, (1, 16, 64)), ("linear_kernel", 1150, 512, (5,)), ("ran", 1146, 1146, (40,)),
        ("rkm_cifg", 1152, 1152, (64, 200)), ("gated_cnn", 2048, 2048, (50,)),
    ):  # fmt: skip
        options = {"cell": cell, "batch_first": batch_first}
        rkm = randomized(RKM(features, size, dtype=dtype, **options)).to("cuda")
        exact = RKM(features, size, dtype=torch.float64, device="cuda", backend="reference", **options)
        exact.load_state_dict(rkm.state_dict())
        for batch, steps, first in itertools.product(batches, (1, 2, 4, 9), (0, 1)):
            whole = torch.randn(steps * batch * features + 1, dtype=dtype, device="cuda")
            shape = (batch, steps, features) if batch_first else (steps, batch, features)
            x = whole[first : first + steps * batch * features].view(shape)
            state = random_state(rkm, batch)
            with torch.no_grad():
                output, after = rkm(x, state)
                wanted, after_wanted = exact(x.double(), state.to(torch.float64))
            # cuBLAS takes TF32 where PyTorch's products may.
            may = {"_by_backend": True, "_by_products": torch.get_float32_matmul_precision() != "highest"}
            tf32 = dtype == torch.float32 and (may.get(taken[-1], False) or taken[-1] == "_by_tiles")
            for name, a, b in zip(("output", "h", "c"), (output, *after), (wanted, *after_wanted), strict=True):
                what = f"{name} of {cell, features, size, batch, steps, first}, {taken[-1]}"
                assert_close(a, b, what, "tf32" if tf32 else dtype)
    assert set(taken) == {"_by_warps", "_at_once", "_by_tiles", "_by_products", "_by_backend"}


def watch_tiles(monkeypatch):
    """Write down the layers that tiles take."""
    ran, prepare = [], few_steps._tiles
    monkeypatch.setattr(few_steps, "_tiles", lambda *problem: ran.append(prepare(*problem)) or ran[-1])
    return ran


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(
    ("cell", "dtype"),
    [*itertools.product(CELLS, (torch.float32, torch.bfloat16)), ("rkm_lstm", torch.float16)],
)
def test_tiles_of_all_cells_on_a_gpu(cell, dtype, steps, monkeypatch):
    sizes = [(6, 10, 3), (260, 260, 20), *([(1150, 1150, 64)] if cell == "rkm_lstm" else [])]
    for features, size, batch in sizes:
        rkm = randomized(RKM(features, size, 2, cell=cell, dtype=dtype)).to("cuda")
        exact = RKM(features, size, 2, cell=cell, dtype=torch.float64, device="cuda", backend="reference")
        exact.load_state_dict(rkm.state_dict())
        x = torch.randn(steps, batch, features, dtype=dtype, device="cuda")
        for state in (random_state(rkm, batch), None):
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr(short_calls, "way_for", lambda *_: few_steps._by_tiles)
                ran = watch_tiles(patch)
                output, after = rkm(x, state)
                wanted, after_wanted = exact(x.double(), None if state is None else state.to(torch.float64))
            assert len(ran) == 2
            assert None not in ran
            for name, a, b in zip(("output", "h", "c"), (output, *after), (wanted, *after_wanted), strict=True):
                what = f"{name} of {features, size, batch}"
                assert_close(a, b, what, "tf32" if dtype == torch.float32 else dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(48, 96, 9, 3), (48, 96, 40, 16), (1150, 1150, 64, 3)])
def test_gpus_repeat_themselves_to_the_bit_and_in_graphs(sizes):
    features, size, batch, steps = sizes
    rkm = RKM(features, size, 2, device="cuda")
    x, state = torch.randn(steps, batch, features, device="cuda"), rkm.initial_state(batch)
    with torch.no_grad():
        results = [rkm(x, state) for _ in range(3)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, after = rkm(x, state)
        for _ in range(3):
            graph.replay()
    for other, final in (*results[1:], (output, after)):
        assert torch.equal(results[0][0], other)
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], final, strict=True))


@pytest.mark.gpu
def test_streams_threads_and_graphs_do_not_meet_each_other():
    """Blocks of a launch wait for blocks of the same launch alone, whatever else runs at the same time."""
    rkm, batches = randomized(RKM(64, 64)).to("cuda"), (1, 16, 40, 64)
    given, graphs, found = [torch.randn(12, batch, 64, device="cuda") for batch in batches], [], {}
    with torch.no_grad():
        wanted = [rkm(x)[0] for x in given]
        for x in given:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                graphs.append((graph, rkm(x)[0]))
    torch.cuda.synchronize()

    def work(number):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                found[number] = rkm(given[number])[0]
            graphs[number][0].replay()
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, output in enumerate(wanted):
        assert torch.equal(found[number], output)
        assert torch.equal(graphs[number][1], output)


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=compiled)])
def test_results_have_memory_of_their_own(steps, ways):
    rkm = RKM(3, 4)
    state = rkm.initial_state(2)
    with torch.no_grad():
        output, after = rkm(torch.randn(steps, 2, 3), state)
        kept = [t.clone() for t in after]
        output.zero_()
        assert all(torch.equal(a, b) for a, b in zip(after, kept, strict=True))
        after.hidden.fill_(1)
        assert output.eq(0).all()
    assert ways == ["short"]
    assert all(t.eq(0).all() for t in state)


def test_a_plain_pair_is_taken_and_changed_weights_count(ways):
    rkm = RKM(3, 4)
    x, pair = torch.randn(1, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    with torch.no_grad():
        first, _ = rkm(x, pair)
        rkm.weight_hh_l0.data.mul_(2)
        second, _ = rkm(x, pair)
        exact = RKM(3, 4, backend="reference")
        exact.load_state_dict(rkm.state_dict())
        wanted, _ = exact(x, pair)
    assert not torch.equal(first, second)
    assert_close(second, wanted)
    assert ways[:2] == ["short", "short"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"bidirectional": True}, {"ngram": 2}, {"proj_size": 2}, {"cell": "linear_kernel", "learn_sigma": True},
        {"backend": "batched"}, {"weight_dropout": 0.5}, {"state_dropout": 0.5}, {"num_layers": 2, "dropout": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_go_the_long_way(arguments, ways):
    rkm = RKM(3, 4, **arguments)
    with torch.no_grad():
        rkm(torch.randn(1, 2, 3), rkm.initial_state(2))
    assert ways == ["long"]


def test_other_calls_go_the_long_way(ways):
    rkm, x = RKM(3, 4), torch.randn(1, 2, 3)
    state = rkm.initial_state(2)
    rkm(x, state)[0].sum().backward()
    with torch.no_grad():
        rkm(torch.randn(17, 2, 3), state)
        rkm(torch.randn(0, 2, 3), state)
        rkm(torch.randn(1, 0, 3), rkm.initial_state(0))
        rkm(torch.randn(1, 2, 6)[..., ::2], state)
        rkm(x[:, 0], rkm.initial_state())
        rkm(x, list(state))
        RKM(3, 4, learn_initial_state=True)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rkm(x, state)
        parametrizations.weight_norm(rkm, "weight_hh_l0")
        rkm(x, state)
    assert ways == ["long"] * 10


def test_what_does_not_fit_is_refused_as_ever():
    rkm, state = RKM(3, 4), RKM(3, 4).initial_state(2)
    with torch.no_grad():
        for x, given, message in (
            (torch.randn(1, 2, 5), state, "with m = 3, not"),
            (torch.randn(1, 3, 3), state, "hidden must have shape"),
            (torch.randn(1, 2, 3).double(), state, r"torch\.float64 but the weights"),
            (torch.randn(1, 2, 3), (state.hidden, 1.0), "cell must be one tensor"),
            (torch.randn(1, 2, 3), RKMState(*state, [torch.zeros(1, 2, 3)]), "context must be None"),
            (torch.randn(1, 2, 3), (*state, None, None), "a pair"),
            (torch.zeros(1, 2, 3, dtype=torch.int64), None, r"the inputs are torch\.int64"),
        ):
            with pytest.raises(RKMError, match=message):
                rkm(x, given)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("bias", (1,), "biases must be of shape"), ("bias", (15,), "biases must be of shape"),
        ("weight_ih", (20, 4), "weights must be of shape"), ("weight_ih", (16, 5), "weights must be of shape"),
        ("weight_hh", (16, 5), "recurrent weights must be of shape"), ("norm_weight", (1,), "gain must be of shape"),
        ("norm_bias", (1,), "bias must be of shape"),
    ],
)  # fmt: skip
def test_weights_of_another_shape_are_refused_as_ever(layers, name, shape, message):
    for feedback in [None, *([] if name == "weight_hh" else [False])]:
        rkm = RKM(4, 4, layers, feedback=feedback, layer_norm=name.startswith("norm"))
        state = rkm.initial_state(2)
        with torch.no_grad():
            rkm(torch.randn(1, 2, 4), state)
            setattr(rkm, f"{name}_l{layers - 1}", nn.Parameter(torch.zeros(shape)))
            with pytest.raises(RKMError, match=message):
                rkm(torch.randn(1, 2, 4), state)


def test_inference_mode_and_modules_around_it(ways):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = RKM(3, 4)

        def forward(self, x, state):
            return self.rnn(x, state)

    around, x = Around(), torch.randn(1, 2, 3)
    state = around.rnn.initial_state(2)
    with torch.inference_mode():
        inside = around(x, state)[0]
        assert torch.func.vmap(lambda x: around(x.unsqueeze(0), state)[0])(torch.stack([x[0], x[0]])).shape[0] == 2
    with torch.no_grad():
        assert_close(inside.clone(), around(x, state)[0])
    assert ways == ["short", "long", "short"]


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace's, and the compiler's own
@pytest.mark.parametrize("tool", FOLLOWERS)
def test_kernels_are_left_alone_whenever_something_follows(tool, monkeypatch):
    rkm, x, ran = RKM(3, 4), torch.randn(5, 2, 3), []
    way_for = short_calls.way_for

    def watched(*problem):
        way = way_for(*problem)
        return way and (lambda *given: ran.append(given) or way(*given))

    monkeypatch.setattr(short_calls, "way_for", watched)
    with torch.no_grad():
        FOLLOWERS[tool](rkm, x)
        assert not ran
        if tool != "a meta tensor":
            rkm(x)
            assert len(ran) == in_c
