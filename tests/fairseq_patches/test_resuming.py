import logging
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from fairseq_cli import train
from hypothesis import given, settings
from hypothesis import strategies as st

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches import resuming

fairseq_rkm.register()


def write(path, updates: int) -> None:
    history = [{"num_updates": updates, "optimizer_name": "Adam", "lr_scheduler_state": {}}]
    iterator = {"epoch": 1, "iterations_in_epoch": updates}
    state = {"model": {"weight": torch.full((500,), float(updates))}, "optimizer_history": history}
    cfg = {"common": {"seed": 1}, "model": {"_name": "rkm_lm"}}
    torch.save({**state, "args": None, "cfg": cfg, "extra_state": {"train_iterator": iterator}}, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Bytes of a run's checkpoints, of which the last is the newest, and the second newest has an old date."""
    folder = tmp_path_factory.mktemp("files")
    updates = {"last": 30, "1_20": 20, "_best": 5, "1": 10}
    names = {"last": "checkpoint_last.pt", "1_20": "checkpoint_1_20.pt", "_best": "checkpoint_best.pt"}
    for key, number in updates.items():
        write(folder / names.get(key, "checkpoint1.pt"), number)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_with(folder, files):
    for name in sorted(files):  # so that dates say nothing of updates
        (folder / name).write_bytes(files[name])
    return str(folder / "checkpoint_last.pt")


def load_as_a_resuming_run(last):
    resuming._last.append((last, ""))
    try:
        return checkpoint_utils.load_checkpoint_to_cpu(last)
    finally:
        resuming._last.clear()


@settings(deadline=None, max_examples=30)
@given(length=st.integers(0, 3700), others=st.integers(0, 1))
def test_cut_anywhere_the_last_is_replaced_by_the_newest_whole_one(tmp_path_factory, files, length, others):
    last = run_with(tmp_path_factory.mktemp("run"), files)
    damaged = [last, *([last.replace("_last", "_1_20")] if others else [])]
    for path in damaged:
        with open(path, "r+b") as file:
            assert length < file.seek(0, 2) - 50
            file.truncate(length)
    state = load_as_a_resuming_run(last)
    assert resuming.updates(state) == (10 if others else 20)
    with pytest.raises(RKMError, match=r"checkpoint_last\.pt"):
        checkpoint_utils.load_checkpoint_to_cpu(last)  # as with --restore-file: no other is taken


def test_the_choice_is_told_in_a_line_and_none_in_a_sentence(tmp_path, files, caplog):
    last = run_with(tmp_path, files)
    with open(last, "r+b") as file:
        file.truncate(1000)
    with caplog.at_level(logging.WARNING):
        load_as_a_resuming_run(last)
    assert caplog.messages == [
        f"{last} is damaged: going on from {tmp_path}/checkpoint_1_20.pt, the newest whole checkpoint, of update 20"
    ]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RKMError, match=r"no other checkpoint in its folder is whole: .* another --save-dir"):
        load_as_a_resuming_run(last)


def test_a_whole_file_that_is_refused_stays_refused(tmp_path, files):
    last = run_with(tmp_path, files)
    torch.save({"model": SimpleNamespace(a=1)}, last)
    with pytest.raises(RKMError, match="refused"):
        load_as_a_resuming_run(last)


@pytest.mark.parametrize("restore_file", ["checkpoint_last.pt", "other.pt"])
def test_only_a_run_that_names_no_file_takes_another(monkeypatch, restore_file):
    seen = []
    load = resuming.know_the_last(lambda *_: seen.append(list(resuming._last)))
    cfg = SimpleNamespace(save_dir="run", restore_file=restore_file)
    trainer = SimpleNamespace(cfg=SimpleNamespace(checkpoint=cfg), checkpoint_suffix="")
    load(trainer, "run/checkpoint_last.pt" if restore_file == "checkpoint_last.pt" else restore_file)
    assert seen == [[("run/checkpoint_last.pt", "")] if restore_file == "checkpoint_last.pt" else []]
    assert not resuming._last


def finished(limits: dict, patience: int = -1, runs: int = 0, updates: int = 60, epoch: int = 4):
    """What a run of 60 updates, 3 epochs, 2 hours and learning rate 0.1 is told."""
    defaults = {"max_update": 0, "max_epoch": 0, "stop_time_hours": 0, "stop_min_lr": -1.0}
    optimization = SimpleNamespace(**{**defaults, **limits})
    cfg = SimpleNamespace(optimization=optimization, checkpoint=SimpleNamespace(patience=patience))
    trainer = SimpleNamespace(
        cfg=cfg, get_num_updates=lambda: updates, cumulative_training_time=lambda: 7200.0, get_lr=lambda: 0.1
    )
    return resuming._reached(trainer, epoch, runs)


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"limits": {"max_update": 60}}, "--max-update is 60"),
        ({"limits": {"max_update": 59}}, "--max-update is 59"),
        ({"limits": {"max_update": 61}}, None),
        ({"limits": {}}, None),
        ({"limits": {"max_epoch": 3}}, "--max-epoch is 3"),
        ({"limits": {"max_epoch": 4}}, None),
        ({"limits": {"stop_time_hours": 1.5}}, "--stop-time-hours 1.5"),
        ({"limits": {"stop_time_hours": 2.5}}, None),
        ({"limits": {"stop_min_lr": 0.1}}, "--stop-min-lr 0.1"),
        ({"limits": {"stop_min_lr": 0.09}}, None),
        ({"limits": {}, "patience": 3, "runs": 3}, "--patience is 3"),
        ({"limits": {}, "patience": 4, "runs": 3}, None),
    ],
)
def test_what_has_ended_a_run(flags, flag):
    told = finished(**flags)
    assert told is None if flag is None else flag in told


def test_patience_is_saved_and_goes_on(monkeypatch):
    def count():
        pass

    monkeypatch.setattr(train, "should_stop_early", count)
    written = []
    save = resuming.save_patience(lambda _trainer, _name, extra: written.append(extra))
    trainer = SimpleNamespace(cfg=SimpleNamespace(checkpoint=SimpleNamespace(patience=3)))
    save(trainer, "checkpoint1.pt", {"epoch": 1})
    assert written.pop() == {"epoch": 1}, "nothing was validated yet"
    count.best, count.num_runs = 4.25, 2
    save(trainer, "checkpoint1.pt", {"epoch": 1})
    assert written[0] == {"epoch": 1, resuming.PATIENCE: {"best": 4.25, "runs": 2}}
    del count.best, count.num_runs
    assert resuming._restore_patience(written[0]) == 2
    assert (count.best, count.num_runs) == (4.25, 2)
    assert resuming._restore_patience({}) == 0


def test_the_trainer_has_these_changes():
    assert Trainer.load_checkpoint.__code__.co_filename == resuming.__file__
    assert Trainer.save_checkpoint.__code__.co_filename == resuming.__file__
