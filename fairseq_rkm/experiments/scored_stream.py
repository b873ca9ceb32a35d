"""A trained language model and a split as one stream, for scripts that tune its evaluation."""

from pathlib import Path
from typing import Any

import torch

import fairseq_rkm

SEGMENT_LENGTH = 100
"""Tokens in a segment."""


def open_stream(data: Path, checkpoint: Path, split: str) -> tuple[Any, Any, torch.device]:
    """Open a split as the one stream that a model scores.

    Args:
        data: a folder of binarized data.
        checkpoint: of ``rkm_lm``.
        split: the split's name.

    Returns:
        The decoder in float32, without a cache and with a temperature of 1; the segments
        (:class:`fairseq_rkm.data.token_stream.StreamSegments`); and the device that the decoder is on.

    Raises:
        RKMError: the data or the checkpoint cannot be read, or the model has an adaptive softmax.
    """
    fairseq_rkm.register()
    from fairseq.checkpoint_utils import load_model_ensemble_and_task

    from fairseq_rkm.data.token_stream import StreamSegments

    plain = {"cache_size": 0, "softmax_temperature": 1.0}
    overrides = {"data": str(data), "batch_size_valid": 1, **plain}
    (model,), _, task = load_model_ensemble_and_task([str(checkpoint)], arg_overrides=overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model.decoder.adaptive_softmax is not None:
        raise fairseq_rkm.RKMError(f"{checkpoint} has an adaptive softmax: this is for models with a plain one")
    model.to(device).float().eval()
    task.load_dataset(split)
    return model.decoder, StreamSegments(task.dataset(split), 1, (0, 1), SEGMENT_LENGTH, task.dictionary.pad()), device
