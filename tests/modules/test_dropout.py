import pytest
import torch
from torch import nn

from fairseq_rkm import RKMError
from fairseq_rkm.modules import LockedDropout, dropped_embedding


def test_locked_dropout_holds_one_mask_for_a_sequence():
    x = torch.ones(6, 10, 200)
    output = LockedDropout(0.25)(x)
    assert (output == output[:1]).all()
    assert set(output.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(output.eq(0).float().mean() - 0.25) < 0.05
    assert not torch.equal(output[:, 0], output[:, 1])
    assert LockedDropout(0.25).eval()(x) is x
    assert LockedDropout(0.5)(x[:0]).shape == (0, 10, 200)


def test_word_dropout_drops_whole_words_of_the_vocabulary():
    embedding = nn.Embedding(1000, 4)
    tokens = torch.arange(1000).repeat(2, 1)
    output = dropped_embedding(embedding, tokens, 0.3, training=True)
    assert torch.equal(output[0], output[1]), "a word is dropped wherever it occurs"
    dropped = output[0].eq(0).all(1)
    assert abs(dropped.float().mean() - 0.3) < 0.06
    torch.testing.assert_close(output[0][~dropped], embedding.weight[~dropped] / 0.7)
    assert torch.equal(dropped_embedding(embedding, tokens, 0.3, training=False), embedding(tokens))
    output.sum().backward()
    assert embedding.weight.grad[dropped].eq(0).all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_probabilities_outside_the_range_are_refused(p):
    with pytest.raises(RKMError, match=r"--dropout-input must lie within \[0, 1\)"):
        LockedDropout(p, "--dropout-input")
