"""Recipes to choose from, for each set of the table of signals: changes of its settings.

They differ in what small sets ask for: noise, weight decay, units, parts of a window that are pooled each, and the rate
of slow signals. ``signal_choice.py`` compares them inside training parts. The first, ``{}``, is the set's own
(:data:`fairseq_rkm.experiments.signal_sets.SETS`).
"""

from typing import Any

from fairseq_rkm.experiments.signal_sets import SLOW, parts_of

Recipe = dict[str, Any]


def _recipe(flags: dict[str, Any], **settings: Any) -> Recipe:
    return {**settings, "flags": flags}


CANDIDATES: dict[str, list[Recipe]] = {
    "eeg": [
        {},
        _recipe({"encoder_hidden_size": 32, "noise": 0.1}, epochs=4, lr=0.004),
        _recipe({"encoder_hidden_size": 64, "noise": 0.3}, epochs=4, lr=0.002, weight_decay=0.1),
        _recipe({"encoder_hidden_size": 64, "noise": 0.3}, epochs=10, lr=0.002, weight_decay=0.1),
        _recipe({"encoder_hidden_size": 32, "noise": 0.3}, epochs=10, lr=0.01),
        _recipe({"encoder_hidden_size": 64, "noise": 0.5, "dropout_channels": 0.3}, epochs=6, lr=0.004,
                weight_decay=1.0),
        _recipe({"encoder_hidden_size": 16, "noise": 0.1}, epochs=3, lr=0.004),
        _recipe({"encoder_hidden_size": 96, "noise": 0.1}, epochs=3, lr=0.002),
        _recipe({"encoder_hidden_size": 32, "noise": 1.0}, epochs=10, lr=0.004),
    ],
    "seglearn": [
        {},
        _recipe({"encoder_hidden_size": 64, "noise": 0.3}, epochs=15, lr=0.004, weight_decay=0.1),
        _recipe({"encoder_hidden_size": 64, "noise": 0.3, "pooling": "max"}, epochs=15, lr=0.004, weight_decay=0.1),
        _recipe({"encoder_hidden_size": 64, "noise": 0.5, "pooling": "attention"}, epochs=25, lr=0.002,
                weight_decay=0.1),
    ],
    "SelfRegulationSCP1": [
        {},
        _recipe(parts_of(4, 32, 0.3, memory_clip="none"), resample=4.0, epochs=40, **SLOW),
        _recipe(parts_of(4, 32, 0.3, memory_clip="auto"), resample=4.0, epochs=15, **SLOW),
        _recipe(parts_of(4, 16, 1.0, dropout=0.5, memory_clip="auto"), resample=16.0, epochs=40, **SLOW),
        _recipe(parts_of(4, 16, 1.0, dropout=0.5, memory_clip="none"), resample=16.0, epochs=40, **SLOW),
        _recipe(parts_of(4, 32, 0.5, memory_clip="none"), resample=32.0, epochs=30, **SLOW),
        _recipe(parts_of(8, 32, 0.5, dropout=0.5, memory_clip="auto"), resample=32.0, epochs=60, **SLOW),
        _recipe(parts_of(4, 8, 0.3, memory_clip="auto"), resample=16.0, epochs=30, lr=0.01, batch_size=16,
                weight_decay=1.0),
        _recipe(parts_of(4, 64, 2.0, dropout=0.5, memory_clip="auto"), resample=16.0, epochs=60, **SLOW),
    ],
    "SelfRegulationSCP2": [
        {},
        _recipe(parts_of(4, 16, 1.0, dropout=0.5), resample=16.0, epochs=20, **SLOW),
        _recipe(parts_of(4, 8, 0.3), resample=16.0, epochs=20, lr=0.01, batch_size=16, weight_decay=1.0),
        _recipe(parts_of(8, 32, 0.5, dropout=0.5), resample=32.0, epochs=20, **SLOW),
        _recipe(parts_of(1, 32, 0.5, pooling="power", dropout=0.0), resample=64.0, epochs=20, **SLOW),
        _recipe(parts_of(1, 32, 0.5, encoder_bidirectional=True), resample=16.0, epochs=20, **SLOW),
    ],
    "FingerMovements": [
        {},
        _recipe(parts_of(5, 16, 1.0, dropout=0.5), resample=None, epochs=20, **SLOW),
        _recipe(parts_of(5, 8, 0.5), resample=None, epochs=15, lr=0.01, batch_size=16, weight_decay=1.0),
        _recipe(parts_of(5, 32, 2.0, dropout=0.5), resample=None, epochs=40, **SLOW),
        _recipe(parts_of(8, 32, 1.0, dropout=0.5, dropout_channels=0.2), resample=None, epochs=30, **SLOW),
        _recipe(parts_of(5, 16, 1.0, dropout=0.3), resample=50.0, epochs=20, lr=0.002, batch_size=16, weight_decay=1.0),
    ],
    "HandMovementDirection": [
        {},
        _recipe(parts_of(8, 32, 1.0, dropout=0.5), resample=100.0, epochs=40, **SLOW),
        _recipe(parts_of(8, 16, 1.0), resample=100.0, epochs=60, lr=0.004, batch_size=16, weight_decay=1.0),
        _recipe(parts_of(16, 32, 1.0, dropout=0.5), resample=100.0, epochs=40, **SLOW),
        _recipe(parts_of(8, 64, 2.0, dropout=0.5), resample=200.0, epochs=40, **SLOW),
    ],
    "BasicMotions": [
        {},
        _recipe({"noise": 0.3, "pooling": "mean", "classifier_hidden_size": 64, "dropout": 0.3}),
    ],
    "JapaneseVowels": [
        {},
        _recipe({"noise": 0.5, "dropout": 0.5}, epochs=60, weight_decay=0.1),
        _recipe({"noise": 0.5, "encoder_hidden_size": 96, "pooling": "attention", "encoder_bidirectional": False},
                epochs=60, weight_decay=0.1),
        _recipe(parts_of(3, 64, 0.5, dropout=0.5, encoder_bidirectional=False), epochs=60, weight_decay=0.1),
    ],
}  # fmt: skip
"""By the set's name; the first candidates first."""
