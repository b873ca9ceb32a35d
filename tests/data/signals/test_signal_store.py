import numpy as np
import pytest
import torch

from fairseq_rkm import RKMError
from fairseq_rkm.data.signals import SignalDataset, SignalPreparation, open_split, write_split

SIGNALS = [np.arange(20, dtype=np.float32).reshape(10, 2), -np.arange(12, dtype=np.float32).reshape(6, 2)]


@pytest.fixture
def folder(tmp_path):
    assert write_split(tmp_path, "train", SIGNALS, [0, 1], [[0, 3, 6], [0, 2]], 4) == 5
    return tmp_path


def test_windows_come_back_as_they_were_cut(folder):
    split = open_split(folder, "train", 2, 2)
    assert isinstance(split.values, np.memmap)
    found = [split.values[a : a + n].tolist() for a, n in zip(split.starts, split.lengths, strict=True)]
    assert found == [SIGNALS[r][start : start + 4].tolist() for r, start in [(0, 0), (0, 3), (0, 6), (1, 0), (1, 2)]]
    assert split.labels.tolist() == [0, 0, 0, 1, 1]
    assert split.recordings.tolist() == [0, 0, 0, 1, 1]


def test_a_batch_is_padded_behind_the_end_and_counts_time_steps(tmp_path):
    write_split(tmp_path, "train", SIGNALS, [0, 1], [[0], [0]], None)
    dataset = SignalDataset(open_split(tmp_path, "train", 2, 2), shuffle=True)
    assert (len(dataset), dataset.num_tokens(0), dataset.num_tokens(1)) == (2, 10, 6)
    assert dataset.ordered_indices().tolist() == [1, 0], "by length"
    batch = dataset.collater([dataset[0], dataset[1]])
    source, mask = batch["net_input"]["source"], batch["net_input"]["padding_mask"]
    assert source.shape == (2, 10, 2)
    assert torch.equal(source[1, :6], torch.from_numpy(SIGNALS[1]))
    assert source[1, 6:].abs().sum() == 0
    assert torch.equal(mask.sum(1), torch.tensor([0, 4]))
    assert (batch["ntokens"], batch["nsentences"], batch["target"].tolist()) == (16, 2, [0, 1])
    assert dataset.collater([dataset[0]])["net_input"]["padding_mask"] is None
    assert dataset.collater([]) == {}
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_tokens=15)
    assert [list(rows) for rows in batches] == [[1], [0]], "two windows of 10 steps are 20"


def test_windows_of_one_length_are_shuffled_each_epoch_in_training_alone(folder):
    split = open_split(folder, "train", 2, 2)
    orders = {tuple(SignalDataset(split, shuffle=True).ordered_indices()) for _ in range(20)}
    assert len(orders) > 3
    assert SignalDataset(split, shuffle=False).ordered_indices().tolist() == [0, 1, 2, 3, 4]


def test_damaged_splits_are_refused(folder):
    values, windows = folder / "train.values.npy", folder / "train.windows.npy"
    whole = {path: path.read_bytes() for path in (values, windows)}

    def refused(path, content, sentence, channels=2, classes=2):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        with pytest.raises(RKMError, match=sentence):
            open_split(folder, "train", channels, classes)
        path.write_bytes(whole[path])

    refused(values, whole[values][:-4], "train.values.npy is damaged")
    refused(windows, b"", "train.windows.npy is damaged")
    refused(windows, np.zeros((0, 4), np.int64), "has no windows")
    refused(windows, np.array([[13, 4, 0, 0]]), "windows beyond its recordings")
    refused(windows, np.array([[-1, 4, 0, 0]]), "windows beyond its recordings")
    refused(windows, whole[windows], "window 4 is of class 2, and there are 1", classes=1)
    refused(values, whole[values], "3 channels of float32 are wanted", channels=3)
    bad = np.concatenate(SIGNALS)
    bad[11, 1] = np.nan
    refused(values, bad, "missing or infinite at step 12")
    with pytest.raises(RKMError, match="no split 'valid' at"):
        open_split(folder, "valid", 2, 2)


def test_the_preparation_is_read_as_it_was_written(tmp_path):
    written = SignalPreparation(["a", "b"], ["Cz"], [1.5], [0.1], 125.0, True, 250, 125, [3], "group")
    written.save(tmp_path)
    assert SignalPreparation.load(tmp_path) == written
    text = (tmp_path / "signals.json").read_text()
    for before, after, sentence in (
        ("[", "[[", "is not JSON"),
        ('"rate": 125.0', '"speed": 1', "must have the keys"),
        ('"rate": 125.0', '"rate": 0', "rate must be null or a positive number"),
        ('"a",', "", "classes must be a list of two names or more"),
        ("0.1", "0.0", "the latter above 0"),
        ("0.1", "NaN", "must be numbers"),
        ('"Cz"', '"Cz", "Pz"', "or a name for each number of mean"),
        ('"group"', '"people"', "whiten must be null or one of group, recording"),
        ('"window": 250', '"window": -1', "window null or a number of steps"),
    ):
        (tmp_path / "signals.json").write_text(text.replace(before, after, 1))
        with pytest.raises(RKMError, match=sentence):
            SignalPreparation.load(tmp_path)
    earlier = text.replace(',\n  "whiten": "group"', "")
    (tmp_path / "signals.json").write_text(earlier)
    assert "whiten" not in earlier
    assert SignalPreparation.load(tmp_path).whiten is None
    (tmp_path / "signals.json").unlink()
    with pytest.raises(RKMError, match=r"no .*signals\.json: it names the classes and channels"):
        SignalPreparation.load(tmp_path)
