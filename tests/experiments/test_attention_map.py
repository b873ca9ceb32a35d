import torch

from fairseq_rkm.experiments import attention_map


def test_a_map_of_attention_is_drawn(tmp_path):
    weights = torch.softmax(torch.randn(3, 4), dim=1)
    attention_map.draw(["\u2581Ein", "$x$", "\u65e5", "</s>"], ["\u2581A", "b", "</s>"], weights, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
