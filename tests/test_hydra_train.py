import pytest

from fairseq_rkm.hydra_train import from_here


def test_a_folder_that_is_here_becomes_absolute(tmp_path, monkeypatch):
    here = tmp_path / "it's here"
    for folder in (here / "run", tmp_path / "x" / "fairseq_rkm"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    wanted = f"'{tmp_path / 'x' / 'fairseq_rkm'}'"
    for value in ("../x/fairseq_rkm", "'../x/fairseq_rkm'", '"../x/fairseq_rkm"', str(tmp_path / "x" / "fairseq_rkm")):
        assert from_here(f"common.user_dir={value}") == f"common.user_dir={wanted}"
    assert from_here("+common.user_dir=../x/fairseq_rkm") == f"+common.user_dir={wanted}"
    assert from_here("common.user_dir=run").endswith("it\\'s here/run'")


@pytest.mark.parametrize(
    "word",
    [
        "common.user_dir=not/here", "common.user_dir=", "common.user_dir='", "common.user_dir", "task.data=run",
        "common.user_dir='${hydra:runtime.cwd}/run'", "--config-dir", "",
    ],
)  # fmt: skip
def test_all_else_stays(word, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert from_here(word) == word
