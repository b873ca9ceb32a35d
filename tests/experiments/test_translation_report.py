import pytest

from fairseq_rkm.experiments import translation_report as results


def result(model, seed, bleu, **more):
    circumstances = {"hardware": "X", "torch": "2", "commit": "c"}
    return {
        "model": model, "seed": seed, "languages": "de-en", "parameters": 1000, "bleu": {"test": bleu}, "minutes": 2.0,
        "signature": "s", "speed": None, "circumstances": circumstances, **more,
    }  # fmt: skip


def test_the_table_has_means_over_seeds_and_leaves_open_what_was_not_measured():
    rows = results.group([result("a", 1, 30.0), result("b", 1, 32.0), result("b", 2, 34.0)])
    assert [row["model"] for row in rows] == ["b", "a"]
    lines = results.markdown(rows).splitlines()
    assert lines[2] == "| de-en | `b` | 1,000 | 33.00 ± 1.41 | 2 | 2.0 |  |  |"
    assert lines[3] == "| de-en | `a` | 1,000 | 30.00 | 1 | 2.0 |  |  |"


def test_samples_stand_beside_source_and_reference(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "data.json").write_text('{"languages": ["de", "en"]}')
    for model in ("a-1", "a-2"):
        (tmp_path / model).mkdir()
    for name in ("raw/test.de", "raw/test.en", "a-1/test.txt", "a-2/test.txt"):
        (tmp_path / name).write_text("".join(f"{name} {i}\n" for i in range(10)))
    text = results.samples(tmp_path, tmp_path, ["a"], count=2)
    assert "Sentence 2\n\n- de: raw/test.de 5\n- en: raw/test.en 5\n- `a`: a-1/test.txt 5" in text
    with pytest.raises(SystemExit, match="no sample translations"):
        results.samples(tmp_path, tmp_path, ["b"])


def test_the_caption_is_wrapped_and_the_table_is_not(tmp_path):
    results.write([result("a" * 150, 1, 30.0, signature="nrefs:1 " * 20)], tmp_path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert any(len(line) > 120 for line in lines)
    assert all(len(line) <= 120 or line.startswith("|") for line in lines)
