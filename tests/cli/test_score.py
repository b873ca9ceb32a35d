"""``python -m fairseq_rkm.score`` and ``.venv``'s fairseq-score, against fairseq's scorer and sacrebleu's command."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from fairseq.data.dictionary import Dictionary
from fairseq.scoring import bleu
from fairseq_cli import score as fairseq_score
from hypothesis import example, given
from hypothesis import strategies as st

from cli.conftest import ROOT
from fairseq_rkm import score

MANUAL = (ROOT / "docs" / "fairseq_flags.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^\| (?:`(--[^`]+)`|no other flag) \| `sacrebleu REF -i OUT ?(.*)` \|$", MANUAL, re.M))
"""The flags of sacrebleu's command that give the numbers of each flag of fairseq-score."""

OUTPUT = ["a black dog runs in the snow .", "two men sit", "A girl is at the window and is looking out .", "dogs"]
REFERENCE = ["A black dog runs in the snow.", "two men sit down .", "a girl is looking out of the window .", "dogs"]


def write(folder: Path, output: list[str], reference: list[str]) -> None:
    """Write the files OUT and REF."""
    for name, lines in (("OUT", output), ("REF", reference)):
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """The folder of the files OUT and REF, in which commands run."""
    write(tmp_path, OUTPUT, REFERENCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ours(capsys, *flags: str) -> list[float]:
    """The scores that ours prints, one a line."""
    score.main(["--sys", "OUT", "--ref", "REF", *flags])
    return [float(found) for found in re.findall(r"BLEU4? = ([\d.]+)", capsys.readouterr().out)]


def refusal(*flags: str) -> str:
    """The sentence that ours ends with."""
    with pytest.raises(SystemExit) as end:
        score.main(flags)
    assert isinstance(end.value.code, str), "status 0, or no sentence"
    return end.value.code


def of_sacrebleu_s_command(flags: str, folder: Path) -> list[float]:
    """The scores of sacrebleu's command that the manual gives for flags of fairseq-score, one a line."""
    command = [sys.executable, "-m", "sacrebleu", "REF", "-i", "OUT", *COMMANDS[flags].split(), "-b", "-w", "2"]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return [float(line.split(" = ")[-1].split()[0]) for line in output.splitlines()]


@pytest.mark.parametrize("flags", COMMANDS)
def test_sacrebleu_s_command_in_the_manual_gives_the_same_numbers(flags, texts, capsys):
    write(texts, [*OUTPUT, "", "no words here"], [*REFERENCE, "a reference", ""])
    numbers = ours(capsys, *flags.split())
    assert len(numbers) == (6 if "sentence" in flags else 1)
    assert numbers == of_sacrebleu_s_command(flags, texts)


def test_the_manual_gives_a_command_for_each_flag():
    assert set(COMMANDS) == {"", "--ignore-case", "--sacrebleu", "--sentence-bleu"}


@pytest.mark.parametrize("flags", [[], ["--ignore-case"], ["--order", "2"]])
def test_whole_texts_are_reported_as_by_fairseq(flags, texts, monkeypatch, capsys):
    flags = ["--sys", "OUT", "--ref", "REF", *flags]
    score.main(flags)
    report = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fairseq-score", *flags])
    fairseq_score.cli_main()
    assert report == capsys.readouterr().out


def test_sentences_are_scored_as_by_fairseq_s_scorer(texts, capsys):
    words = Dictionary()
    scorer = bleu.Scorer(bleu.BleuConfig(pad=words.pad(), eos=words.eos(), unk=words.unk()))
    lines = []
    for number, (output, reference) in enumerate(zip(OUTPUT, REFERENCE, strict=True)):
        scorer.reset(one_init=True)
        scorer.add(words.encode_line(reference), words.encode_line(output))
        lines.append(f"{number} {scorer.result_string()}")
    score.main(["--sys", "OUT", "--ref", "REF", "--sentence-bleu"])
    assert capsys.readouterr().out.splitlines()[1:] == lines


SENTENCES = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)


