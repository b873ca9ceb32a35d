import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary, data_utils
from omegaconf import OmegaConf

from cli.conftest import ROOT, SMALL, TASK, fairseq, hydra_flags, succeed
from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.experiments import temperature_tuning
from fairseq_rkm.models import RKMLanguageModel, RKMModel
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder


def perplexity(result) -> float:
    return float(re.search(r"Perplexity: ([\d.]+)", result.output)[1])


def one_pass_perplexity(checkpoint, data, split) -> tuple[float, int]:
    """Score a split by one forward pass over all of its text."""
    state = torch.load(checkpoint, weights_only=True)
    dictionary = Dictionary.load(str(data / "dict.txt"))
    decoder = RKMLanguageModelDecoder(OmegaConf.create(state["cfg"]["model"]), dictionary, dictionary)
    decoder.load_state_dict({name.removeprefix("decoder."): value for name, value in state["model"].items()})
    sentences = data_utils.load_indexed_dataset(str(data / split), dictionary)
    tokens = torch.cat([sentences[i] for i in range(len(sentences))]).long()
    source = torch.cat([torch.tensor([dictionary.eos()]), tokens[:-1]])
    with torch.no_grad():
        logits, _ = decoder.eval()(source.unsqueeze(0))
    return math.exp(torch.nn.functional.cross_entropy(logits[0], tokens).item()), len(tokens)


def test_training_learns_and_counts_every_token(trained, data):
    run, result = trained
    first, second = result.entries("valid")
    assert float(second["valid_ppl"]) < float(first["valid_ppl"]) < 30
    tokens = re.search(r"train.txt: \d+ sents, (\d+) tokens", (data / "preprocess.log").read_text())[1]
    updates = [e for e in result.entries("train_inner") if int(e["epoch"]) == 1]
    assert sum(round(float(e["wpb"])) for e in updates) == int(tokens)
    assert len(updates) == math.ceil(math.ceil(int(tokens) / 4) / 7)
    assert (run / "checkpoint_best.pt").is_file()


@pytest.mark.parametrize(
    ("precision", "device"),
    [
        ("--bf16", "cpu"),
        *(pytest.param(flag, "cuda", marks=pytest.mark.gpu) for flag in ("--bf16", "--fp16", "--amp")),
    ],
)
def test_narrow_types_begin_as_float32_does_and_learn(data, tmp_path, precision, device):
    # At this rate an unbounded memory grows beyond float16 within ten updates.
    common = [flag for flag in SMALL if flag != "--cpu"] + ["--ngram", 2, "--memory-clip", 1]
    wide = succeed("train", data, *common, "--cpu", "--max-update", 40, "--no-save", "--save-dir", tmp_path / "wide")
    narrow = [*common, *(["--cpu"] if device == "cpu" else []), precision, "--max-epoch", 2]
    result = succeed("train", data, *narrow, "--save-dir", tmp_path / "narrow")
    losses, wanted = ([float(e["loss"]) for e in r.entries("train_inner")] for r in (result, wide))
    assert len(wanted) == 40
    assert losses[:6] == pytest.approx(wanted[:6], rel=0.01)
    assert losses[:40] != wanted, "all of it in float32"
    assert [float(e["valid_loss"]) for e in result.entries("valid")][-1] < 0.95 * losses[0]


def test_eval_lm_is_one_pass_over_the_whole_text(trained, data):
    run, _ = trained
    checkpoint = run / "checkpoint_best.pt"
    result = succeed(
        "eval_lm", data, *TASK, "--path", checkpoint, "--gen-subset", "test", "--batch-size", 1, "--cpu",
        "--tokens-per-sample", 5,
    )  # fmt: skip
    expected, tokens = one_pass_perplexity(checkpoint, data, "test")
    assert perplexity(result) == pytest.approx(expected, abs=0.006)
    assert f"Evaluated {tokens:,} tokens" in result.output


def test_eval_lm_with_several_streams_counts_every_token_too(trained, data):
    run, _ = trained
    result = succeed("eval_lm", data, *TASK, "--path", run / "checkpoint_best.pt", "--batch-size", 4, "--cpu")
    _, tokens = one_pass_perplexity(run / "checkpoint_best.pt", data, "test")
    assert f"Evaluated {tokens:,} tokens" in result.output
    assert perplexity(result) < 30


