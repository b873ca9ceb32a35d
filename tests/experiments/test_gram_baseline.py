import json

import pytest
import torch

from fairseq_rkm import RKMError
from fairseq_rkm.experiments import gram_baseline


def write(path, count):
    """Documents whose class is a word at their end or at their start."""
    rows = []
    for i in range(count):
        filler = [f"w{(7 * i + k) % 11}" for k in range(4)]
        rows.append(f'"{1 + i % 2}","{" ".join([*filler, "left" if i % 2 else "right"])}"')
    path.write_text("\n".join(rows) + "\n")


def test_documents_that_a_word_tells_apart_are_told_apart(tmp_path, capsys):
    write(tmp_path / "train.csv", 60)
    write(tmp_path / "test.csv", 20)
    out = tmp_path / "result.json"
    gram_baseline.main([
        "--train", str(tmp_path / "train.csv"), "--test", str(tmp_path / "test.csv"), "--kernels", "linear", "gaussian",
        "--features", "16", "--documents", "40", "--out", str(out),
    ])  # fmt: skip
    result = json.loads(out.read_text())
    assert [row["model"] for row in result["rows"]] == ["logistic regression", "linear kernel", "gaussian kernel"]
    assert all(row["accuracy"] == 100 for row in result["rows"])
    assert capsys.readouterr().out.count("100.00%") == 3
    assert result["circumstances"]["commit"]


def test_numbers_go_to_the_kernels_that_have_them(tmp_path, capsys):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.csv", 30)
    flags = ["--train", str(tmp_path / "train.csv"), "--test", str(tmp_path / "test.csv"), "--features", "4"]
    gram_baseline.main([*flags, "--kernels", "linear", "arccos", "gaussian", "--degree", "0", "--scale", "3"])
    assert capsys.readouterr().out.count(" kernel ") == 3
    with pytest.raises(SystemExit, match="gram: error: the degree of the kernel 'arccos' must be 0 or 1, not 5"):
        gram_baseline.main([*flags, "--kernels", "arccos", "--degree", "5"])


def test_a_gaussian_s_own_scale_is_the_length_of_a_window():
    sequences = [torch.full((5, 4), 3.0)]
    assert gram_baseline.parameters("gaussian", None, None, sequences, 4) == {"degree": None, "scale": 12.0}
    assert gram_baseline.parameters("linear", 2, 3.0, sequences, 1) == {"degree": None, "scale": None}


def test_documents_are_taken_evenly(tmp_path):
    write(tmp_path / "a.csv", 10)
    assert [d.line for d in gram_baseline.evenly(tmp_path / "a.csv", 5)] == [1, 3, 5, 7, 9]
    assert len(gram_baseline.evenly(tmp_path / "a.csv", 99)) == 10
    (tmp_path / "b.csv").write_text("\n")
    with pytest.raises(RKMError, match="holds no labelled documents"):
        gram_baseline.evenly(tmp_path / "b.csv", 5)


def test_a_normalised_matrix_has_ones_on_its_diagonal():
    points = torch.randn(4, 3, dtype=torch.float64)
    points[2] = 0
    gram = gram_baseline.normalised(points @ points.t())
    torch.testing.assert_close(gram.diagonal(), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
