"""fairseq's translation commands end to end: two languages that a model can learn to the last sentence in seconds."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from fairseq.data.encoders.moses_tokenizer import MosesTokenizer, MosesTokenizerConfig

from cli.conftest import ROOT, Result, fairseq, succeed

TASK = ["--user-dir", "fairseq_rkm", "--task", "translation", "--source-lang", "xx", "--target-lang", "yy"]
TRAIN = [
    *TASK, "--arch", "rkm_tiny", "--criterion", "cross_entropy", "--optimizer", "adam", "--lr", "0.004",
    "--lr-scheduler", "polynomial_decay", "--warmup-updates", "100", "--clip-norm", "0.3", "--batch-size", "50",
    "--cpu", "--num-workers", "0", "--no-epoch-checkpoints", "--log-format", "json", "--seed", "1",
]  # fmt: skip
GENERATE = [*TASK, "--cpu", "--num-workers", "0"]


def train(data: Path, run: Path, updates: int, *flags: object) -> Path:
    """The best checkpoint."""
    succeed("train", data, *TRAIN, "--total-num-update", updates, "--max-update", updates, "--save-dir", run, *flags)
    return run / "checkpoint_best.pt"


def hypotheses(result: Result, kind: str = "H") -> dict[int, str]:
    return {int(i): text for i, text in re.findall(rf"^{kind}-(\d+)\t\S+\t(.*)$", result.output, re.M)}


def exact(given: dict[int, str], wanted: list[str]) -> float:
    assert len(given) == len(wanted)
    return sum(given[i] == text for i, text in enumerate(wanted)) / len(wanted)


def write(folder: Path, splits: dict[str, list[tuple[str, str]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, pairs in splits.items():
        for side, language in enumerate(("xx", "yy")):
            (folder / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs))
    return folder


def preprocess(text: Path, data: Path, *flags: object) -> Path:
    prefixes = [item for split in ("train", "valid", "test") for item in (f"--{split}pref", text / split)]
    succeed("preprocess", "-s", "xx", "-t", "yy", *prefixes, "--destdir", data, "--padding-factor", 1, *flags)
    return data


# Copying, word by word, with names that no dictionary has.


def copies(count: int, seed: int) -> list[tuple[str, str]]:
    draw, pairs = random.Random(seed), []
    for _ in range(count):
        words = [draw.choice("abcdefghijkl") for _ in range(draw.randrange(1, 9))]
        if draw.random() < 0.5:
            words[draw.randrange(len(words))] = f"name{draw.randrange(10**9)}"
        pairs.append((" ".join(words),) * 2)
    return pairs


@pytest.fixture(scope="module")
def copying(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Text, data and checkpoint."""
    folder = tmp_path_factory.mktemp("copying")
    splits = {"train": copies(4000, 1), "valid": copies(60, 2), "test": copies(203, 3)}
    text = write(folder / "text", splits)
    data = preprocess(text, folder / "data", "--thresholdsrc", 3, "--thresholdtgt", 3)
    return text, data, train(data, folder / "run", 800)


def test_copying_is_learnt_and_unknown_words_are_copied_through_attention(copying, tmp_path):
    text, data, checkpoint = copying
    raw = tmp_path / "raw"
    succeed(
        "preprocess", "-s", "xx", "-t", "yy", "--testpref", text / "test", "--destdir", raw, "--dataset-impl", "raw",
        "--srcdict", data / "dict.xx.txt", "--tgtdict", data / "dict.yy.txt",
    )  # fmt: skip
    flags = ["--path", checkpoint, "--beam", 3, "--batch-size", 50, "--dataset-impl", "raw", "--replace-unk"]
    result = succeed("generate", raw, *GENERATE, *flags)
    wanted = (text / "test.yy").read_text().splitlines()
    assert sum("name" in line for line in wanted) > 50
    assert exact(hypotheses(result), wanted) > 0.99
    assert not re.search("^A-", result.output, re.M), "the alignment was not asked for"


# Reversing, in subwords of tokenised text.

SYLLABLES = ["ka", "lo", "mi", "ru", "te", "so", "na", "be"]
VOCABULARY = [a + b for a in SYLLABLES for b in SYLLABLES[:3]]


def reversals(count: int, seed: int) -> list[tuple[str, str]]:
    draw, pairs = random.Random(seed), []
    for _ in range(count):
        words = [draw.choice(VOCABULARY) for _ in range(draw.randrange(1, 8))]
        end = draw.choice([".", "?", ""])
        pairs.append((" ".join(words) + end, " ".join(reversed(words)) + end))
    return pairs


