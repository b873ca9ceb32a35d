import pytest

from fairseq_rkm import RKMError
from fairseq_rkm.models.word_layers import parse_cutoffs


def test_cutoffs():
    assert parse_cutoffs("10, 20", 44) == [10, 20]
    assert parse_cutoffs("[10,20]", 44) == [10, 20], "as a hydra configuration may write them"
    for text in ("20,10", "10,10", "0,10", "10,44"):
        with pytest.raises(RKMError, match="must increase from 1 to below the 44 types"):
            parse_cutoffs(text, 44)
    for text in ("__import__('os').system('true')", "1.5", ""):
        with pytest.raises(RKMError, match="takes whole numbers"):
            parse_cutoffs(text, 44)
