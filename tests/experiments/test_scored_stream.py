from types import SimpleNamespace

import pytest
from fairseq import checkpoint_utils

from fairseq_rkm import RKMError
from fairseq_rkm.experiments.scored_stream import open_stream


def test_an_adaptive_softmax_is_refused(monkeypatch, tmp_path):
    """Its decoder returns features, which are no logits."""
    model = SimpleNamespace(decoder=SimpleNamespace(adaptive_softmax=object()))
    monkeypatch.setattr(checkpoint_utils, "load_model_ensemble_and_task", lambda *_, **__: ([model], None, None))
    with pytest.raises(RKMError, match=r"last\.pt has an adaptive softmax"):
        open_stream(tmp_path, tmp_path / "last.pt", "valid")