@pytest.fixture(scope="module")
def reversing(tmp_path_factory) -> tuple[list[tuple[str, str]], Path, Path, Path]:
    """Raw pairs of the test set, data, sentencepiece model and checkpoint."""
    folder = tmp_path_factory.mktemp("reversing")
    splits = {"train": reversals(6000, 1), "valid": reversals(60, 2), "test": reversals(200, 3)}
    moses = MosesTokenizer(MosesTokenizerConfig())
    tokenised = {split: [tuple(map(moses.encode, pair)) for pair in pairs] for split, pairs in splits.items()}
    lines = (line for pair in tokenised["train"] for line in pair)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "pieces"), vocab_size=50, model_type="bpe", minloglevel=3
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    encoded = {
        split: [tuple(" ".join(pieces.encode(line, out_type=str)) for line in pair) for pair in pairs]
        for split, pairs in tokenised.items()
    }
    data = preprocess(write(folder / "text", encoded), folder / "data", "--joined-dictionary")
    checkpoint = train(data, folder / "run", 900, "--share-all-embeddings")
    return splits["test"], data, folder / "pieces.model", checkpoint


def subwords(pieces: Path) -> list[object]:
    return ["--tokenizer", "moses", "--bpe", "sentencepiece", "--sentencepiece-model", pieces]


@pytest.fixture(scope="module")
def generated(reversing) -> Result:
    _, data, pieces, checkpoint = reversing
    return succeed(
        "generate", data, *GENERATE, *subwords(pieces), "--path", checkpoint, "--beam", 3, "--batch-size", 64
    )


def test_reversal_is_learnt(reversing, generated):
    assert exact(hypotheses(generated, "D"), [target for _, target in reversing[0]]) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [[], ["--fp16"], ["--bf16"]], ids=["float32", "float16", "bfloat16"])
def test_training_with_graphs_is_the_same_training(reversing, tmp_path, precision):
    _, data, _, _ = reversing
    on_gpu = [flag for flag in TRAIN if flag != "--cpu"]
    flags = [
        *on_gpu,
        "--total-num-update",
        240,
        "--max-update",
        240,
        "--dropout",
        0.1,
        "--log-interval",
        40,
        *precision,
    ]
    losses = [
        [float(e["loss"]) for e in succeed("train", data, *flags, *graphs, "--save-dir", run).entries("train_inner")]
        for run, graphs in ((tmp_path / "plain", []), (tmp_path / "graphs", ["--cuda-graphs"]))
    ]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [[], ["--fp16"]], ids=["float32", "float16"])
def test_a_gpu_translates_as_well(reversing, precision):
    pairs, data, pieces, checkpoint = reversing
    on_gpu = [flag for flag in GENERATE if flag != "--cpu"]
    # fairseq's own scorer wants an extension in C, which a GPU machine's copy may lack.
    flags = [*subwords(pieces), "--path", checkpoint, "--beam", 3, "--batch-size", 64, "--scoring", "sacrebleu"]
    result = succeed("generate", data, *on_gpu, *flags, *precision)
    assert exact(hypotheses(result, "D"), [target for _, target in pairs]) > 0.99


def test_batches_sides_of_padding_and_an_ensemble_of_a_model_with_itself_agree(reversing, generated):
    _, data, pieces, checkpoint = reversing
    result = succeed(
        "generate", data, *GENERATE, *subwords(pieces), "--path", f"{checkpoint}:{checkpoint}", "--beam", 3,
        "--batch-size", 7, "--left-pad-source",
    )  # fmt: skip
    assert "'left_pad_source': False" in result.output
    assert "'left_pad_source': True" in generated.output
    assert hypotheses(result, "D") == hypotheses(generated, "D")


def test_an_ensemble_with_a_prefix(reversing):
    pairs, data, pieces, checkpoint = reversing
    ensemble = f"{checkpoint}:{checkpoint.parent}/checkpoint_last.pt"
    result = succeed(
        "generate", data, *GENERATE, *subwords(pieces), "--path", ensemble, "--prefix-size", 2, "--beam", 2,
        "--batch-size", 64,
    )  # fmt: skip
    assert exact(hypotheses(result, "D"), [target for _, target in pairs]) > 0.99


def interactive(reversing, lines: list[str], tmp_path: Path, *flags: object) -> Result:
    _, data, pieces, checkpoint = reversing
    (tmp_path / "input").write_text("\n".join(lines) + "\n")
    return fairseq(
        "interactive", data, *TASK, "--cpu", "--path", checkpoint, "--input", tmp_path / "input", "--buffer-size", 100,
        "--batch-size", 4, *subwords(pieces), *flags,
    )  # fmt: skip


def test_interactive_takes_raw_text_and_tells_of_an_empty_line(reversing, tmp_path):
    lines = ["kalo mika tesolo?", "", *(source for source, _ in reversing[0][:30])]
    result = interactive(reversing, lines, tmp_path)
    assert result.status == 0, result.output[-3000:]
    assert "1 of 32 source sentences have no words (the first is number 1" in result.output
    given = hypotheses(result, "D")
    assert exact({i: given[i + 2] for i in range(30)}, [target for _, target in reversing[0][:30]]) > 0.96


