import gzip
import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/translation"))

import attention_map
import prepare
import results

ROOT = Path(__file__).parents[2]


def sentences(count, seed):
    draw = random.Random(seed)
    words = ["Haus", "rot", "groß", "klein", "Hund's", "läuft", "und", "schläft"]
    return [" ".join(draw.choices(words, k=draw.randrange(2, 7))) + "." for _ in range(count)]


def write_text(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.de").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with gzip.open(folder / f"{split}.en.gz", "wt", encoding="utf-8") as compressed:
            compressed.write("\n".join(lines) + "\n")
    return folder


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
    from fairseq_rkm.models.rkm import rkm_iwslt_de_en

    given = OmegaConf.load(ROOT / "examples/translation/config/multi30k_de_en.yaml").model
    preset = Namespace(cell="rkm_lstm", share_all_embeddings=True)
    rkm_iwslt_de_en(preset)
    del preset.share_decoder_input_output_embed
    assert dict(given) == {"_name": "rkm", **vars(preset)}


def test_each_model_s_flags_on_a_gpu_and_on_a_cpu(tmp_path):
    """In a process of its own, since the experiment hides its GPUs from the process that imports it."""
    about = {"languages": ["de", "en"], "splits": {"train": "train", "valid": "val", "test": "test"}}
    (tmp_path / "data.json").write_text(json.dumps(about))
    code = f"""
import sys
sys.path.insert(0, "examples/translation")
import experiment
sys.argv = ["experiment", {str(tmp_path)!r}, "--out", "out", "--train-flags=--dropout 0.7"]
args, flags = experiment.parse_arguments(), {{}}
for on_gpu in (False, True):
    experiment.torch.cuda.is_available = lambda: on_gpu
    flags[on_gpu] = {{model: experiment.Run(args, model, 5).flags() for model in experiment.MODELS}}
print(experiment.json.dumps([flags[False], flags[True]]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    on_cpu, on_gpu = json.loads(done.stdout.splitlines()[-1])
    graphed = {model for model, flags in on_gpu.items() if "--cuda-graphs" in flags}
    assert graphed == set(on_gpu) - {"rkm_lstm_input_feeding", "fairseq_lstm", "fairseq_transformer"}
    for flags in on_cpu.values():
        assert "--cuda-graphs" not in flags
        assert "--cpu" in flags
    for flags in (*on_gpu.values(), *on_cpu.values()):
        assert flags[flags.index("--seed") + 1] == "5"
        assert flags.index("0.7") > max(i for i, flag in enumerate(flags) if flag == "--dropout"), "the user's counts"
    assert not any("--cpu" in flags for flags in on_gpu.values())


def test_out_of_time_before_anything_began(tmp_path):
    about = {"languages": ["de", "en"], "splits": {"train": "train", "valid": "val", "test": "test"}}
    (tmp_path / "data.json").write_text(json.dumps(about))
    command = [sys.executable, ROOT / "examples/translation/experiment.py", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--time-limit", "0"], capture_output=True, text=True, check=True)
    assert "out of time, 1 not done: the same command goes on" in done.stdout


def test_too_few_updates_to_time(tmp_path):
    (tmp_path / "data.json").write_text("{}")
    command = [sys.executable, ROOT / "examples/translation/experiment.py", tmp_path, "--out", tmp_path / "out"]
    flags = ["--speed", "--speed-updates", "19"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--speed-updates must be at least 20: tokens/s are logged that often" in done.stderr


def arguments(text, **flags):
    return Namespace(
        **{
            "text": text,
            "source_lang": "de",
            "target_lang": "en",
            "train": "train",
            "valid": None,
            "test": None,
            **flags,
        }
    )


def test_files_are_found_by_their_usual_names(tmp_path):
    text = write_text(tmp_path, train=["a"], dev=["a"], test_2017=["a"], test_2016=["a"])
    assert prepare.name_splits(arguments(text)) == {
        "train": "train", "valid": "dev", "test": "test_2016", "test1": "test_2017"
    }  # fmt: skip
    assert prepare.name_splits(arguments(text, valid="v", test=["t"])) == {"train": "train", "valid": "v", "test": "t"}


def test_text_that_is_not_parallel_is_refused(tmp_path):
    text = write_text(tmp_path, train=["a", "b"], val=["a"])
    with pytest.raises(SystemExit, match=r"has no test\*.en"):
        prepare.name_splits(arguments(text))
    with pytest.raises(SystemExit, match=r"has no test.de \(nor .gz or .xz\)"):
        prepare.read_pairs(text, "test", ("de", "en"), keep_empty=True)
    (text / "train.de").write_text("a\n")
    with pytest.raises(SystemExit, match=r"train.de has 1 lines and .*train.en.gz 2"):
        prepare.read_pairs(text, "train", ("de", "en"), keep_empty=False)
    (text / "train.de").write_bytes(b"\xff\xfe\n\n")
    with pytest.raises(SystemExit, match="damaged or not UTF-8"):
        prepare.read_pairs(text, "train", ("de", "en"), keep_empty=False)
    (text / "train.en.gz").write_bytes((text / "train.en.gz").read_bytes()[:15])
    (text / "train.de").write_text("a\nb\n")
    with pytest.raises(SystemExit, match=r"train.en.gz is damaged"):
        prepare.read_pairs(text, "train", ("de", "en"), keep_empty=False)


def test_empty_lines_are_left_out_of_training_and_refused_in_tests(tmp_path, capsys):
    text = write_text(tmp_path, train=["a", "b", "c"], test=["a", "", "c"])
    (text / "train.de").write_text("a\n\nc\n")
    assert prepare.read_pairs(text, "train", ("de", "en"), keep_empty=False) == [("a", "a"), ("c", "c")]
    assert "1 pairs with an empty side are left out, the first of them line 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="line 2 of test is empty in one language"):
        prepare.read_pairs(text, "test", ("de", "en"), keep_empty=True)


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


def test_no_results_and_damaged_ones(tmp_path):
    with pytest.raises(SystemExit, match=r"no \*/result.json"):
        results.read([tmp_path])
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text("{")
    with pytest.raises(SystemExit, match="has a damaged result"):
        results.read([tmp_path])


def test_a_map_of_attention_is_drawn(tmp_path):
    weights = torch.softmax(torch.randn(3, 4), dim=1)
    attention_map.draw(["\u2581Ein", "$x$", "\u65e5", "</s>"], ["\u2581A", "b", "</s>"], weights, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
