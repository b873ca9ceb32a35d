import pytest
import torch
from matplotlib import font_manager

from fairseq_rkm.experiments import attention_map


@pytest.mark.filterwarnings("error")
def test_a_map_of_attention_is_drawn(tmp_path, capsys):
    weights = torch.softmax(torch.randn(3, 4), dim=1)
    attention_map.draw(["\u2581Ein", "$x$", "\ue123", "</s>"], ["\u2581A", "b", "</s>"], weights, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == "no font here has \ue123: a box stands in the picture for each\n"


def test_letters_that_the_usual_font_lacks_are_drawn_in_another():
    script, unknown = "\U0001d49c", "\ue123"  # no letters of DejaVu Sans
    families, missing = attention_map.fonts_with({"a", script, unknown})
    assert missing == {unknown}
    assert families[0] == "sans-serif"
    assert len(families) == 2
    assert ord(script) in font_manager.get_font(font_manager.findfont(families[1])).get_charmap()
    assert attention_map.fonts_with({"a", "\u00e4"}) == (["sans-serif"], set())
