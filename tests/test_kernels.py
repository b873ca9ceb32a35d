"""Gram matrices of untrained recurrent machines: against a double loop over pairs, and against their features."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_kernel_functions import by_definition

from fairseq_rkm import RKM, RKMError
from fairseq_rkm.kernels import POOLINGS, recurrent_gram
from fairseq_rkm.ops.kernel_functions import resolve_kernel

KERNELS = [("linear", None), ("polynomial", 2), ("polynomial", 3), ("gaussian", None), ("arccos", 0), ("arccos", 1)]
S_I, S_F, SCALE, OFFSET = 0.4, 0.3, 1.3, 0.7
"""SCALE and OFFSET are those of :mod:`ops.test_kernel_functions`."""
LENGTHS = [3, 1, 5, 4, 2, 5]


def sequences(lengths=LENGTHS, features=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, features, generator=generator, dtype=dtype) for length in lengths]


def arguments(name, degree):
    own = {"kernel": name, "degree": degree, "sigma_i2": S_I, "sigma_f2": S_F}
    return own | ({"scale": SCALE} if name in ("polynomial", "gaussian") else {}) | {"offset": OFFSET}


def of_three(kernel, dot, left, right):
    """The kernel by its definition, from two vectors of a plane with these squared lengths and this inner product."""
    cosine = min(1.0, max(-1.0, dot / math.sqrt(left * right)))
    w = math.sqrt(left) * torch.tensor([1.0, 0.0], dtype=torch.float64)
    z = math.sqrt(right) * torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)
    if dot == left == right and kernel.name == "arccos":
        return torch.tensor(left if kernel.degree else 1.0, dtype=torch.float64)  # no angle is lost to rounding
    return by_definition(kernel, w, z)


def double_loop(x, y, name, degree, ngram=1, pooling="last"):
    """Each pair alone, each step alone."""
    kernel = resolve_kernel(name, degree)

    def window(sequence, t):
        return torch.cat([sequence[t - k] if t >= k else torch.zeros_like(sequence[0]) for k in range(ngram)])

    def inner(a, t, b, s):
        """``h_t^T h'_s``, steps counted from 0; before the first step h is 0."""
        if t < 0 or s < 0:
            return 0.0
        dot = S_I * (window(a, t) @ window(b, s)).item() + S_F * float(inner(a, t - 1, b, s - 1))
        left = S_I * window(a, t).square().sum().item() + S_F * float(inner(a, t - 1, a, t - 1))
        right = S_I * window(b, s).square().sum().item() + S_F * float(inner(b, s - 1, b, s - 1))
        return of_three(kernel, dot, left, right)

    gram = torch.zeros(len(x), len(y), dtype=torch.float64)
    for i, j in itertools.product(range(len(x)), range(len(y))):
        if pooling == "last":
            gram[i, j] = inner(x[i], len(x[i]) - 1, y[j], len(y[j]) - 1)
        else:
            each = [inner(x[i], t, y[j], s) for t in range(len(x[i])) for s in range(len(y[j]))]
            gram[i, j] = sum(each) / len(each)
    return gram


@pytest.mark.parametrize(("name", "degree"), KERNELS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_matrix_is_that_of_a_double_loop(name, degree, pooling):
    x, y = sequences(), sequences([2, 4, 1], seed=1)
    for ngram in (1, 2):
        own = arguments(name, degree) | {"ngram": ngram, "pooling": pooling}
        torch.testing.assert_close(recurrent_gram(x, **own), double_loop(x, x, name, degree, ngram, pooling))
        torch.testing.assert_close(recurrent_gram(x, y, **own), double_loop(x, y, name, degree, ngram, pooling))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_tiles_change_nothing(device, pooling):
    x = [sequence.to(device) for sequence in sequences([3, 1, 7, 4, 2, 5, 6, 7])]
    y = [sequence.to(device) for sequence in sequences([2, 9, 3], seed=1)]
    for other in (None, y):
        whole = recurrent_gram(x, other, "gaussian", pooling=pooling)
        assert whole.device.type == device
        for tile_bytes in (1, 12 * 8 * 9 * 4, 12 * 8 * 9 * 25):
            torch.testing.assert_close(
                recurrent_gram(x, other, "gaussian", pooling=pooling, tile_bytes=tile_bytes), whole
            )


def features_of(sequence, name, all_states=False):
    """``h_T``, or all ``h_t``, of the machine written out: phi of the linear kernel, or of (a^T b / s + b)^2."""
    hidden, states = sequence.new_zeros(0), []
    for step in sequence:
        z = torch.cat([math.sqrt(S_I) * step, math.sqrt(S_F) * hidden])
        if name == "linear":
            hidden = z
        else:
            longer = torch.cat([z / math.sqrt(SCALE), z.new_tensor([math.sqrt(OFFSET)])])
            hidden = torch.outer(longer, longer).flatten()
        states.append(hidden)
    return states if all_states else hidden


def inner_product(a, b):
    """Of two states in one feature space.

    The older a part of a state is, the farther behind it stands. What only the longer state has is orthogonal to all of
    the shorter one's, which has zeros there.
    """
    size = min(len(a), len(b))
    return a[:size] @ b[:size]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_linear_matrix_is_that_of_its_features(pooling):
    x = sequences()
    states = [features_of(sequence, "linear", all_states=True) for sequence in x]
    wanted = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i, j in itertools.product(range(len(x)), repeat=2):
        pairs = itertools.product(states[i], states[j]) if pooling == "mean" else [(states[i][-1], states[j][-1])]
        products = [inner_product(a, b) for a, b in pairs]
        wanted[i, j] = sum(products) / len(products)
    torch.testing.assert_close(recurrent_gram(x, sigma_i2=S_I, sigma_f2=S_F, pooling=pooling), wanted)


def test_the_quadratic_matrix_is_that_of_its_features():
    x = sequences([3, 3, 3], features=1)
    states = torch.stack([features_of(sequence, "polynomial") for sequence in x])
    torch.testing.assert_close(recurrent_gram(x, **arguments("polynomial", 2)), states @ states.t())


def test_the_linear_machine_is_the_cell_with_the_other_sequence_for_a_filter():
    """Its filter is a sequence of one step; ``cnn`` has the output ``tanh(s_i w^T x_t)``."""
    x, (other,) = sequences([6])[0], sequences([1], seed=1)
    rkm = RKM(2, 1, cell="cnn", bias=False, dtype=torch.float64, sigma_i2=0.5)
    with torch.no_grad():
        rkm.weight_ih_l0.copy_(other)
        output = rkm(x)[0].atanh()
    for t in range(6):
        given_ = recurrent_gram([x[: t + 1]], [other], sigma_i2=0.5, sigma_f2=0.9)
        torch.testing.assert_close(given_[0], output[t])


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=7), st.sampled_from(KERNELS), st.sampled_from(POOLINGS),
    st.integers(1, 3), st.floats(0, 1), st.integers(0, 100),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_the_matrix_is_symmetric_and_positive_semi_definite(lengths, kernel, pooling, ngram, sigma_f2, seed):
    x = sequences(lengths, seed=seed)
    x.append(x[0].clone())  # two that are alike
    scale = {"scale": 3.0} if kernel[0] == "polynomial" else {}
    gram = recurrent_gram(
        x, kernel=kernel[0], degree=kernel[1], ngram=ngram, sigma_f2=0.5 * sigma_f2, pooling=pooling, **scale
    )
    torch.testing.assert_close(gram, gram.t(), rtol=0, atol=0)
    torch.testing.assert_close(gram[0], gram[-1])
    assert torch.linalg.eigvalsh(gram).min() >= -1e-9 * gram.diagonal().max()


