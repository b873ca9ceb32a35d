import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.data.signals import Duration, Recordings, resampled, scales, window_starts


def recordings(*lengths: int, rate=100.0) -> Recordings:
    draw = np.random.default_rng(0)
    return Recordings("here", [draw.standard_normal((n, 2)).astype(np.float32) for n in lengths], rate=rate)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(5, 60), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 9))
def test_windows_lie_within_their_recording_and_leave_less_than_a_stride_or_window_over(lengths, window, stride):
    for length, first in zip(lengths, window_starts(recordings(*lengths), window, stride), strict=True):
        assert first == list(range(0, first[-1] + 1, stride))
        assert first[-1] + window <= length < first[-1] + stride + window


def test_whole_recordings_are_windows_and_short_ones_are_refused():
    assert window_starts(recordings(3, 7), None, 1) == [[0], [0]]
    with pytest.raises(RKMError, match="recording 2 has 7 steps, fewer than a window of 8 steps"):
        window_starts(recordings(9, 7), 8, 8)
    with pytest.raises(RKMError, match="recording 1 has 0 steps, fewer than one step"):
        window_starts(recordings(0), None, 1)


@pytest.mark.parametrize(("text", "steps"), [("2s", 250), ("500ms", 62), (" 0.1 min", 750), ("250", 250)])
def test_durations(text, steps):
    assert Duration.parse(text, "--window").steps(125.0) == steps


@pytest.mark.parametrize("text", ["", "2", "x", "-1s", "0", "1.5", "2h", "1e3"])
def test_what_is_no_duration(text):
    if text == "2":
        assert Duration.parse(text, "--window").steps(None) == 2
        return
    with pytest.raises(RKMError, match="--window takes a time as 2s or 500ms"):
        Duration.parse(text, "--window")


def test_seconds_need_a_rate():
    with pytest.raises(RKMError, match="--window is in seconds, and the sampling rate is not known"):
        Duration.parse("2s", "--window").steps(None)
    with pytest.raises(RKMError, match="shorter than a step"):
        Duration.parse("1ms", "--window").steps(100.0)


@pytest.mark.parametrize(("rate", "steps"), [(50.0, 200), (250.0, 1000), (75.0, 300), (100.0, 400)])
def test_resampling_keeps_a_slow_wave(rate, steps):
    times = np.arange(400) / 100
    wave = np.stack([np.sin(2 * np.pi * 3 * times), 5 + np.cos(2 * np.pi * 2 * times)], 1).astype(np.float32)
    found = resampled(Recordings("here", [wave], rate=100.0), rate)
    assert (found.rate, found.signals[0].shape, found.signals[0].dtype) == (rate, (steps, 2), np.float32)
    times = np.arange(steps) / rate
    wanted = np.stack([np.sin(2 * np.pi * 3 * times), 5 + np.cos(2 * np.pi * 2 * times)], 1)
    middle = slice(steps // 8, -steps // 8)
    assert np.abs(found.signals[0] - wanted)[middle].max() < 0.02


def test_resampling_that_cannot_be():
    with pytest.raises(RKMError, match="has no sampling rate to resample from"):
        resampled(recordings(9, rate=None), 50.0)
    with pytest.raises(RKMError, match="no simple ratio"):
        resampled(recordings(9, rate=100.0), 1e9)


def test_scales_are_those_of_all_steps():
    found = recordings(20, 50)
    mean, deviation = scales(found)
    steps = np.concatenate(found.signals).astype(np.float64)
    assert np.allclose(mean, steps.mean(0))
    assert np.allclose(deviation, steps.std(0))


@pytest.mark.parametrize("value", [0.0, 1e6, 0.1])
def test_a_constant_channel_is_refused_by_name(value):
    found = recordings(20, 50)
    for signal in found.signals:
        signal[:, 1] = value
    found.channels = ["Cz", "Pz"]
    with pytest.raises(RKMError, match="channel 'Pz' is constant in the training part"):
        scales(found)
