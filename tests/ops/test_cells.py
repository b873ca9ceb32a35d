import pytest

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops import resolve_cell

EQUATIONS = {
    "lstm": ("i_t tanh(c~_t) + f_t c_{t-1}", "o_t tanh(c_t)"),
    "rkm_lstm": ("i_t c~_t + f_t c_{t-1}", "o_t c_t"),
    "rkm_cifg": ("(1 - f_t) c~_t + f_t c_{t-1}", "o_t c_t"),
    "linear_kernel_gated": ("s_i c~_t + s_f c_{t-1}", "o_t c_t"),
    "linear_kernel": ("s_i c~_t + s_f c_{t-1}", "tanh(c_t)"),
    "gated_cnn": ("s_i c~_t", "o_t c_t"),
    "cnn": ("s_i c~_t", "tanh(c_t)"),
    "ran": ("i_t c~_t + f_t c_{t-1}", "tanh(c_t)"),
}

# The weights column of the paper's Table 2, in thousands, for 1-grams and 3-grams, m = d = 300; RAN by its formula.
WEIGHTS = {
    "lstm": (720, 1440),
    "rkm_lstm": (720, 1440),
    "rkm_cifg": (540, 1080),
    "linear_kernel_gated": (360, 720),
    "linear_kernel": (180, 360),
    "gated_cnn": (180, 540),
    "cnn": (90, 270),
    "ran": (90 + 360, 270 + 720),
}


@pytest.mark.parametrize("name", CELLS)
def test_equations_are_the_paper_s(name):
    assert CELLS[name].equations() == EQUATIONS[name]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("ngram", [1, 3])
def test_weight_counts_are_the_paper_s(name, ngram):
    assert RKM(300, 300, cell=name, ngram=ngram).num_weights() == 1000 * WEIGHTS[name][ngram // 3]


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_blocks_that_backends_rely_on_are_contiguous(cell):
    assert cell.gates[0] == "candidate"
    if cell.output_is_gate:
        assert cell.gates[-1] == "output"
    if cell.has_feedback:
        first = cell.gates.index(cell.recurrent_gates[0])
        assert cell.gates[first : first + len(cell.recurrent_gates)] == cell.recurrent_gates


def test_feedback_can_be_dropped_but_not_added():
    assert not resolve_cell("lstm", feedback=False).has_feedback
    assert resolve_cell("lstm", feedback=True) is CELLS["lstm"]
    for name in ("cnn", "gated_cnn"):
        assert resolve_cell(name) == resolve_cell(name, feedback=False)
        with pytest.raises(RKMError, match=f"{name}' has no feedback"):
            resolve_cell(name, feedback=True)


def test_an_unknown_cell_is_refused_with_the_known_ones():
    with pytest.raises(RKMError, match="unknown cell 'gru'; choose one of lstm, rkm_lstm"):
        resolve_cell("gru")