@pytest.mark.parametrize(("name", "degree"), KERNELS)
def test_extreme_sequences_give_numbers(name, degree):
    x = [torch.zeros(3, 2), torch.full((2, 2), 1e-30), torch.zeros(0, 2)]
    if name != "polynomial":
        x.append(torch.full((4, 2), 1e4))
    for pooling in POOLINGS:
        gram = recurrent_gram(x, kernel=name, degree=degree, pooling=pooling)
        assert gram.isfinite().all()
        assert gram[2].eq(0).all()


def test_arrays_of_numpy_and_float32_are_taken():
    x = sequences(dtype=torch.float32)
    gram = recurrent_gram([np.asarray(sequence) for sequence in x], kernel="arccos")
    assert gram.dtype == torch.float32
    torch.testing.assert_close(
        gram.double(), recurrent_gram([s.double() for s in x], kernel="arccos"), rtol=1e-4, atol=1e-5
    )


def test_a_precomputed_kernel_classifies_what_order_alone_tells():
    """Sequences that rise and those that fall have the same means; scikit-learn tells them apart by the matrix."""
    svm = pytest.importorskip("sklearn.svm", reason="needs scikit-learn")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    x = [torch.linspace(-1, 1, 4 + i % 3).unsqueeze(1) * (1 - 2 * label) for i, label in enumerate(labels.tolist())]
    x = [s + 0.1 * torch.randn(s.shape, generator=generator) for s in x]
    options = {"kernel": "gaussian", "sigma_f2": 0.9, "ngram": 2}
    model = svm.SVC(kernel="precomputed").fit(recurrent_gram(x[:40], **options), labels[:40])
    assert model.score(recurrent_gram(x[40:], x[:40], **options), labels[40:]) == 1


@pytest.mark.parametrize(
    ("given_", "options", "sentence"),
    [
        ([], {}, "x holds no sequences"),
        (
            [torch.zeros(3)],
            {},
            r"x\[0\] must be floating-point numbers of shape \(steps, features\), not torch.float32 of",
        ),
        ([torch.zeros(3, 2, dtype=torch.int64)], {}, r"x\[0\] must be floating-point numbers"),
        ([torch.zeros(3, 2), torch.zeros(3, 1)], {}, r"x\[1\] has 1 features, torch.float32, on cpu, but x\[0\] 2"),
        (
            [torch.zeros(3, 2)],
            {"y": [torch.zeros(1, 2).double()]},
            r"y\[0\] has 2 features, torch.float64, on cpu, but",
        ),
        ([torch.zeros(3, 0)], {}, "the sequences have no features"),
        ([torch.zeros(3, 2)], {"kernel": "rbf"}, "unknown kernel 'rbf'"),
        ([torch.zeros(3, 2)], {"pooling": "max"}, "unknown pooling 'max'; choose one of last, mean"),
        ([torch.zeros(3, 2)], {"scale": 1.0}, "the kernel 'linear' has no scale: leave it out"),
        ([torch.zeros(3, 2)], {"kernel": "gaussian", "scale": 0.0}, "scale must be above 0 and finite, not 0.0"),
        ([torch.zeros(3, 2)], {"sigma_f2": -0.1}, "sigma_f2 must be at least 0 and finite, not -0.1"),
        ([torch.zeros(3, 2)], {"sigma_i2": "a"}, "sigma_i2 must be a number, not 'a'"),
        ([torch.zeros(3, 2)], {"ngram": 0}, "ngram must be a whole number from 1, not 0"),
        (
            [torch.ones(50, 2)],
            {"kernel": "polynomial"},
            "the polynomial kernel takes these sequences beyond torch.float32",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(given_, options, sentence):
    with pytest.raises(RKMError, match=sentence):
        recurrent_gram(given_, **options)
