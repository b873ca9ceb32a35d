"""The reference against the rows of the design's table, each written out by hand."""

import pytest
import torch
from torch.nn import functional as F

from fairseq_rkm import CELLS
from fairseq_rkm.ops import Weights, resolve_cell
from fairseq_rkm.ops.reference import recurrence

S_I, S_F = 0.3, 0.6


def by_hand(name, a, c):
    """``(c_t, h_t)`` from the pre-activations of one step."""
    sigmoid = torch.sigmoid
    match name:
        case "lstm":
            c = sigmoid(a["input"]) * a["candidate"].tanh() + sigmoid(a["forget"]) * c
            return c, sigmoid(a["output"]) * c.tanh()
        case "rkm_lstm":
            c = sigmoid(a["input"]) * a["candidate"] + sigmoid(a["forget"]) * c
            return c, sigmoid(a["output"]) * c
        case "rkm_cifg":
            forget = sigmoid(a["forget"])
            c = (1 - forget) * a["candidate"] + forget * c
            return c, sigmoid(a["output"]) * c
        case "linear_kernel_gated":
            c = S_I * a["candidate"] + S_F * c
            return c, sigmoid(a["output"]) * c
        case "linear_kernel":
            c = S_I * a["candidate"] + S_F * c
            return c, c.tanh()
        case "gated_cnn":
            c = S_I * a["candidate"]
            return c, sigmoid(a["output"]) * c
        case "cnn":
            c = S_I * a["candidate"]
            return c, c.tanh()
        case "ran":
            c = sigmoid(a["input"]) * a["candidate"] + sigmoid(a["forget"]) * c
            return c, c.tanh()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("feedback", [None, False])
def test_two_steps_by_hand(name, feedback):
    cell = resolve_cell(name, feedback)
    m, d, batch, ngram = 3, 4, 2, 2
    x = torch.randn(3, batch, m, dtype=torch.float64)  # x_0, x_1, x_2; two windows of two
    w = torch.randn(len(cell.gates) * d, ngram * m, dtype=torch.float64)
    u = torch.randn(len(cell.recurrent_gates) * d, d, dtype=torch.float64) if cell.has_feedback else None
    b = torch.randn(len(cell.gates) * d, dtype=torch.float64)
    h, c = torch.randn(2, batch, d, dtype=torch.float64)
    output, hidden, memory = recurrence(cell, x, Weights(w, u, b, sigma_i=S_I, sigma_f=S_F), h, c)
    for t in range(2):
        a = {}
        for i, gate in enumerate(cell.gates):
            rows = slice(i * d, (i + 1) * d)
            a[gate] = x[t + 1] @ w[rows, :m].T + x[t] @ w[rows, m:].T + b[rows]
            if gate in cell.recurrent_gates:
                j = cell.recurrent_gates.index(gate)
                a[gate] = a[gate] + h @ u[j * d : (j + 1) * d].T
        c, h = by_hand(name, a, c)
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close(hidden, h)
    torch.testing.assert_close(memory, c)


def test_a_clipped_memory_is_carried_clipped():
    cell = CELLS["linear_kernel_gated"].clipped(0.7)
    w, x, c0 = torch.zeros(8, 1), torch.zeros(2, 1, 1), torch.tensor([[4.0, -4.0, 1.0, 0.5]])
    w[:4, 0] = 1.0
    x[0], x[1] = 0.2, -0.1
    output, _, memory = recurrence(cell, x, Weights(w, torch.zeros(8, 4)), torch.zeros(1, 4), c0)
    first = torch.tensor([[0.7, -0.7, 0.6, 0.35]])
    torch.testing.assert_close(output[0], 0.5 * first)
    torch.testing.assert_close(memory, 0.5 * first - 0.05)


def test_layer_norm_acts_on_the_memory_and_is_carried():
    cell = CELLS["linear_kernel"]
    w, gain, shift = torch.randn(4, 3), torch.randn(4), torch.randn(4)
    x, c0 = torch.randn(1, 2, 3), torch.randn(2, 4)
    weights = Weights(w, torch.zeros(4, 4), None, gain, shift, 0.5, 0.5)
    output, _, memory = recurrence(cell, x, weights, torch.zeros(2, 4), c0)
    expected = F.layer_norm(0.5 * x[0] @ w.T + 0.5 * c0, (4,), gain, shift, 1e-5)
    torch.testing.assert_close(memory, expected)
    torch.testing.assert_close(output[0], expected.tanh())
