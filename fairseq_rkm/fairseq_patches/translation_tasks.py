"""fairseq's other tasks that translate, used with models that they were not written for."""

from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq.data import bucket_pad_length_dataset
from fairseq.models import ARCH_MODEL_REGISTRY, FairseqMultiModel
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
from fairseq.tasks.translation_from_pretrained_bart import TranslationFromPretrainedBARTTask

from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import patch


@patch(
    MultilingualTranslationTask,
    "build_model",
    why="multilingual_translation reads its own flags from the model's, and ends there with models that have none",
    until="fairseq says which models the task takes",
)
def only_multilingual_models(build_model: Callable) -> Callable:
    """Make ``build_model`` refuse architectures that do not hold a model for each pair of languages."""

    def built(task: Any, args: Any, from_checkpoint: bool = False) -> Any:
        arch = getattr(args, "_name", None) or getattr(args, "arch", None)
        model = ARCH_MODEL_REGISTRY.get(arch)
        if model is not None and not issubclass(model, FairseqMultiModel):
            raise RKMError(
                f"--task multilingual_translation takes architectures with a model for each pair of languages, such as "
                f"multilingual_transformer, and {arch} has one model: train it with --task translation on one pair, or "
                "with --task translation_multi_simple_epoch on several"
            )
        return build_model(task, args, from_checkpoint)

    return built


@patch(
    TranslationFromPretrainedBARTTask,
    "__init__",
    why="translation_from_pretrained_bart reads its flags from an attribute that its base class no longer sets",
    until="fairseq's task reads its configuration",
)
def keep_flags(init: Callable) -> Callable:
    """Make ``__init__`` set ``args``."""

    def initialized(task: Any, args: Any, src_dict: Any, tgt_dict: Any) -> None:
        if not getattr(args, "langs", None):
            raise RKMError("--task translation_from_pretrained_bart needs --langs, all languages of the pretraining")
        init(task, args, src_dict, tgt_dict)
        task.args = args

    return initialized


@patch(
    bucket_pad_length_dataset,
    "get_buckets",
    why="--num-batch-buckets asks numpy for percentiles by an argument that numpy 2 has not",
    until="fairseq runs on numpy 2",
)
def buckets_of_numpy_2(_get_buckets: Callable) -> Callable:
    """Make ``get_buckets`` return the same lengths by the present name of numpy's argument."""

    def get_buckets(sizes: np.ndarray, num_buckets: int) -> np.ndarray:
        shares = np.linspace(0, 100, num_buckets + 1)
        return np.unique(np.percentile(sizes, shares, method="lower")[1:])

    return get_buckets
