from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from signal_samples import waves

from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.data.signals import SignalPreparation, leave_one_group_out
from fairseq_rkm.data.signals.array_files import from_arrays
from fairseq_rkm.experiments.signal_baselines import PlainLSTM
from fairseq_rkm.experiments.signal_folds import HEAD, Training, _in_turn, first_seed, fold_of, train_folds, windows_of
from fairseq_rkm.models.signals import RKMSignalClassifier, RKMSignalClassifierConfig

CPU = torch.device("cpu")


def experiment(lengths=False, people=3):
    arrays = waves(24, steps=40, people=people)
    if lengths:
        arrays["lengths"] = np.random.default_rng(0).integers(20, 41, 24)
    recordings = from_arrays("here", **arrays)
    windows = windows_of(recordings, None if lengths else 20, 20)
    folds = [fold_of(name, recordings, windows, *rows) for name, *rows in leave_one_group_out(recordings)]
    return recordings, windows, folds


def builder(windows, **flags):
    preparation = SignalPreparation(windows.classes, None, [0.0] * 3, [1.0] * 3)
    cfg = OmegaConf.structured(
        RKMSignalClassifierConfig(**{"encoder_hidden_size": 5, "ngram": 4, "dropout": 0.0, **flags})
    )

    def build():
        model = RKMSignalClassifier.build_model(cfg, SimpleNamespace(preparation=preparation))
        model.register_classification_head(HEAD, len(windows.classes))
        return model

    return build


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [False, True])
def test_folds_side_by_side_are_trained_as_each_alone(cell, lengths):
    _, windows, folds = experiment(lengths)
    build = builder(windows, cell=cell, pooling="attention" if lengths else "mean", layer_norm=cell == "ran")
    training = Training(epochs=2, lr=0.01, batch_size=6, clip_norm=0.05)
    together = train_folds(build, windows, folds, training, 1, CPU)
    for number, fold in enumerate(folds):
        alone = train_folds(build, windows, [fold], training, 1, CPU)
        assert torch.allclose(together.losses[:, number], alone.losses[:, 0], atol=1e-4)
        assert torch.allclose(together.probabilities[number], alone.probabilities[0], atol=1e-3)
        for name, tensor in alone.models[0].items():
            assert torch.allclose(together.models[number][name], tensor, atol=2e-3), name
    assert not torch.allclose(together.losses[:, 0], together.losses[:, 1])


def test_a_fold_alone_is_what_torch_s_own_loop_trains():
    _, windows, folds = experiment()
    build = builder(windows)
    training = Training(epochs=3, lr=0.01, batch_size=8, clip_norm=0.1)
    found = train_folds(build, windows, folds[:1], training, 7, CPU)
    fold, seed = folds[0], first_seed(7, folds[0].name)
    torch.manual_seed(seed)
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    draw, updates = _in_turn(fold.train, seed, 8), found.losses.size(0)
    assert updates == 3 * round(len(fold.train) / 8)
    for number in range(updates):
        rows = torch.from_numpy(next(draw))
        x = ((windows.values[rows] - torch.tensor(fold.mean)) / torch.tensor(fold.deviation)).float()
        loss = torch.nn.functional.cross_entropy(model(x, classification_head_name=HEAD)[0], windows.labels[rows])
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - number / updates)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert loss.item() == pytest.approx(found.losses[number, 0].item(), abs=1e-4)


def test_batches_take_all_windows_in_turn():
    rows = np.arange(10, 20)
    draw = _in_turn(rows, 3, 4)
    taken = np.concatenate([next(draw) for _ in range(15)])
    assert all(sorted(taken[at : at + 10]) == rows.tolist() for at in range(0, 60, 10))
    assert not np.array_equal(taken[:10], taken[10:20])
    small = _in_turn(rows[:3], 3, 8)
    assert np.bincount(np.concatenate([next(small) for _ in range(3)]) - 10).tolist() == [8, 8, 8]


def test_a_fold_s_scales_are_its_training_part_s_and_its_windows_those_of_its_people():
    recordings, windows, folds = experiment()
    people = np.array(recordings.groups)[windows.recordings]
    for fold in folds:
        assert set(people[fold.test]) == {fold.name}
        assert fold.name not in people[fold.train]
        steps = windows.values[torch.from_numpy(fold.train)].flatten(0, 1).double()
        assert np.allclose(fold.mean, steps.mean(0))
        assert np.allclose(fold.deviation, steps.std(0, correction=0))


def test_folds_learn_and_dropout_is_drawn_for_each():
    _, windows, folds = experiment(people=2)
    build = builder(windows, ngram=10, dropout=0.2, noise=0.1, dropout_channels=0.1, time_masks=1, time_mask_steps=4)
    told = []
    found = train_folds(build, windows, folds, Training(20, 0.02, 8), 1, CPU, lambda *state: told.append(state))
    labels = [windows.labels[torch.from_numpy(fold.test)] for fold in folds]
    right = [(p.argmax(1) == y).double().mean().item() for p, y in zip(found.probabilities, labels, strict=True)]
    assert min(right) > 0.9
    assert 30 <= len(told) <= 100
    assert told[-1][0] == told[-1][1] == found.losses.size(0)


def test_an_lstm_of_torch_runs_alone():
    _, windows, folds = experiment(lengths=True)
    found = train_folds(lambda: PlainLSTM(3, 2), windows, folds[:1], Training(1), 1, CPU)
    assert found.probabilities[0].shape == (8, 2)


def test_one_class_is_refused():
    recordings, _, _ = experiment()
    recordings.labels = ["a"] * len(recordings)
    with pytest.raises(RKMError, match="all recordings are of the class 'a'"):
        windows_of(recordings, 20, 20)
