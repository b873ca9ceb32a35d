"""Recipes to choose from, for each set of the table of signals: changes of its settings.

They differ in what small sets ask for: noise, weight decay, units, parts of a window that are pooled each, and the rate
of slow signals. ``signal_choice.py`` compares them inside training parts.
"""

from typing import Any

Recipe = dict[str, Any]


def _recipe(flags: dict[str, Any], **settings: Any) -> Recipe:
    return {**settings, "flags": flags}


def _parts(parts: int, units: int, noise: float, **flags: Any) -> dict[str, Any]:
    """Flags of a linear classifier over the means of a window's parts."""
    return {"encoder_hidden_size": units, "pooling_parts": parts, "noise": noise, "classifier_hidden_size": 0, **flags}


_SLOW = {"lr": 0.004, "batch_size": 16, "weight_decay": 0.3}

CANDIDATES: dict[str, list[Recipe]] = {
    "eeg": [
        _recipe({"encoder_hidden_size": 16, "noise": 0.1}, epochs=6, lr=0.004),
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
        _recipe(_parts(4, 32, 0.3, memory_clip="none"), resample=2.0, epochs=40, **_SLOW),
        _recipe(_parts(4, 32, 0.3, memory_clip="none"), resample=4.0, epochs=40, **_SLOW),
        _recipe(_parts(4, 32, 0.3), resample=4.0, epochs=15, **_SLOW),
        _recipe(_parts(4, 16, 1.0, dropout=0.5), resample=16.0, epochs=40, **_SLOW),
        _recipe(_parts(4, 16, 1.0, dropout=0.5, memory_clip="none"), resample=16.0, epochs=40, **_SLOW),
        _recipe(_parts(4, 32, 0.5, memory_clip="none"), resample=32.0, epochs=30, **_SLOW),
        _recipe(_parts(8, 32, 0.5, dropout=0.5), resample=32.0, epochs=60, **_SLOW),
        _recipe(_parts(4, 8, 0.3), resample=16.0, epochs=30, lr=0.01, batch_size=16, weight_decay=1.0),
        _recipe(_parts(4, 64, 2.0, dropout=0.5), resample=16.0, epochs=60, **_SLOW),
    ],
    "SelfRegulationSCP2": [
        _recipe(_parts(4, 32, 0.3), resample=4.0, epochs=15, **_SLOW),
        _recipe(_parts(4, 16, 1.0, dropout=0.5), resample=16.0, epochs=20, **_SLOW),
        _recipe(_parts(4, 8, 0.3), resample=16.0, epochs=20, lr=0.01, batch_size=16, weight_decay=1.0),
        _recipe(_parts(8, 32, 0.5, dropout=0.5), resample=32.0, epochs=20, **_SLOW),
        _recipe(_parts(1, 32, 0.5, pooling="power", dropout=0.0), resample=64.0, epochs=20, **_SLOW),
        _recipe(_parts(1, 32, 0.5, encoder_bidirectional=True), resample=16.0, epochs=20, **_SLOW),
    ],
    "FingerMovements": [
        _recipe(_parts(4, 32, 1.0), resample=25.0, epochs=10, lr=0.002, batch_size=16, weight_decay=1.0),
        _recipe(_parts(5, 16, 1.0, dropout=0.5), epochs=20, **_SLOW),
        _recipe(_parts(5, 8, 0.5), epochs=15, lr=0.01, batch_size=16, weight_decay=1.0),
        _recipe(_parts(5, 32, 2.0, dropout=0.5), epochs=40, **_SLOW),
        _recipe(_parts(8, 32, 1.0, dropout=0.5, dropout_channels=0.2), epochs=30, **_SLOW),
        _recipe(_parts(5, 16, 1.0, dropout=0.3), resample=50.0, epochs=20, lr=0.002, batch_size=16, weight_decay=1.0),
    ],
    "HandMovementDirection": [
        _recipe(_parts(8, 32, 0.3), resample=100.0, epochs=40, lr=0.004, batch_size=16, weight_decay=0.1),
        _recipe(_parts(8, 32, 1.0, dropout=0.5), resample=100.0, epochs=40, **_SLOW),
        _recipe(_parts(8, 16, 1.0), resample=100.0, epochs=60, lr=0.004, batch_size=16, weight_decay=1.0),
        _recipe(_parts(16, 32, 1.0, dropout=0.5), resample=100.0, epochs=40, **_SLOW),
        _recipe(_parts(8, 64, 2.0, dropout=0.5), resample=200.0, epochs=40, **_SLOW),
    ],
    "BasicMotions": [
        _recipe({"encoder_hidden_size": 32, "pooling": "power", "classifier_hidden_size": 0, "dropout": 0.0},
                epochs=100, lr=0.004),
        _recipe({"encoder_hidden_size": 32, "noise": 0.3}, epochs=100, lr=0.004),
    ],
    "JapaneseVowels": [
        _recipe({"noise": 0.2, "encoder_bidirectional": True}, epochs=40, lr=0.004, batch_size=16),
        _recipe({"noise": 0.5, "encoder_bidirectional": True, "dropout": 0.5}, epochs=60, lr=0.004, batch_size=16,
                weight_decay=0.1),
        _recipe({"noise": 0.5, "encoder_hidden_size": 96, "pooling": "attention"}, epochs=60, lr=0.004, batch_size=16,
                weight_decay=0.1),
        _recipe(_parts(3, 64, 0.5, dropout=0.5), epochs=60, lr=0.004, batch_size=16, weight_decay=0.1),
    ],
}  # fmt: skip
"""By the set's name; the first candidates first."""
