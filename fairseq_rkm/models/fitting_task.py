"""The fairseq tasks of each architecture of this package."""

from typing import Any

from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from fairseq.tasks.translation import TranslationTask

from fairseq_rkm.errors import RKMError

ARCHITECTURES = {LanguageModelingTask: "rkm_lm", TranslationTask: "rkm", SentencePredictionTask: "rkm_classifier"}
"""The architecture for each kind of task; other tasks may take any."""


def check_task(arch: str, task: Any) -> None:
    """Raise RKMError if the task's kind belongs to another architecture.

    A task of this package tells its own by an attribute ``architecture``.
    """
    own = {type(task): task.architecture} if hasattr(task, "architecture") else {}
    for kind, fitting in {**ARCHITECTURES, **own}.items():
        if isinstance(task, kind) and arch != fitting:
            name = next((name for name, known in TASK_REGISTRY.items() if known is type(task)), type(task).__name__)
            raise RKMError(f"--task {name} goes with --arch {fitting} or a preset of it, not with {arch}")
