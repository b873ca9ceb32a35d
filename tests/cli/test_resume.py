import torch

from cli.conftest import SMALL, fairseq, succeed


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_bits(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_resuming_in_the_middle_of_an_epoch_continues_exactly(data, tmp_path):
    """Carried state, n-gram contexts, dropout and validation in between included: the same bits."""
    flags = [*SMALL, "--ngram", 3, "--dropout", 0.2, "--dropout-weights", 0.2, "--dropout-words", 0.1]
    flags += ["--dropout-state", 0.2, "--save-interval-updates", 5]
    succeed("train", data, *flags, "--max-update", 12, "--save-dir", tmp_path / "whole")
    succeed("train", data, *flags, "--max-update", 5, "--save-dir", tmp_path / "parts")
    before = torch.load(tmp_path / "parts/checkpoint_last.pt", weights_only=True)
    assert before["extra_state"]["train_iterator"]["iterations_in_epoch"] == 5
    result = succeed("train", data, *flags, "--max-update", 12, "--save-dir", tmp_path / "parts")
    assert len(result.entries("train_inner")) == 7
    assert_same_bits(weights(tmp_path / "whole/checkpoint_last.pt"), weights(tmp_path / "parts/checkpoint_last.pt"))


def test_the_carried_state_matters_to_the_test_above(data, tmp_path):
    """Without it, the same resumed run ends elsewhere."""
    flags = [*SMALL, "--save-interval-updates", 5]
    succeed("train", data, *flags, "--max-update", 5, "--save-dir", tmp_path)
    path = tmp_path / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    results = []
    for scale in (1, 0):
        carried = state["extra_state"]["StatefulLanguageModelingTask"]["ranks"]
        state["extra_state"]["StatefulLanguageModelingTask"]["ranks"] = [scale * c for c in carried]
        torch.save(state, path)
        succeed("train", data, *flags, "--max-update", 7, "--save-dir", tmp_path, "--restore-file", path)
        results.append(weights(path))
        path = tmp_path / "checkpoint_1_5.pt"
        state = torch.load(path, weights_only=True)
    assert any(not torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_checkpoint_made_before_the_bound_trains_on_without_one(data, tmp_path):
    """Its configuration lacks ``memory_clip``; the command that goes on from it does not name a bound."""
    succeed("train", data, *SMALL, "--memory-clip", "none", "--max-update", 3, "--save-dir", tmp_path)
    path = tmp_path / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    del state["cfg"]["model"]["memory_clip"]
    torch.save(state, path)
    result = succeed("train", data, *SMALL, "--max-update", 5, "--save-dir", tmp_path)
    assert "checkpoint_last.pt was trained with --memory-clip none: so is this run" in result.output
    assert torch.load(path, weights_only=True)["cfg"]["model"]["memory_clip"] == "none"


def test_validation_does_not_disturb_training(data, tmp_path):
    common = [*SMALL, "--max-update", 9, "--dropout", 0.2]
    succeed("train", data, *common, "--save-dir", tmp_path / "without", "--disable-validation")
    result = succeed(
        "train", data, *common, "--save-dir", tmp_path / "with", "--validate-interval-updates", 2, "--valid-subset",
        "valid,test",
    )  # fmt: skip
    assert len(result.entries("valid")) >= 4
    assert len(result.entries("test")) >= 4
    assert_same_bits(weights(tmp_path / "without/checkpoint_last.pt"), weights(tmp_path / "with/checkpoint_last.pt"))
    losses = [float(entry["valid_loss"]) for entry in result.entries("valid")]
    assert losses[-1] < losses[0]


def test_a_damaged_last_checkpoint_a_finished_run_and_another_cut(data, tmp_path):
    """One run that all of this happens to ends with the bits of one that nothing happened to."""
    flags = [*SMALL, "--dropout", 0.2, "--save-interval-updates", 3]
    succeed("train", data, *flags, "--max-update", 9, "--save-dir", tmp_path / "whole")
    run = tmp_path / "parts"
    succeed("train", data, *flags, "--max-update", 6, "--save-dir", run)
    (run / "checkpoint_last.pt.1.tmp").write_bytes(b"half")
    with open(run / "checkpoint_last.pt", "r+b") as last:
        last.truncate(20_000)
    result = succeed("train", data, *flags, "--max-update", 9, "--save-dir", run)
    assert "the newest whole checkpoint, of update 6" in result.output
    assert_same_bits(weights(tmp_path / "whole/checkpoint_last.pt"), weights(run / "checkpoint_last.pt"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert not any(name.endswith(".tmp") for name in before)
    result = succeed("train", data, *flags, "--max-update", 9, "--save-dir", run)
    assert "all is done: the checkpoint is of update 9, and --max-update is 9" in result.output
    assert not result.entries("train_inner")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    longer = [*flags, "--max-update", 10, "--save-dir", run, "--tokens-per-sample", 9]
    assert "--tokens-per-sample: 7, now 9" in fairseq("train", data, *longer).error
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert len(succeed("train", data, *longer, "--reset-dataloader").entries("train_inner")) == 1