def test_with_reset_at_eos_a_stream_is_scored_sentence_by_sentence(data, tmp_path):
    flags = ["--reset-at-eos", "--ngram", 2, "--max-update", 3, "--criterion", "cross_entropy_ar_tar"]
    succeed("train", data, *SMALL, *flags, "--save-dir", tmp_path)
    common = ["--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "test", "--cpu"]
    stream = succeed("eval_lm", data, *TASK, *common, "--batch-size", 1, "--tokens-per-sample", 5)
    alone = succeed(
        "eval_lm", data, "--user-dir", "fairseq_rkm", "--task", "language_modeling", *common, "--sample-break-mode",
        "eos", "--batch-size", 4, "--required-batch-size-multiple", 1,
    )  # fmt: skip
    assert perplexity(stream) == perplexity(alone)


def test_fairseq_validate_agrees_with_training_s_validation(trained, data):
    run, training = trained
    result = succeed(
        "validate", data, *TASK, "--path", run / "checkpoint_best.pt", "--batch-size", 4, "--cpu", "--valid-subset",
        "valid", "--log-format", "json",
    )  # fmt: skip
    loss = re.findall(r'"valid_loss": "([\d.]+)"', result.output)[-1]
    assert float(loss) == pytest.approx(min(float(e["valid_loss"]) for e in training.entries("valid")), abs=0.002)


@pytest.mark.parametrize("task", ["language_modeling", "stateful_language_modeling"])
def test_interactive_continues_a_prompt(trained, data, tmp_path, task):
    run, _ = trained
    prompts = tmp_path / "prompts"
    prompts.write_text("w1 w4\nw2\n")
    result = succeed(
        "interactive", data, "--user-dir", "fairseq_rkm", "--task", task, "--path",
        run / "checkpoint_best.pt", "--input", prompts, "--beam", 3, "--max-len-b", 8, "--cpu", "--buffer-size", 2,
        "--batch-size", 2,
    )  # fmt: skip
    hypotheses = re.findall(r"^H-\d+\t\S+\t(.*)$", result.output, re.M)
    assert len(hypotheses) == 2
    assert hypotheses[0].startswith("w1 w4")
    assert hypotheses[1].startswith("w2")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [[], ["--fp16"], ["--bf16"]], ids=["float32", "float16", "bfloat16"])
def test_a_gpu_scores_and_continues_as_the_cpu_does(trained, data, tmp_path, precision):
    run, _ = trained
    checkpoint = ["--path", run / "checkpoint_best.pt"]
    score = ["eval_lm", data, *TASK, *checkpoint, "--batch-size", 2]
    wanted, given = (perplexity(succeed(*score, *flags)) for flags in (["--cpu"], precision))
    assert given == pytest.approx(wanted, rel=0.01)
    prompts = tmp_path / "prompts"
    prompts.write_text("w1 w4\n")
    going_on = ["interactive", data, "--user-dir", "fairseq_rkm", "--task", "language_modeling", *checkpoint]
    result = succeed(*going_on, "--input", prompts, "--beam", 3, "--max-len-b", 8, *precision)
    assert re.search(r"^H-0\t\S+\tw1 w4( w\d+)+$", result.output, re.M)


def test_generate_scores_the_test_set_with_language_modeling(trained, data):
    run, _ = trained
    result = succeed(
        "generate", data, "--user-dir", "fairseq_rkm", "--task", "language_modeling", "--path",
        run / "checkpoint_best.pt", "--sample-break-mode", "eos", "--prefix-size", 2, "--beam", 2, "--batch-size", 4,
        "--cpu", "--required-batch-size-multiple", 1,
    )  # fmt: skip
    assert len(re.findall(r"^H-\d+", result.output, re.M)) == 9


def test_generate_wants_sentences(trained, data):
    flags = ["--path", trained[0] / "checkpoint_best.pt", "--batch-size", 4, "--cpu"]
    assert "give --task language_modeling --sample-break-mode eos" in fairseq("generate", data, *TASK, *flags).error


