import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from fairseq_rkm.experiments import translation_run, translation_table

ROOT = Path(__file__).parents[2]


def test_each_model_s_flags_on_a_gpu_and_on_a_cpu(tmp_path, monkeypatch):
    about = {"languages": ["de", "en"], "splits": {"train": "train", "valid": "val", "test": "test"}}
    (tmp_path / "data.json").write_text(json.dumps(about))
    args = translation_table.parse([str(tmp_path), "--out", "out", "--train-flags=--dropout 0.7"])

    def all_flags(on_gpu):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
        return {model: translation_run.Run(args, model, 5).flags() for model in translation_run.MODELS}

    on_cpu, on_gpu = all_flags(False), all_flags(True)
    graphed = {model for model, flags in on_gpu.items() if "--cuda-graphs" in flags}
    assert graphed == set(on_gpu) - {"rkm_lstm_input_feeding", "fairseq_lstm", "fairseq_transformer"}
    for flags in on_cpu.values():
        assert "--cuda-graphs" not in flags
        assert "--cpu" in flags
    for flags in (*on_gpu.values(), *on_cpu.values()):
        assert flags[flags.index("--seed") + 1] == "5"
        assert flags.index("0.7") > max(i for i, flag in enumerate(flags) if flag == "--dropout"), "the user's counts"
    assert not any("--cpu" in flags for flags in on_gpu.values())


@pytest.mark.slow
def test_out_of_time_before_anything_began(tmp_path):
    about = {"languages": ["de", "en"], "splits": {"train": "train", "valid": "val", "test": "test"}}
    (tmp_path / "data.json").write_text(json.dumps(about))
    command = [sys.executable, ROOT / "examples/translation/table.py", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--time-limit", "0"], capture_output=True, text=True, check=True)
    assert "out of time, 1 not done: the same command goes on" in done.stdout


def test_too_few_updates_to_time(tmp_path, capsys):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(SystemExit):
        translation_table.parse([str(tmp_path), "--out", "out", "--speed", "--speed-updates", "19"])
    assert "--speed-updates must be at least 20: tokens/s are logged that often" in capsys.readouterr().err


def test_too_few_minutes_for_an_epoch_are_told_and_trained_on_when_there_are_more(tmp_path):
    (tmp_path / "data.json").write_text('{"languages": ["de", "en"], "splits": {}}')
    arguments = Namespace(data=tmp_path, out=tmp_path, minutes=10.0, average=5)
    unfinished = translation_run.Run(arguments, "rkm_lstm", 1)
    unfinished.folder.mkdir()
    (unfinished.folder / "trained").touch()
    with pytest.raises(SystemExit, match="no whole epoch after 10 minutes: allow more of them, as --minutes 20"):
        unfinished._choose()
    assert not (unfinished.folder / "trained").exists()