def test_sampling(reversing, tmp_path):
    flags = ["--sampling", "--sampling-topp", 0.5, "--beam", 1, "--nbest", 1, "--seed", 3]
    result = interactive(reversing, [source for source, _ in reversing[0][:30]], tmp_path, *flags)
    assert exact(hypotheses(result, "D"), [target for _, target in reversing[0][:30]]) > 0.9


def test_bad_input_is_told_in_a_sentence(reversing, tmp_path):
    pairs, _, _, checkpoint = reversing
    error = interactive(reversing, ["kalo " * 2000], tmp_path).error
    assert "sentence 0 of 1 (counted from 0) has 2001 tokens, more than the 1024" in error
    other = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([source[::-1] for source, _ in pairs]), model_prefix=str(other), vocab_size=50,
        model_type="bpe", minloglevel=3,
    )  # fmt: skip
    strangers = (*reversing[:2], f"{other}.model", checkpoint)
    assert "does not fit the source's dictionary" in interactive(strangers, ["kalo"], tmp_path).error


def test_a_task_or_criterion_for_another_model_is_told_in_a_sentence(reversing):
    for flags, message in (
        (["--arch", "rkm_lm"], "--task translation goes with --arch rkm or a preset of it, not with rkm_lm"),
        (
            ["--arch", "rkm_classifier"],
            "'task.max_positions' not found: --task, --criterion and --arch must go together",
        ),
    ):
        result = fairseq("train", reversing[1], *TASK, *flags, "--optimizer", "adam", "--batch-size", 2, "--cpu")
        assert message in result.error


def test_a_training_set_in_two_files(reversing, tmp_path):
    data = shutil.copytree(reversing[1], tmp_path / "data")
    for path in list(data.glob("train.*")):
        shutil.copy(path, data / path.name.replace("train", "train1"))
    flags = ["--max-epoch", 1, "--batch-size", 600, "--no-save", "--total-num-update", 1]
    updates = [
        int(succeed("train", folder, *TRAIN, *flags, *more).entries("train")[-1]["train_num_updates"])
        for folder, more in ((reversing[1], []), (data, []), (data, ["--upsample-primary", 2]))
    ]
    assert updates == [10, 20, 30]


def test_from_python(reversing, tmp_path):
    pairs, data, pieces, checkpoint = reversing
    shutil.copy(checkpoint, tmp_path / "model.pt")
    shutil.copy(pieces, tmp_path / "sentencepiece.bpe.model")
    for name in ("dict.xx.txt", "dict.yy.txt"):
        shutil.copy(data / name, tmp_path)
    code = f"""
from fairseq_rkm.models import RKMModel
from fairseq_rkm import RKMError
model = RKMModel.from_pretrained(
    {str(tmp_path)!r}, tokenizer="moses", bpe="sentencepiece"
)
print(model.translate("mika kalo."))
print(model.translate(["", {pairs[0][0]!r}, " ", {pairs[1][0]!r}]))
source, target, weights = model.attention("mika kalo.")
assert weights.shape == (len(target), len(source)) and (weights.sum(1) - 1).abs().max() < 1e-5
for call, argument in ((model.translate, "kalo " * 2000), (RKMModel.from_pretrained, {str(tmp_path)!r} + "/none")):
    try:
        call(argument)
    except RKMError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[:2] == ["kalo mika.", str(["", pairs[0][1], "", pairs[1][1]])]
    assert "has 2001 tokens" in result.stdout
    assert "no model at" in result.stdout


def test_hydra_train_has_the_same_flags(copying, tmp_path):
    _, data, _ = copying
    config = tmp_path / "conf"
    config.mkdir()
    (config / "small.yaml").write_text(
        f"""# @package _group_
common: {{user_dir: {ROOT / "fairseq_rkm"}, cpu: true, log_format: json, log_interval: 1}}
task: {{_name: translation, data: {data}, source_lang: xx, target_lang: yy}}
model:
  {{_name: rkm, encoder_cell: ran, decoder_cell: linear_kernel_gated, encoder_ngram: 3, ngram_padding: same,
    encoder_embed_dim: 8, encoder_hidden_size: 8, decoder_embed_dim: 8, decoder_hidden_size: 8, input_feeding: true,
    adaptive_softmax_cutoff: "5"}}
criterion: {{_name: adaptive_loss, ddp_backend: legacy_ddp}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
dataset: {{batch_size: 50, num_workers: 0}}
optimization: {{max_update: 3, lr: [0.01]}}
checkpoint: {{no_save: true}}
distributed_training: {{distributed_world_size: 1}}
"""
    )
    result = succeed(
        "hydra_train", "--config-dir", config, "--config-name", "small", f"hydra.run.dir={tmp_path / 'out'}"
    )
    log = result.output + "".join(p.read_text() for p in (tmp_path / "out").glob("*.log"))
    assert '"num_updates": "3"' in log
