import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.data.signals import Recordings, check_groups, leave_one_group_out, split_recordings


def recordings(labels, groups=None) -> Recordings:
    return Recordings("here", [np.zeros((3, 1), np.float32) for _ in labels], list(labels), groups and list(groups))


PEOPLE = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("12345678")), min_size=8, max_size=40).filter(
    lambda rows: len({person for _, person in rows}) >= 4
)


@settings(max_examples=60, deadline=None)
@given(PEOPLE, st.floats(0.05, 0.5), st.integers(0, 99))
def test_no_person_is_in_two_parts(rows, fraction, seed):
    labels, people = zip(*rows, strict=True)
    left = sorted(set(people))[:1]
    parts = split_recordings(recordings(labels, people), "group", fraction, leave_out=left, seed=seed)
    sides = [{people[i] for i in part} for part in parts]
    assert sides[2] == set(left)
    assert all(sides), "no part is empty"
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]
    assert sorted(i for part in parts for i in part) == list(range(len(rows)))


@settings(max_examples=60, deadline=None)
@given(PEOPLE)
def test_folds_share_no_person_and_test_each_once(rows):
    labels, people = zip(*rows, strict=True)
    tested = []
    for name, train, test in leave_one_group_out(recordings(labels, people)):
        assert {people[i] for i in test} == {name}
        assert name not in {people[i] for i in train}
        assert len(train) + len(test) == len(rows)
        tested += test
    assert sorted(tested) == list(range(len(rows)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=30, max_size=60).filter(lambda y: min(map(y.count, "abc")) >= 6),
       st.floats(0.05, 0.3), st.integers(0, 99))  # fmt: skip
def test_random_parts_have_a_share_of_each_class(labels, fraction, seed):
    parts = split_recordings(recordings(labels), "random", fraction, fraction, seed=seed)
    assert sorted(i for part in parts for i in part) == list(range(len(labels)))
    for label in "abc":
        count = labels.count(label)
        assert abs([labels[i] for i in parts.test].count(label) - fraction * count) <= 1
        assert [labels[i] for i in parts.valid].count(label) >= 1
    assert parts == split_recordings(recordings(labels), "random", fraction, fraction, seed=seed)


def test_an_archive_s_training_part_is_divided_for_validation_alone():
    parts = split_recordings(recordings("ab" * 20), "archive", 0.1)
    assert (len(parts.train), len(parts.valid), parts.test) == (36, 4, [])


def test_divisions_that_cannot_be():
    both = recordings("abab", "1122")
    for arguments, sentence in (
        ((recordings("abab"), "group", 0.1, 0.1, ["1"]), "has no groups"),
        ((both, "group", 0.1, 0.1, []), "--split group needs --leave-out; the groups are 1, 2"),
        ((both, "group", 0.1, 0.1, ["3"]), "there is no group '3'; the groups are 1, 2"),
        ((both, "group", 0.1, 0.1, ["2"]), "1 groups are left, too few"),
        ((recordings("aab"), "random", 0.1, 0.1), "the class 'b' has 1 recordings left, too few to test"),
        ((recordings("aabb"), "random", 0.1, 0.1), "the class 'a' has 1 recordings left, too few to validate"),
        ((Recordings("here", both.signals), "random", 0.1, 0.1), "has no classes"),
    ):
        with pytest.raises(RKMError, match=sentence):
            split_recordings(*arguments)
    with pytest.raises(RKMError, match="one group only, '1'"):
        list(leave_one_group_out(recordings("ab", "11")))


def test_groups_of_one_class_are_named():
    check_groups(recordings("abab", "1122"))
    with pytest.raises(RKMError, match=r"1 of 2 groups have one class only: 2 \(b\): .*--one-class-groups"):
        check_groups(recordings("abbb", "1122"))
