import logging

import pytest

from fairseq_rkm import RKMError
from fairseq_rkm.models.word_layers import SoftmaxOptions, build_softmax, parse_cutoffs


def test_cutoffs():
    assert parse_cutoffs("10, 20", 44) == [10, 20]
    assert parse_cutoffs("[10,20]", 44) == [10, 20], "as a hydra configuration may write them"
    for text in ("20,10", "10,10", "0,10", "10,44"):
        with pytest.raises(RKMError, match="must increase from 1 to below the 44 types"):
            parse_cutoffs(text, 44)
    for text in ("__import__('os').system('true')", "1.5", ""):
        with pytest.raises(RKMError, match="takes whole numbers"):
            parse_cutoffs(text, 44)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("features", "factor", "flat"),
    [(16, 4.0, None), (15, 4.0, 20), (3, 4.0, 10), (8, 2.0, None), (3, 2.0, 20), (1, 1.0, None)],
)
def test_words_that_an_adaptive_softmax_gives_no_features_are_told_of(features, factor, flat, caplog):
    cfg = SoftmaxOptions(adaptive_softmax_cutoff="10,20", adaptive_softmax_factor=factor)
    with caplog.at_level(logging.WARNING, "fairseq_rkm"):
        softmax = build_softmax(cfg, features, 44)
    empty = [band[-1].in_features == 0 for band in softmax.tail]
    assert empty == [flat is not None and start >= flat for start in (10, 20)]
    assert [f"words from {flat} on" in message for message in caplog.messages] == [True] * (flat is not None)