@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=5))
@example([("", "a")])
@example([("a", "")])
@example([("", "")])
def test_sentences_without_words_count_as_none(pairs):
    whole = score.NgramCounter()
    for output, reference in pairs:
        whole.add(output, reference)
        one = score.NgramCounter()
        one.scorer.reset(one_init=True)
        one.add(output, reference)
        expected = sacrebleu.sentence_bleu(output, [reference], smooth_method="add-k", tokenize="none").score
        assert float(one.result(4).split()[2].strip(",")) == pytest.approx(expected, abs=0.006)
    outputs, references = zip(*pairs, strict=True)
    expected = sacrebleu.corpus_bleu(outputs, [references], smooth_method="none", tokenize="none")
    assert float(whole.result(4).split()[2].strip(",")) == pytest.approx(expected.score, abs=0.006)
    assert f"syslen={expected.sys_len}, reflen={expected.ref_len}" in whole.result(4)


def test_lines_of_symbols_that_are_no_words_count_as_empty():
    """Beyond the end of a sentence of padding alone, fairseq's scorer goes on reading until Python ends."""
    counter = score.NgramCounter()
    counter.add("<pad>", "</s> </s>")
    counter.add("a <pad>", "<pad> a b </s>")
    assert (counter.scorer.stat.predlen, counter.scorer.stat.reflen) == (1, 2)


def test_standard_input_and_windows_line_ends_are_read(texts, monkeypatch, capsys):
    expected = ours(capsys)
    windows = "\ufeff" + "\r\n".join(OUTPUT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(windows.encode())))
    assert ours(capsys, "--sys", "-") == expected


FLAGS = ["", "--sacrebleu", "--sentence-bleu"]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("REF", b"one line\n", "OUT has 4 lines and REF has 1"),
        ("OUT", b"one line\n", "OUT has 1 lines and REF has 4"),
        ("OUT", b"", "OUT has 0 lines and REF has 4"),
        ("REF", b"", "REF has no words"),
        ("REF", b"\n \n\n\n", "REF has no words"),
        ("OUT", b"fine\nna\xefve\n", r"OUT, line 2, byte 3 \(0xef\): not UTF-8"),
        ("REF", "a".encode("utf-16"), "REF is UTF-16"),
        ("OUT", None, "no file of text at OUT"),
        ("REF", None, "no file of text at REF"),
    ],
)
def test_a_file_that_cannot_be_scored_ends_in_a_sentence(flag, name, content, sentence, texts):
    if content is None:
        (texts / name).unlink()
    else:
        (texts / name).write_bytes(content)
    assert re.search(sentence, refusal("--sys", "OUT", "--ref", "REF", *filter(None, [flag])))


def test_a_folder_in_place_of_a_file_ends_in_a_sentence(texts):
    (texts / "folder").mkdir()
    assert "Is a directory: 'folder'" in refusal("--sys", "folder", "--ref", "REF")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--sacrebleu", "--sentence-bleu"], "give one of them"),
        (["--order", "5"], "--order must be 1 to 4, not 5"),
        (["--order", "0"], "--order must be 1 to 4, not 0"),
        (["--sacrebleu", "--order", "2"], "leave out --order or --sacrebleu"),
    ],
)
def test_flags_without_a_meaning_are_refused(flags, sentence, texts, capsys):
    with pytest.raises(SystemExit, match="2"):
        score.main(["--sys", "OUT", "--ref", "REF", *flags])
    assert sentence in capsys.readouterr().err


def test_the_set_up_makes_fairseq_score_run_ours(texts):
    """The line of scripts/setup.sh changes a script as pip writes it today, here one of a neighbour's."""
    neighbour = Path(sys.executable).with_name("fairseq-preprocess")
    if not neighbour.is_file():
        pytest.skip("fairseq's scripts lie in the folder of another Python, where the set-up leaves them alone")
    script = texts / ".venv" / "bin" / "fairseq-score"
    script.parent.mkdir(parents=True)
    script.write_text(neighbour.read_text(encoding="utf-8").replace("preprocess", "score"), encoding="utf-8")
    script.chmod(0o755)
    lines = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    subprocess.run(["bash", "-euc", re.search(r"^ours\(\).*?^ours score score", lines, re.M | re.S)[0]], check=True)
    command = [sys.executable, script, "--sys", "OUT", "--ref", "REF", "--sacrebleu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sacrebleu.corpus_bleu(OUTPUT, [REFERENCE]).format() in done.stdout
