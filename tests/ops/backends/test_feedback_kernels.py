"""``blockwise``, ``persistent`` and ``stepwise`` against the reference: on a GPU, or in Triton's interpreter.

The table in ``feedback_kernels.py`` says what each is given. Run with ``TRITON_INTERPRET=1``, the tests of ``stepwise``
need no GPU; the last test of ``test_stepwise.py`` does so.
"""

import itertools

import pytest
import torch
from helpers import assert_close, training_losses

from fairseq_rkm import RKM, RKMError
from fairseq_rkm.experiments.sweep_measurement import products_in
from ops.backends.feedback_kernels import DTYPES, FEEDBACK, KERNELS, SMALL, each, outcomes
from ops.backends.triton_interpreter import INTERPRETED
from ops.test_backends import MISSING, check_missing_numbers_stay_where_they_are, clear_bound, compare
from ops.test_higher_derivatives import VARIANTS, compare_derivatives


@each("kernels, cell, dtype", lambda _: itertools.product(FEEDBACK, [torch.float32] if INTERPRETED else DTYPES))
@pytest.mark.usefixtures("poisoned")
def test_all_variants(kernels, cell, dtype):
    for layer_norm, (bidirectional, mask) in itertools.product(kernels.norms, kernels.variants):
        compare(
            kernels.name, device=kernels.device, dtype=dtype, cell=cell, layer_norm=layer_norm, mask=mask,
            bidirectional=bidirectional, learn_sigma=True, ngram=2, tf32=kernels.tf32, **SMALL,
        )  # fmt: skip


@each("kernels, dtype", lambda kernels: ((dtype,) for dtype in DTYPES if kernels.in_triton))
def test_dtypes_in_the_interpreter_too(kernels, dtype):
    compare(kernels.name, device=kernels.device, dtype=dtype, mask="mixed", tf32=kernels.tf32, **SMALL)


@each("kernels, cell", lambda kernels: ((cell,) for cell in FEEDBACK if kernels.exact_units), interpreted=False)
def test_float32_is_float32_where_tf32_is_off(kernels, cell):
    with products_in("float32"):
        compare(
            kernels.name, device="cuda", dtype=torch.float32, cell=cell, steps=70, batch=40,
            sizes=(30, kernels.exact_units),
        )  # fmt: skip


@each("kernels, cell, dtype, bidirectional, mask",
      lambda kernels: ((cell, *episode) for cell in FEEDBACK for episode in kernels.episodes))  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_sequences_that_begin_anew_and_all_memories(kernels, cell, dtype, bidirectional, mask):
    compare(
        kernels.name, device=kernels.device, dtype=dtype, cell=cell, bidirectional=bidirectional, mask=mask, ngram=2,
        tf32=kernels.tf32, reset=True, return_memory=True, **SMALL,
    )  # fmt: skip


@each("kernels, cell, dtype", lambda _: itertools.product(FEEDBACK, [torch.float32] if INTERPRETED else DTYPES))
@pytest.mark.usefixtures("poisoned")
def test_clipped_memory(kernels, cell, dtype):
    shape = {"steps": 4, "batch": 2, "sizes": (6, 5)}
    bound = clear_bound(cell, dtype=dtype, **shape)
    tf32 = kernels.tf32 and not kernels.exact_clipping
    with kernels.clipping_precision():
        compare(kernels.name, device=kernels.device, dtype=dtype, cell=cell, tf32=tf32, memory_clip=bound, **shape)


@each("kernels, arguments",
      lambda kernels: ((a,) for a in (MISSING[:1] if INTERPRETED else MISSING) if kernels.takes(**a)))  # fmt: skip
def test_missing_numbers_stay_where_they_are(kernels, arguments):
    check_missing_numbers_stay_where_they_are(kernels.name, torch.float32, kernels.device, **arguments)


@each("kernels, arguments", lambda kernels: ((a,) for a in VARIANTS if kernels.takes(**a)), interpreted=False)
def test_three_orders_of_derivatives_are_the_reference_s(kernels, arguments):
    compare_derivatives(kernels.name, torch.float32, device="cuda", tolerance="tf32", **arguments)


@each("kernels, size, arguments, dtype",
      lambda kernels: itertools.product(kernels.odd_sizes, kernels.odd_arguments, DTYPES),
      interpreted=False)  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_odd_sizes(kernels, size, arguments, dtype):
    steps, batch, units = size
    if arguments.get("layer_norm") and units == 1:
        pytest.skip("a single unit is normalised to nothing: all gradients are zero, and only rounding is left of them")
    compare(
        kernels.name, device="cuda", dtype=dtype, steps=steps, batch=batch, sizes=(5, units), tf32=True, **arguments
    )


@each("kernels, layer_norm", lambda kernels: ((norm,) for norm in kernels.norms), interpreted=False)
def test_the_same_bits_on_a_repeated_run(kernels, layer_norm):
    rkm = RKM(40, kernels.units, layer_norm=layer_norm, backend=kernels.name, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(50, 24, 40, device="cuda", dtype=torch.bfloat16)
    first, *others = (outcomes(rkm, x) for _ in range(3))
    for run in others:
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


@each("kernels", interpreted=False)
def test_training_follows_the_reference(kernels):
    given, wanted = (
        training_losses(200, name, device="cuda", layer_norm=kernels.norms[-1]) for name in (kernels.name, "reference")
    )
    assert_close(given, wanted, dtype="tf32")


@each("kernels, arguments, reason", lambda kernels: kernels.refusals, interpreted=False)
def test_what_it_cannot_take_is_refused_with_a_reason(kernels, arguments, reason):
    given = {"hidden_size": 4, **arguments}
    x = torch.zeros(2, 1, 4, device="cuda", dtype=given.get("dtype"))
    with pytest.raises(RKMError, match=reason):
        RKM(4, backend=kernels.name, device="cuda", **given)(x)


@each("kernels", interpreted=False)
@pytest.mark.parametrize("ngram", [1, 2])
def test_a_sequence_without_steps_is_refused_by_name_and_not_by_auto(kernels, ngram):
    x = torch.zeros(0, 1, 4, device="cuda")
    with pytest.raises(RKMError, match="at least one step"):
        RKM(4, 4, ngram=ngram, backend=kernels.name, device="cuda")(x)
    assert RKM(4, 4, ngram=ngram, device="cuda")(x)[0].shape == (0, 1, 4)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
def test_on_cpu_it_is_refused_by_name_and_passed_over_by_auto(kernels):
    if INTERPRETED and kernels.in_triton:
        pytest.skip("it runs here")
    with pytest.raises(RKMError, match=f"backend '{kernels.name}' cannot run this: it runs on CUDA GPUs"):
        RKM(4, 4, backend=kernels.name)(torch.zeros(2, 1, 4))
    assert RKM(4, 4)(torch.zeros(2, 1, 4))[0].shape == (2, 1, 4)
