import numpy as np
import torch

from fairseq_rkm.fairseq_patches.checkpoints import CHECKPOINT_CLASSES


def test_what_training_that_watches_bleu_leaves_in_a_checkpoint_is_read(tmp_path):
    """``translation --eval-bleu`` sums counts of n-grams as numpy's arrays."""
    torch.save({"counts": np.array([3, 1, 0, 0])}, tmp_path / "checkpoint.pt")
    with torch.serialization.safe_globals(CHECKPOINT_CLASSES):
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["counts"].tolist() == [3, 1, 0, 0]
