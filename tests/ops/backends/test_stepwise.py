"""What ``stepwise`` alone is tested for, on a GPU; the rest: ``test_feedback_kernels.py``.

The last test here runs that rest in Triton's interpreter.
"""

import threading

import pytest
import torch
from helpers import assert_close

from fairseq_rkm import RKM
from fairseq_rkm.ops.backends.stepwise import step_loop
from fairseq_rkm.ops.backends.stepwise.step_loop import STRETCHES
from ops.backends.feedback_kernels import check_loops_are_shared, outcomes
from ops.backends.triton_interpreter import run_interpreted


@pytest.mark.gpu
def test_layers_lengths_and_batches_share_loops_without_harm():
    """Batches of one loop's rows in turn, of any length: whatever another left in the buffers does no harm."""
    step_loop.LOOPS.clear()
    check_loops_are_shared()


@pytest.mark.gpu
def test_few_loops_are_kept(monkeypatch):
    step_loop.LOOPS.clear()
    monkeypatch.setattr(step_loop, "MOST_LOOPS", 3)
    rkm = RKM(8, 16, backend="stepwise", device="cuda", memory_clip=1.0)
    for batch in (1, 9, 17, 25, 33, 1):
        rkm(torch.randn(6, batch, 8, device="cuda"))[0].sum().backward()
    assert len(step_loop.LOOPS) == 3
    monkeypatch.setattr(step_loop, "MOST_BUFFERED", 1)
    rkm(torch.randn(6, 41, 8, device="cuda"))
    assert len(step_loop.LOOPS) == 1


@pytest.mark.gpu
def test_it_can_be_recorded_into_a_graph():
    rkm = RKM(16, 40, backend="stepwise", device="cuda", memory_clip=1.0)
    x = torch.randn(max(STRETCHES) + 6, 5, 16, device="cuda")
    wanted = outcomes(rkm, x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        outcomes(rkm, x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        given = outcomes(rkm, x)
    for tensor in given:
        tensor.zero_()
    graph.replay()
    for a, b in zip(given, wanted, strict=True):
        assert_close(a, b, dtype="tf32")


@pytest.mark.gpu
def test_threads_and_streams_do_not_disturb_each_other():
    rkm = RKM(16, 64, backend="stepwise", device="cuda", memory_clip=1.0)
    inputs = [torch.randn(40, 8, 16, device="cuda") for _ in range(6)]
    wanted = [outcomes(rkm, x) for x in inputs]
    torch.cuda.synchronize()
    found = {}

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream() if number % 2 else torch.cuda.default_stream()):
            for _ in range(10):
                found[number] = outcomes(rkm, inputs[number])
        torch.cuda.synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in enumerate(wanted):
        assert all(torch.equal(a, b) for a, b in zip(found[number], results, strict=True))


def test_a_product_has_its_precision_while_another_thread_s_has_another():
    """Else one thread's product could take the other's, and PyTorch keep it for good."""
    flags = torch.backends.cuda.matmul
    before, seen, inside = flags.fp32_precision, [], threading.Event()

    def work():
        with step_loop.products(tf32=False):
            inside.set()
            seen.append(flags.fp32_precision)

    thread = threading.Thread(target=work)
    with step_loop.products(tf32=True):
        thread.start()
        assert not inside.wait(0.2)
        assert flags.fp32_precision == "tf32"
    thread.join()
    assert seen == ["ieee"]
    assert flags.fp32_precision == before


@pytest.mark.gpu
def test_products_take_tf32_as_cudnn_does_and_leave_pytorch_s_setting(monkeypatch):
    rkm = RKM(64, 512, backend="stepwise", device="cuda", memory_clip=1.0)
    x, exact = torch.randn(20, 16, 64, device="cuda"), RKM(64, 512, backend="reference", memory_clip=1.0).double()
    exact.load_state_dict(rkm.state_dict())
    wanted = exact(x.cpu().double())[0]
    errors = {}
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        errors[allowed] = ((rkm(x)[0].cpu().double() - wanted).norm() / wanted.norm()).item()
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert errors[False] < 1e-6
    assert errors[True] > 1e-5


@pytest.mark.slow
def test_its_rows_of_the_table_under_the_interpreter():
    run_interpreted("test_feedback_kernels.py", "-k", "stepwise")
