"""``skorch``: an RKM in a scikit-learn estimator, with padding, a grid search, a pipeline and pickles."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_rkm import RKM

skorch = pytest.importorskip("skorch", reason="needs skorch; see CONTRIBUTING, compatibility")
helper = pytest.importorskip("skorch.helper", reason="needs skorch; see CONTRIBUTING, compatibility")
model_selection = pytest.importorskip("sklearn.model_selection", reason="needs scikit-learn, as skorch does")


class Classifier(nn.Module):
    def __init__(self, hidden=8, cell="rkm_lstm", ngram=1):
        super().__init__()
        self.rnn = RKM(3, hidden, cell=cell, ngram=ngram, batch_first=True)
        self.out = nn.Linear(hidden, 2)

    def forward(self, x, padding_mask=None):
        _, (hidden, *_) = self.rnn(x, padding_mask=padding_mask)
        return self.out(hidden[-1])


def problem():
    """Which of two halves of a sequence has the larger mean; the rest is padding of NaN."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 8, 3)).astype("float32")
    y = (x[:, :4].mean((1, 2)) > x[:, 4:].mean((1, 2))).astype("int64")
    mask = np.zeros((64, 10), dtype=bool)
    mask[:, 8:] = True
    padded = np.concatenate([x, np.full((64, 2, 3), np.nan, dtype="float32")], axis=1)
    return {"x": padded, "padding_mask": mask}, y


def estimator(**arguments):
    return skorch.NeuralNetClassifier(
        Classifier, criterion=nn.CrossEntropyLoss, max_epochs=25, lr=0.02, optimizer=torch.optim.Adam,
        train_split=None, verbose=0, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("cell", ["lstm", "rkm_cifg"])
def test_an_estimator_learns_and_survives_a_pickle(cell, tmp_path):
    (x, y), net = problem(), estimator(module__cell=cell, module__ngram=2)
    net.fit(x, y)
    assert net.history[-1, "train_loss"] < 0.7 * net.history[0, "train_loss"]
    again = pickle.loads(pickle.dumps(net))  # noqa: S301 - the test's own
    assert np.array_equal(again.predict_proba(x), net.predict_proba(x))
    net.save_params(f_params=tmp_path / "weights.pt")
    fresh = estimator(module__cell=cell, module__ngram=2).initialize()
    fresh.load_params(f_params=tmp_path / "weights.pt")
    assert np.array_equal(fresh.predict_proba(x), net.predict_proba(x))


def test_a_search_over_cells_and_sizes():
    x, y = problem()
    search = model_selection.GridSearchCV(
        estimator().set_params(max_epochs=2),
        {"module__cell": ["lstm", "linear_kernel"], "module__hidden": [4]},
        cv=2,
        scoring="accuracy",
    )
    search.fit(helper.SliceDict(**x), y)
    assert search.best_params_["module__cell"] in {"lstm", "linear_kernel"}
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
