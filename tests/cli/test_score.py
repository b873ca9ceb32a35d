"""Scores of fairseq-score and of the commands that docs/fairseq_flags.md gives in its place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from fairseq.data.dictionary import Dictionary
from fairseq.scoring import bleu
from fairseq_cli import score

from cli.conftest import ROOT

MANUAL = (ROOT / "docs" / "fairseq_flags.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^\| (?:`(--\S+)`|no other flag) \| `sacrebleu REF -i OUT ?(.*)` \|$", MANUAL, re.M))
"""The flags of sacrebleu's command in place of each flag of fairseq-score."""

OUTPUT = ["a black dog runs in the snow .", "two men sit", "A girl is at the window and is looking out .", "dogs"]
REFERENCE = ["A black dog runs in the snow.", "two men sit down .", "a girl is looking out of the window .", "dogs"]


@pytest.fixture
def texts(tmp_path):
    """The files OUT and REF."""
    for name, lines in (("OUT", OUTPUT), ("REF", REFERENCE)):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return tmp_path


def in_its_place(flag: str, folder: Path) -> list[float] | str:
    """Run sacrebleu's command in place of fairseq-score with a flag; its scores, a line each, or its last words."""
    command = [sys.executable, "-m", "sacrebleu", "REF", "-i", "OUT", *COMMANDS[flag].split(), "-b", "-w", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.splitlines()[-1]
    return [float(line.split(" = ")[-1].split()[0]) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("flag", ["", "--ignore-case"])
def test_the_command_in_place_gives_fairseq_score_s_number(flag, texts, monkeypatch, capsys):
    flags = ["--sys", str(texts / "OUT"), "--ref", str(texts / "REF"), *filter(None, [flag])]
    monkeypatch.setattr(sys, "argv", ["fairseq-score", *flags])
    score.cli_main()
    number = float(re.search(r"BLEU4 = ([\d.]+)", capsys.readouterr().out)[1])
    assert number > 0
    assert in_its_place(flag, texts) == [number]


def test_the_command_in_place_of_sacrebleu_gives_its_number(texts):
    assert in_its_place("--sacrebleu", texts) == [round(sacrebleu.corpus_bleu(OUTPUT, [REFERENCE]).score, 2)]
    assert in_its_place("--sacrebleu", texts) != in_its_place("", texts)


def test_the_command_in_place_scores_sentences_as_fairseq_s_scorer_does(texts):
    words = Dictionary()
    scorer = bleu.Scorer(bleu.BleuConfig(pad=words.pad(), eos=words.eos(), unk=words.unk()))
    scores = []
    for output, reference in zip(OUTPUT, REFERENCE, strict=True):
        scorer.reset(one_init=True)
        scorer.add(words.encode_line(reference), words.encode_line(output))
        scores.append(scorer.score())
    assert in_its_place("--sentence-bleu", texts) == pytest.approx(scores, abs=0.006)


def test_the_command_in_place_refuses_files_of_different_lengths(texts):
    (texts / "REF").write_text("one line\n", encoding="utf-8")
    assert "different lengths" in in_its_place("", texts)
