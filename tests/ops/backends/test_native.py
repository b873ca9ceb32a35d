"""The compiled CPU backend against the reference in float64."""

import functools
import itertools
import logging
import os
import platform

import pytest
import torch
from helpers import assert_close, training_losses

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops import dispatch
from fairseq_rkm.ops.backends.native import native
from fairseq_rkm.ops.compilation import c_compiler
from ops.test_backends import (
    EPISODES,
    MISSING,
    NGRAMS,
    check_missing_numbers_stay_where_they_are,
    compare,
    gradients_at_the_bound,
)

compiled = pytest.mark.skipif(native._missing(CELLS["rkm_lstm"]) is not None, reason="needs a C compiler")


@compiled
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("feedback", [None, False])
@pytest.mark.parametrize(("ngram", "padding"), NGRAMS)
def test_all_variants(cell, feedback, ngram, padding):
    for layer_norm, bidirectional, mask in itertools.product((False, True), (False, True), ("none", "mixed")):
        # With a layer norm and no memory s_i has no effect: its gradient would be rounding.
        learn_sigma = not (layer_norm and not CELLS[cell].has_memory)
        compare(
            "native", dtype=torch.float32, cell=cell, feedback=feedback, layer_norm=layer_norm, mask=mask,
            bidirectional=bidirectional, learn_sigma=learn_sigma, ngram=ngram, ngram_padding=padding,
        )  # fmt: skip


@compiled
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("arguments", EPISODES, ids=str)
def test_sequences_that_begin_anew_and_all_memories(cell, arguments):
    for feedback in (None, False):
        compare(
            "native", dtype=torch.float32, cell=cell, feedback=feedback, reset=True, return_memory=True, steps=9,
            **arguments,
        )  # fmt: skip


@compiled
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("steps", "batch", "size"), [(1, 1, 1), (1, 7, 33), (2, 1, 16), (3, 23, 64), (63, 5, 17), (4, 13, 100)]
)
def test_odd_sizes(steps, batch, size):
    for cell, layer_norm in itertools.product(("rkm_lstm", "rkm_cifg", "ran", "linear_kernel"), (False, True)):
        if layer_norm and size == 1:
            continue  # a single unit is normalised to nothing
        compare(
            "native", dtype=torch.float32, steps=steps, batch=batch, sizes=(5, size), cell=cell, layer_norm=layer_norm
        )


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86's compilers")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors(monkeypatch, flag):
    monkeypatch.setattr(c_compiler, "FLAGS", (*c_compiler.FLAGS, flag))
    native.library.cache_clear()
    try:
        for cell, layer_norm in itertools.product(("rkm_lstm", "lstm", "linear_kernel"), (False, True)):
            compare("native", dtype=torch.float32, batch=13, sizes=(5, 37), cell=cell, layer_norm=layer_norm)
    finally:
        native.library.cache_clear()


@compiled
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", CELLS)
def test_clipped_memory(cell):
    for feedback, mask in itertools.product((None, False), ("none", "mixed")):
        compare(
            "native", dtype=torch.float32, cell=cell, feedback=feedback, mask=mask, memory_clip=0.4, sizes=(3, 19),
            learn_sigma=True,
        )  # fmt: skip


@compiled
@pytest.mark.parametrize("cell", [name for name, row in CELLS.items() if not row.squash_candidate])
def test_the_gradient_passes_at_the_bound_itself_and_not_beyond(cell):
    given, wanted = (gradients_at_the_bound(name, cell, None, torch.float32) for name in ("native", "reference"))
    assert given[0].ne(0).tolist() == [True, True, False]
    assert_close(given, wanted)


@compiled
def test_a_whole_number_clips_as_well():
    compare("native", dtype=torch.float32, memory_clip=1, sizes=(3, 19))


@compiled
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [4, 25], ids=["tiles shared", "rows of their own"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_threads_do_not_change_the_result(threads, batch, layer_norm):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compare("native", dtype=torch.float32, steps=6, batch=batch, sizes=(8, 50), layer_norm=layer_norm, mask="mixed")
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that can bind threads")
@pytest.mark.parametrize("layer_norm", [False, True])
def test_threads_that_share_a_processor_let_each_other_have_it(layer_norm):
    """With three to a processor each meeting takes another's turn, in which nobody may be left waiting."""
    rnn, x = RKM(5, 40, layer_norm=layer_norm, backend="native"), torch.randn(200, 2, 5, requires_grad=True)
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()

    def run():
        output, _ = rnn(x)
        return output, *torch.autograd.grad(output.square().sum(), [x, *rnn.parameters()])

    wanted = run()
    try:
        torch.set_num_threads(3)
        run()  # now they are there
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {min(allowed)})
        given = run()
    finally:
        torch.set_num_threads(threads)
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), allowed)
    for got, want in zip(given, wanted, strict=True):
        assert_close(got, want)


@compiled
@pytest.mark.parametrize("cell", ["rkm_lstm", "lstm"])  # the latter's NaN has to come through its sigmoids
def test_large_and_missing_numbers_stay_what_they_are(cell):
    rkm = RKM(2, 3, cell=cell, backend="native")
    with torch.no_grad():
        assert rkm(torch.full((1, 1, 2), 1e30))[0].isfinite().all()
        assert rkm(torch.full((1, 1, 2), torch.nan))[0].isnan().all()


@compiled
@pytest.mark.parametrize("arguments", MISSING, ids=str)
def test_missing_numbers_stay_where_they_are(arguments):
    check_missing_numbers_stay_where_they_are("native", torch.float32, **arguments)


@compiled
def test_training_follows_the_reference():
    given, wanted = (training_losses(200, backend, num_layers=2) for backend in ("native", "reference"))
    assert_close(given, wanted)


def test_without_a_compiler_it_says_so_once_and_auto_falls_back(monkeypatch, caplog):
    monkeypatch.setattr(c_compiler.shutil, "which", lambda _name: None)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    monkeypatch.setattr(dispatch, "_PROVEN", {})
    for function in ("_missing", "_say"):
        monkeypatch.setattr(native, function, functools.cache(getattr(native, function).__wrapped__))
    with caplog.at_level(logging.WARNING):
        for cell in CELLS:
            rkm = RKM(3, 4, cell=cell)
            for steps in (1, 2):
                assert rkm(torch.zeros(steps, 1, 3))[0].shape == (steps, 1, 4)
    assert caplog.text.count("no C compiler is installed") == 1
    rkm.backend = "native"
    with pytest.raises(RKMError, match="backend 'native' cannot run this: no C compiler"):
        rkm(torch.zeros(2, 1, 3))


@compiled
def test_other_dtypes_are_refused_by_name_and_passed_over_by_auto():
    x = torch.zeros(2, 1, 3, dtype=torch.float64)
    with pytest.raises(RKMError, match=r"float32, not in torch\.float64"):
        RKM(3, 4, backend="native", dtype=torch.float64)(x)
    assert RKM(3, 4, dtype=torch.float64)(x)[0].dtype == torch.float64
