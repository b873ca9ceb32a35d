from dataclasses import replace

import numpy as np
import pytest
from scipy.signal import welch

from fairseq_rkm import RKMError
from fairseq_rkm.data.signals import Recordings, whitened
from fairseq_rkm.data.signals.whitening import WELCH_SAMPLES


def coloured(draw, strength, slope, steps=4000):
    """Noise of two channels whose power falls with frequency."""
    noise = np.fft.rfft(draw.standard_normal((steps, 2)), axis=0)
    frequency = np.arange(len(noise))[:, None] + 20
    return (strength * np.fft.irfft(noise * frequency**slope, steps, axis=0)).astype(np.float32)


def people():
    """Two people of different colours; in a person's second recording one frequency is twice as strong."""
    draw = np.random.default_rng(0)
    signals = []
    for strength, slope in ((1.0, -1.0), (30.0, 0.5)):
        for wave in (1.0, 2.0):
            signal = coloured(draw, strength, slope)
            signal[:, 0] += wave * signal.std() * np.sin(2 * np.pi * 0.1 * np.arange(len(signal)))
            signals.append(signal + 5)
    return Recordings("here", signals, ["a", "b"] * 2, ["p", "p", "q", "q"], ["Cz", "Pz"], 100.0)


def power(signal):
    return welch(signal, nperseg=WELCH_SAMPLES, axis=0)[1][3:-3]


def test_a_group_s_mean_spectrum_is_flat_and_its_recordings_differences_stay():
    before, after = people(), whitened(people(), "group")
    assert [len(signal) for signal in after.signals] == [4000] * 4
    assert all(signal.dtype == np.float32 for signal in after.signals)
    assert (after.labels, after.groups, after.rate) == (before.labels, before.groups, before.rate)
    for rows in ((0, 1), (2, 3)):
        mean = np.mean([power(after.signals[i]) for i in rows], axis=0)
        raw = np.mean([power(before.signals[i]) for i in rows], axis=0)
        assert np.log(mean[:, 1]).std() < 0.25 < np.log(raw[:, 1]).std()
        peak = int(0.1 * WELCH_SAMPLES) - 3
        ratios = [power(held.signals[rows[1]])[peak, 0] / power(held.signals[rows[0]])[peak, 0]
                  for held in (before, after)]  # fmt: skip
        assert ratios[1] == pytest.approx(ratios[0], rel=0.1)
    deviations = np.array([signal.std() for signal in after.signals])
    assert deviations.max() / deviations.min() < 1.5, "people are as strong as each other"


def test_by_recording_each_is_whitened_as_if_it_were_alone():
    held = people()
    together = whitened(held, "recording")
    for i in range(4):
        alone = whitened(held.subset([i]), "group")
        assert np.array_equal(together.signals[i], alone.signals[0])
    assert np.allclose(whitened(held.subset([2, 0, 3]), "group").signals[1], together.signals[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda held: replace(held, groups=None), "here has no groups, and signals are whitened by group"),
        (lambda held: held.with_signals([s[:WELCH_SAMPLES - i] for i, s in enumerate(held.signals)]),
         "recording 2 has 255 steps, and whitening needs 256"),
        (lambda held: held.with_signals([*held.signals[:2], *(s * [1, 0] + 7 for s in held.signals[2:])]),
         "channel 'Pz' of group 'q' is constant"),
    ],
)  # fmt: skip
def test_recordings_without_a_spectrum_or_a_group_are_refused(change, sentence):
    with pytest.raises(RKMError, match=sentence):
        whitened(change(people()), "group")
