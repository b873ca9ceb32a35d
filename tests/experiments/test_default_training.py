"""Every cell in every architecture trains with its defaults at a rate that suits an LSTM: the table's short form."""

import math
from pydoc_data.topics import topics

import pytest
import torch

from fairseq_rkm import CELLS
from fairseq_rkm.experiments import default_training as script

LINES = [line.split() for text in sorted(topics.values())[:40] for line in text.lower().splitlines() if line.strip()]
CLASSES = [str("the" in line) for line in LINES]
UNITS, UPDATES, RATE = 96, 30, 4e-3
ARCHS = {
    "rkm_lm": script.language_model(LINES, UNITS),
    "rkm": script.translation(LINES, LINES[::-1], UNITS),
    "rkm_classifier": script.classification(LINES, CLASSES, UNITS),
}
SHRINKS = {"rkm_lm": 0.9, "rkm": 0.9, "rkm_classifier": 1.5}
"""The last losses over the first, at most. A classifier's batches are too small to tell so soon that it learns."""


def losses(arch, **flags):
    torch.manual_seed(1)
    build, loss = ARCHS[arch]
    return list(script.train(build(**flags), loss, RATE, UPDATES))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("flags", [{}, {"no_feedback": True}], ids=["feedback", "no feedback"])
def test_every_cell_trains_with_its_defaults(arch, flags):
    for cell in CELLS:
        found = losses(arch, cell=cell, **flags)
        assert len(found) == UPDATES, cell
        assert sum(found[-5:]) < SHRINKS[arch] * sum(found[:5]), (cell, found)


@pytest.mark.parametrize("cell", ["rkm_lstm", "rkm_cifg", "linear_kernel_gated"])
def test_without_the_bound_they_do_not(cell):
    found = losses("rkm_lm", cell=cell, memory_clip="none")
    assert len(found) < UPDATES or not math.isfinite(found[-1]) or max(found) > 2 * found[0]