def test_from_python(trained, data, tmp_path):
    run, _ = trained
    model = RKMLanguageModel.from_pretrained(str(run), data_name_or_path=str(data))
    assert model.sample("w1 w4", beam=3, max_len_b=8).startswith("w1 w4 ")
    short, long = model.sample(["w2", "w1 w4 w2"], beam=1, sampling=True, sampling_topp=0.8, max_len_b=8)
    assert (short[:2], long[:8]) == ("w2", "w1 w4 w2")
    words = model.encode("w1 w4 w2")[:-1]  # the end of the sentence is not scored
    scores = model.score("w1 w4 w2")["positional_scores"]
    read = torch.cat([words.new_tensor([model.task.dictionary.eos()]), words])[None, :-1]
    outputs, _ = model.models[0](read)
    torch.testing.assert_close(scores, outputs[0].log_softmax(-1).gather(1, words[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    shutil.copy(data / "dict.txt", tmp_path)
    shutil.copy(run / "checkpoint_best.pt", tmp_path)
    beside = RKMLanguageModel.from_pretrained(str(tmp_path))
    torch.testing.assert_close(beside.score("w1 w4 w2")["positional_scores"], scores, rtol=0, atol=0)


def test_mistakes_from_python(trained, data, tmp_path):
    folder, (run, _) = str(data), trained
    with pytest.raises(RKMError, match=r"checkpoint_best.pt is of a model .rkm_lm., which does not translate"):
        RKMModel.from_pretrained(str(run), "checkpoint_best.pt", folder)
    with pytest.raises(RKMError, match=r"no dictionary at"):
        RKMLanguageModel.from_pretrained(str(run))
    with pytest.raises(RKMError, match=r"no model at"):
        RKMLanguageModel.from_pretrained(str(tmp_path / "none"), data_name_or_path=folder)
    with pytest.raises(RKMError, match=r"no checkpoint model.pt in"):
        RKMLanguageModel.from_pretrained(str(run), "model.pt", folder)
    (tmp_path / "model.pt").write_bytes((run / "checkpoint_best.pt").read_bytes()[:1000])
    with pytest.raises(RKMError, match=r"model.pt"):
        RKMLanguageModel.from_pretrained(str(tmp_path), "model.pt", folder)


def test_fairseq_s_own_task_trains_it_with_an_adaptive_softmax_and_word_vectors(data, tmp_path):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("\n".join(f"w{i} " + " ".join(["0.5"] * 8) for i in range(20)) + "\n")
    result = succeed(
        "train", data, "--user-dir", "fairseq_rkm", "--task", "language_modeling", "--arch", "rkm_lm", "--cell",
        "rkm_cifg", "--ngram", 3, "--layer-norm", "--decoder-embed-dim", 8, "--decoder-hidden-size", 12,
        "--decoder-embed-path", vectors, "--adaptive-softmax-cutoff", "8,16", "--criterion", "adaptive_loss",
        "--ddp-backend", "legacy_ddp",
        "--tokens-per-sample", 12, "--sample-break-mode", "eos", "--batch-size", 8, "--optimizer", "adam", "--lr",
        0.02, "--max-epoch", 3, "--cpu", "--num-workers", 0, "--save-dir", tmp_path / "run", "--log-format", "json",
        "--no-epoch-checkpoints",
    )  # fmt: skip
    known = set((data / "dict.txt").read_text().split()) & {f"w{i}" for i in range(20)}
    assert f"{len(known)} of the dictionary's" in result.output
    assert float(result.entries("valid")[-1]["valid_ppl"]) < 25
    scored = succeed(
        "eval_lm", data, "--user-dir", "fairseq_rkm", "--task", "language_modeling", "--path",
        tmp_path / "run/checkpoint_best.pt", "--batch-size", 4, "--tokens-per-sample", 12, "--sample-break-mode",
        "eos", "--cpu",
    )  # fmt: skip
    assert perplexity(scored) < 25


@pytest.mark.parametrize("cell", ["lstm", "linear_kernel_gated", "ran", "gated_cnn"])
def test_other_cells_train_through_the_same_command(data, tmp_path, cell):
    flags = ["--cell", cell, "--learn-sigma", "--no-feedback", "--max-update", 3, "--dropout-words", 0.1]
    flags += ["--learn-initial-state"] if CELLS[cell].has_memory else []
    result = succeed("train", data, *SMALL, *flags, "--dropout-weights", 0.1, "--save-dir", tmp_path)
    assert len(result.entries("train_inner")) == 3


OURS = "fairseq_rkm.hydra_train"


@pytest.mark.parametrize(
    ("command", "user_dir"),
    [
        ("hydra_train", None), ("hydra_train", "fairseq_rkm"),
        ("hydra_train", "${hydra:runtime.cwd}/tests/../fairseq_rkm"), (OURS, "tests/../fairseq_rkm"),
        (OURS, "in YAML: tests/../fairseq_rkm"),
    ],
)  # fmt: skip
def test_hydra_train_has_the_same_flags(data, tmp_path, command, user_dir):
    changes = ["model.cell=ran", "optimizer._name=adam"]
    if user_dir == "fairseq_rkm" and not Path(find_spec("fairseq").origin).parents[1].joinpath(user_dir).exists():
        pytest.skip("the plugin is not installed beside fairseq, where scripts/setup.sh links it")
    flags = hydra_flags(data, tmp_path)
    if user_dir and user_dir.startswith("in YAML"):
        path, absolute = tmp_path / "small.yaml", f"user_dir: {ROOT}/fairseq_rkm"
        path.write_text(path.read_text().replace(absolute, user_dir.replace("in YAML", "user_dir")))
    elif user_dir:
        changes.append(f"common.user_dir='{user_dir}'")
    result = succeed(command, *flags, *changes)
    log = result.output + "".join(p.read_text() for p in (tmp_path / "out").glob("*.log"))
    assert '"num_updates": "3"' in log


def test_a_continuous_cache_evaluates_the_same_however_the_text_is_cut(trained, data):
    run, _ = trained
    flags = [*TASK, "--path", run / "checkpoint_best.pt", "--batch-size", 1, "--cpu", "--cache-size", 20]
    flags += ["--cache-theta", 0.5, "--cache-lambda", 0.3]
    short, long = (perplexity(succeed("eval_lm", data, *flags, "--tokens-per-sample", n)) for n in (5, 50))
    assert short == pytest.approx(long, abs=0.011)
    assert abs(short - one_pass_perplexity(run / "checkpoint_best.pt", data, "test")[0]) > 0.05


def test_tune_cache_finds_what_eval_lm_then_reports(trained, data):
    run, _ = trained
    command = [sys.executable, ROOT / "examples/language_model/tune_cache.py", data, run / "checkpoint_best.pt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    output = subprocess.run(
        [*command, "--size", "30"], capture_output=True, text=True, check=True, env=environment
    ).stdout
    flags = re.search(r"--cache-size 30 --cache-theta \S+ --cache-lambda \S+", output)[0].split()
    result = succeed(
        "eval_lm", data, *TASK, "--path", run / "checkpoint_best.pt", "--batch-size", 1, "--cpu", *flags,
        "--gen-subset", "valid",
    )  # fmt: skip
    best = float(re.search(r"perplexity\n\s*\S+\s+\S+\s+(\S+)", output)[1])
    assert perplexity(result) == pytest.approx(best, abs=0.011)


def test_tune_temperature_finds_what_eval_lm_then_reports(trained, data, monkeypatch, capsys):
    """Beside a cache, too."""
    run, _ = trained
    cache = ["--cache-size", "30", "--cache-theta", "0.3", "--cache-lambda", "0.2"]
    found = {}
    for beside in ([], cache):
        monkeypatch.setattr(sys, "argv", ["tune_temperature", str(data), str(run / "checkpoint_best.pt"), *beside])
        temperature_tuning.main()
        output = capsys.readouterr().out
        found[len(beside)] = float(re.search(r"perplexity\n\s*\S+\s+(\S+)", output)[1])
    assert f"--softmax-temperature {temperature(output)} {' '.join(cache)}" in output
    assert temperature(output) != 1.0
    result = succeed(
        "eval_lm", data, *TASK, "--path", run / "checkpoint_best.pt", "--batch-size", 1, "--cpu", "--gen-subset",
        "valid", "--softmax-temperature", temperature(output), *cache,
    )  # fmt: skip
    assert perplexity(result) == pytest.approx(found[len(cache)], abs=0.011)
    plain, _ = one_pass_perplexity(run / "checkpoint_best.pt", data, "valid")
    assert found[0] < plain


def temperature(output: str) -> float:
    return float(re.search(r"--softmax-temperature (\S+)", output)[1])


def test_dynamic_evaluation_learns_the_text_that_eval_lm_scores(trained, data):
    run, _ = trained
    flags = [*TASK, "--path", run / "checkpoint_best.pt", "--batch-size", 1, "--cpu", "--tokens-per-sample", 5]
    learned = succeed("eval_lm", data, *flags, "--dynamic-eval", "--dynamic-lr", 0.001)
    plain, tokens = one_pass_perplexity(run / "checkpoint_best.pt", data, "test")
    assert "gradients of 5 training segments are measured" in learned.output
    assert f"Evaluated {tokens:,} tokens" in learned.output
    assert 0.01 < abs(perplexity(learned) - plain) < 1
