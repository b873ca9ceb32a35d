import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from parallel_text import write_text

ROOT = Path(__file__).parents[2]


def sentences(count, seed):
    draw = random.Random(seed)
    words = ["Haus", "rot", "groß", "klein", "Hund's", "läuft", "und", "schläft"]
    return [" ".join(draw.choices(words, k=draw.randrange(2, 7))) + "." for _ in range(count)]


@pytest.mark.slow
def test_from_raw_text_to_bleu_by_one_command_and_again_to_what_is_there(tmp_path):
    text = write_text(tmp_path / "text", train=sentences(400, 1), val=sentences(20, 2), test_b=sentences(15, 3))
    sizes = "--encoder-embed-dim 16 --encoder-hidden-size 16 --decoder-embed-dim 16 --decoder-hidden-size 16"
    sizes += " --max-epoch 2 --batch-size 50"
    command = ["bash", "examples/translation/run.sh", str(text), "de", "en", "--average", "2", "--train-flags", sizes]
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "FOLDER": str(out),
        "VOCABULARY": "60",
        "OMP_NUM_THREADS": "1",
    }

    def run(*flags):
        done = subprocess.run(
            [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    assert "| de-en | `rkm_lstm` |" in run()
    result = json.loads((out / "rkm_lstm-1/result.json").read_text())
    assert result["bleu"].keys() == {"test_b"}
    assert result["epochs"] == 2
    assert result["command"].startswith("fairseq-train DATA/bin ")
    assert str(tmp_path) not in result["command"]
    assert len((out / "rkm_lstm-1/test.txt").read_text().splitlines()) == 15
    assert (out / "data/raw/test.en").read_text().splitlines() == sentences(15, 3), "not what went through"
    assert f"- de: {sentences(15, 3)[0]}" in (out / "results/results.md").read_text()
    assert (out / "results/bleu.png").stat().st_size > 1000
    before = (out / "rkm_lstm-1/train.log").stat().st_mtime_ns
    run()
    assert (out / "rkm_lstm-1/train.log").stat().st_mtime_ns == before


def test_the_hydra_configuration_is_the_preset():
    from fairseq_rkm.models.translation.translation_presets import rkm_iwslt_de_en

    given = OmegaConf.load(ROOT / "examples/translation/config/multi30k_de_en.yaml").model
    preset = Namespace(cell="rkm_lstm", share_all_embeddings=True)
    rkm_iwslt_de_en(preset)
    del preset.share_decoder_input_output_embed
    assert dict(given) == {"_name": "rkm", **vars(preset)}
