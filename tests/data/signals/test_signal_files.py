import importlib.util
import pickle

import numpy as np
import pytest
from signal_samples import CHANNELS, RATE, waves, write_npz

from fairseq_rkm import RKMError
from fairseq_rkm.data.signals import check_finite, joined, read_signals

TS = """@problemName small
@timestamps false
@missing false
@univariate false
@dimension 2
@equalLength false
@classLabel true up down
@data
1,2,3:4,5,6:up
7,8:9,10:down
"""


def test_an_npz_file_gives_recordings_classes_groups_channels_and_rate(tmp_path):
    arrays = waves(6)
    found = read_signals(write_npz(tmp_path / "a.npz", **arrays))
    assert (len(found), found.width, found.rate, found.channels) == (6, 3, RATE, CHANNELS)
    assert found.labels == arrays["y"].tolist()
    assert found.groups == arrays["group"].tolist()
    assert all(np.array_equal(signal, x.T) for signal, x in zip(found.signals, arrays["x"], strict=True))
    assert {signal.dtype for signal in found.signals} == {np.dtype(np.float32)}


def test_lengths_cut_padded_recordings_and_two_axes_are_one_channel(tmp_path):
    x = np.arange(12).reshape(2, 1, 6)
    found = read_signals(write_npz(tmp_path / "a.npz", x=x, y=[1.0, 2.0], lengths=[6, 2]))
    assert [signal[:, 0].tolist() for signal in found.signals] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert found.labels == ["1", "2"], "1.0 is the class 1"
    np.save(tmp_path / "b.npy", x[:, 0])
    (tmp_path / "y.txt").write_text("a\nb\n")
    (tmp_path / "g.txt").write_text("1\n2\n")
    found = read_signals(tmp_path / "b.npy", tmp_path / "y.txt", tmp_path / "g.txt")
    assert (found.width, found.labels, found.groups, found.rate) == (1, ["a", "b"], ["1", "2"], None)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a file has run')",)


@pytest.mark.parametrize("name", ["x", "y", "group"])
def test_object_arrays_are_never_unpickled(tmp_path, name):
    harmful = np.array([Harmful(), Harmful()], dtype=object)
    arrays = {"x": np.zeros((2, 1, 4)), "y": np.array(["a", "b"]), "group": np.array([1, 2]), name: harmful}
    path = write_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(RKMError, match=f"the array {name} holds Python objects, which could run code"):
        read_signals(path)
    np.save(tmp_path / "a.npy", harmful)
    with pytest.raises(RKMError, match="holds Python objects"):
        read_signals(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(RKMError, match=r"b\.npy (holds|is damaged)"):
        read_signals(tmp_path / "b.npy")


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"y": [1, 2]}, "has no array x; its arrays are y"),
        ({"x": np.zeros(4)}, r"must have the axes \(recordings, channels, time\)"),
        ({"x": np.zeros((2, 1, 4), complex)}, "recording 1 must hold real numbers, not complex128"),
        ({"x": np.zeros((2, 1, 4)), "y": ["a"]}, "has 1 classes for 2 recordings"),
        ({"x": np.zeros((2, 1, 4)), "group": [1, 2, 3]}, "has 3 groups for 2 recordings"),
        ({"x": np.zeros((2, 1, 4)), "channels": ["a", "b"]}, "recordings and names of channels differ"),
        ({"x": np.zeros((2, 2, 4)), "channels": ["a", "a"]}, "two channels have one name"),
        ({"x": np.zeros((2, 1, 4)), "rate": 0.0}, "sampling rate must be a positive number"),
        ({"x": np.zeros((2, 1, 4)), "rate": [1.0, 2.0]}, "sampling rate must be one number"),
        ({"x": np.zeros((2, 1, 4)), "y": [1.0, np.nan]}, "y has missing values, the first at 2"),
        ({"x": np.zeros((2, 1, 4)), "lengths": [4, 5]}, "lengths must tell"),
        ({"x": np.zeros((0, 1, 4))}, "has no recordings"),
        ({"x": np.zeros((2, 0, 4))}, "have no channels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, sentence):
    with pytest.raises(RKMError, match=sentence):
        read_signals(write_npz(tmp_path / "a.npz", **arrays))


def test_files_that_are_not_what_their_name_says(tmp_path):
    for name in ("a.npz", "a.npy", "a.fif", "a.ts"):
        (tmp_path / name).write_bytes(b"no such file")
        with pytest.raises(RKMError, match=f"{name}"):
            read_signals(tmp_path / name)
    with pytest.raises(RKMError, match="no file of recordings at"):
        read_signals(tmp_path / "none.npz")
    with pytest.raises(RKMError, match=r"recordings are read from \.npz, .*, not from \.txt"):
        read_signals(tmp_path / "a.txt")
    path = write_npz(tmp_path / "b.npz", x=np.zeros((2, 1, 4)))
    (tmp_path / "y.txt").write_text("a\n\nb\n")
    with pytest.raises(RKMError, match="3 lines for 2 recordings, and line 2 is empty"):
        read_signals(path, tmp_path / "y.txt")


def test_a_csv_file_of_all_recordings(tmp_path):
    (tmp_path / "a.csv").write_text(
        "recording,time,label,group,Cz,Pz\n1,0,rest,ann,1,2\n1,0.5,rest,ann,3,4\n1,1,rest,ann,5,6\nb,0,task,bob,7,8\n"
    )
    found = read_signals(tmp_path / "a.csv")
    assert [signal.tolist() for signal in found.signals] == [[[1, 2], [3, 4], [5, 6]], [[7, 8]]]
    assert (found.labels, found.groups, found.channels, found.rate) == (
        ["rest", "task"],
        ["ann", "bob"],
        ["Cz", "Pz"],
        2,
    )


def test_a_csv_file_that_is_an_index_of_recordings(tmp_path):
    (tmp_path / "one.csv").write_text("Cz,Pz\n1,2\n3,4\n")
    (tmp_path / "two.csv").write_text("Cz,Pz\n5,6\n")
    (tmp_path / "index.csv").write_text("file,label,group\none.csv,rest,1\ntwo.csv,task,2\n")
    found = read_signals(tmp_path / "index.csv")
    assert [len(signal) for signal in found.signals] == [2, 1]
    assert (found.labels, found.groups, found.channels) == (["rest", "task"], ["1", "2"], ["Cz", "Pz"])
    (tmp_path / "two.csv").write_text("Cz,Oz\n5,6\n")
    with pytest.raises(RKMError, match=r"index.csv, line 3: .*two.csv has other columns than .*one.csv"):
        read_signals(tmp_path / "index.csv")
    (tmp_path / "two.csv").unlink()
    with pytest.raises(RKMError, match=r"index.csv, line 3: no file .*two.csv"):
        read_signals(tmp_path / "index.csv")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the first row must name all columns"),
        ("a,a\n1,2\n", "each by a name of its own"),
        ("a,b\n", "has no rows below"),
        ("a,b\n1\n", "line 2: 1 fields, where the first row names 2"),
        ("recording,a\n1,2\n1,x\n", "line 3: 'x' in the column 'a' is no number"),
        ("recording,a\n1,2\n2,3\n1,4\n", "line 4: recording '1' goes on after another one"),
        ("recording,label,a\n1,u,2\n1,v,3\n", "line 3: recording '1' must have one label .* not 'u' and 'v'"),
        ("recording,label\n1,u\n", "has no columns of channels"),
        ("recording,time,a\n1,0,2\n1,1,3\n1,2,3\n1,6,3\n", "line 5: 4 s after the row before, where"),
        ("file,a\nx.csv,1\n", "is an index, and cannot have a"),
    ],
)
def test_csv_files_with_faults(tmp_path, text, sentence):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(RKMError, match=sentence):
        read_signals(tmp_path / "a.csv")


@pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="aeon is not installed (the extra signals)")
def test_a_ts_file_with_recordings_of_different_lengths(tmp_path):
    (tmp_path / "small.ts").write_text(TS)
    found = read_signals(tmp_path / "small.ts")
    assert [signal.tolist() for signal in found.signals] == [[[1, 4], [2, 5], [3, 6]], [[7, 9], [8, 10]]]
    assert (found.labels, found.rate) == (["up", "down"], None)


@pytest.mark.skipif(importlib.util.find_spec("aeon") is not None, reason="aeon is installed")
def test_a_ts_file_without_aeon_says_what_to_install(tmp_path):
    (tmp_path / "small.ts").write_text(TS)
    with pytest.raises(RKMError, match=r"\.ts files are read by aeon, which is not installed"):
        read_signals(tmp_path / "small.ts")


@pytest.mark.skipif(importlib.util.find_spec("mne") is None, reason="MNE is not installed (the extra signals)")
def test_mne_s_epochs(tmp_path):
    mne = pytest.importorskip("mne")
    info = mne.create_info(CHANNELS, RATE, "eeg")
    events = np.array([[0, 0, 1], [100, 0, 2], [200, 0, 1]])
    x = np.random.default_rng(0).standard_normal((3, 3, 50))
    mne.EpochsArray(x, info, events, event_id={"rest": 1, "task": 2}, verbose="error").save(tmp_path / "a-epo.fif")
    found = read_signals(tmp_path / "a-epo.fif")
    assert (found.labels, found.channels, found.rate) == (["rest", "task", "rest"], CHANNELS, RATE)
    assert np.allclose(found.signals[1], x[1].T, atol=1e-5)


def test_missing_values_are_named_by_recording_channel_and_time(tmp_path):
    arrays = waves(4)
    arrays["x"][2, 1, 50], arrays["x"][3, 0, 7] = np.nan, np.inf
    with pytest.raises(RKMError) as error:
        check_finite(read_signals(write_npz(tmp_path / "a.npz", **arrays)))
    assert "2 values are missing or infinite" in str(error.value)
    assert "recording 3, channel 'Pz', 0.500 s (step 51): missing" in str(error.value)
    assert "recording 4, channel 'Cz', 0.070 s (step 8): infinite" in str(error.value)


def test_files_are_joined_if_they_are_alike(tmp_path):
    one, two = waves(4), waves(6, seed=1)
    first = read_signals(write_npz(tmp_path / "a.npz", **one))
    both = joined([first, read_signals(write_npz(tmp_path / "b.npz", **two))])
    assert len(both) == 10
    assert both.groups == [*one["group"], *two["group"]]
    for change, sentence in (
        ({"rate": 50.0}, "50 samples a second, and .* 100"),
        ({"x": two["x"][:, :2], "channels": CHANNELS[:2]}, "has 2 channels, and .* 3"),
        ({"channels": ["Cz", "Oz", "Pz"]}, "has the channel 'Oz' where .* has 'Pz'"),
    ):
        with pytest.raises(RKMError, match=sentence):
            joined([first, read_signals(write_npz(tmp_path / "c.npz", **{**two, **change}))])
    del two["group"]
    with pytest.raises(RKMError, match="has groups, and the other has none"):
        joined([first, read_signals(write_npz(tmp_path / "c.npz", **two))])
