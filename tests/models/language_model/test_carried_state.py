import pytest

from fairseq_rkm import RKMError
from fairseq_rkm.models.language_model.carried_state import CarriedState


def test_segments_in_order_and_repeated():
    carried = CarriedState()
    assert carried.before(0) is None
    carried.after(0, None, "a")
    assert carried.before(1) == "a"
    carried.after(1, "a", "b")
    assert carried.before(1) == "a", "a segment run again starts where it started"
    carried.after(1, "a", "b")
    assert carried.before(2) == "b"
    assert carried.before(0) is None, "a first segment starts afresh wherever it comes"


def test_a_restored_state_goes_on():
    carried = CarriedState()
    carried.restore(4, "e")
    assert carried.before(5) == "e"


def test_a_gap_is_refused():
    carried = CarriedState()
    carried.after(0, None, "a")
    with pytest.raises(RKMError, match="segment 3 of the stream came after segment 0"):
        carried.before(3)
