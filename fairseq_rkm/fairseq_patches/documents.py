"""fairseq's task ``sentence_prediction`` checks its data before training, and tells of mistakes in a sentence.

fairseq's own task ends in bare assertions where a flag or a file is missing. It leaves out training documents that are
longer than ``--max-positions``. It trains on labels outside its dictionary until the loss fails.
"""

import math
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary, data_utils
from fairseq.tasks.sentence_prediction import SentencePredictionTask

from fairseq_rkm.data.binarized_split import prefetch
from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import patch


@patch(
    SentencePredictionTask,
    "setup_task",
    why="missing flags and dictionaries of sentence_prediction end in bare assertions",
    until="fairseq checks its data itself",
)
def check_flags(setup_task: Any) -> Any:
    """Make ``setup_task`` refuse missing dictionaries and a missing ``--num-classes``."""

    def checked(cls: type, cfg: Any, **kwargs: Any) -> Any:
        kinds = ["input0"] if cfg.regression_target else ["input0", "label"]
        for path in (Path(cfg.data, kind, "dict.txt") for kind in kinds):
            if not path.is_file():
                raise RKMError(
                    f"no dictionary at {path}: give the folder that examples/document_classification/prepare.py wrote, "
                    "in which fairseq-preprocess has left input0 and label"
                )
        if cfg.num_classes < 1:
            labels = "" if cfg.regression_target else f"; {Path(cfg.data, 'label', 'dict.txt')} has {_classes(cfg)}"
            raise RKMError(f"--task sentence_prediction needs --num-classes, the number of classes{labels}")
        return setup_task(cls, cfg, **kwargs)

    return checked


def _classes(cfg: Any) -> int:
    dictionary = Dictionary.load(str(Path(cfg.data, "label", "dict.txt")))
    return len(dictionary) - dictionary.nspecial


@patch(
    SentencePredictionTask,
    "load_dataset",
    why="the task leaves long documents out, and trains on labels outside its dictionary until the loss fails",
    until="fairseq checks its data itself",
)
def check_split(load_dataset: Any) -> Any:
    """Make ``load_dataset`` check a split's files, labels or values, and lengths."""

    def checked(task: SentencePredictionTask, split: str, *args: Any, **kwargs: Any) -> Any:
        for kind in ("input0",) if task.cfg.regression_target else ("input0", "label"):
            binary = Path(task.cfg.data, kind, f"{split}.bin")
            if not binary.is_file():
                raise RKMError(f"no binarized split {split!r} at {binary}: was it given to fairseq-preprocess?")
            if not binary.stat().st_size:
                raise RKMError(f"the split {split!r} at {binary} is empty")
        if task.cfg.regression_target:
            check_values(task, split)
        else:
            check_labels(task, split)
        dataset = load_dataset(task, split, *args, **kwargs)
        check_lengths(task, split)
        return dataset

    return checked


def check_labels(task: SentencePredictionTask, split: str) -> None:
    """Check the labels of a split.

    Args:
        task: with its dictionaries loaded.
        split: the split's name, for example ``"train"``.

    Raises:
        RKMError: a document without exactly one label, or with a class beyond ``--num-classes``.
    """
    dictionary, classes = task.label_dictionary, task.cfg.num_classes
    documents, labels = (
        data_utils.load_indexed_dataset(str(Path(task.cfg.data, kind, split)), symbols)
        for kind, symbols in (("input0", task.source_dictionary), ("label", dictionary))
    )
    prefetch(labels)
    where = f"the split {split!r} in {Path(task.cfg.data, 'label')}"
    if len(documents) != len(labels):
        raise RKMError(f"{where} has {len(labels):,} labels for {len(documents):,} documents")
    for i in range(len(labels)):
        label = [symbol for symbol in labels[i].tolist() if symbol != dictionary.eos()]
        if len(label) != 1:
            raise RKMError(f"{where}: document {i + 1} has {len(label)} labels; a label is one word a line")
        if label[0] < dictionary.nspecial:
            raise RKMError(
                f"{where}: the label of document {i + 1} is not in label/dict.txt: binarize the labels with that "
                "dictionary (--srcdict), and leave out documents of other classes"
            )
        if label[0] >= dictionary.nspecial + classes:
            raise RKMError(
                f"{where}: document {i + 1} is of class {label[0] - dictionary.nspecial + 1} of label/dict.txt, but "
                f"--num-classes is {classes}"
            )


def check_values(task: SentencePredictionTask, split: str) -> None:
    """Check the target numbers of a split for regression.

    Raises:
        RKMError: a document without ``--num-classes`` finite numbers as its target, or no file of targets.
    """
    path, wanted = Path(task.cfg.data, "label", f"{split}.label"), task.cfg.num_classes
    if not path.is_file():
        raise RKMError(f"--regression-target needs {path}: the numbers to be learnt, a document's on each line")
    lines = path.read_text(encoding="utf-8").splitlines()
    documents = data_utils.load_indexed_dataset(str(Path(task.cfg.data, "input0", split)), task.source_dictionary)
    if len(lines) != len(documents):
        raise RKMError(f"{path} has {len(lines):,} lines for {len(documents):,} documents")
    for number, line in enumerate(lines, 1):
        if _count_finite(line) != wanted or len(line.split()) != wanted:
            raise RKMError(f"{path}, line {number}: {line!r} is not --num-classes {wanted} finite numbers")


def _count_finite(line: str) -> int:
    try:
        return sum(math.isfinite(float(field)) for field in line.split())
    except ValueError:
        return -1


def check_lengths(task: SentencePredictionTask, split: str) -> None:
    """Raise RKMError for documents longer than ``--max-positions`` tokens: fairseq would leave them out."""
    (sizes,) = getattr(task.datasets[split], "sizes", [[]])
    longer = [int(size) for size in sizes if size > task.max_positions()]
    if longer:
        raise RKMError(
            f"the split {split!r} has {len(longer):,} documents of more than --max-positions {task.max_positions()} "
            f"tokens, the longest of {max(longer):,}: raise it (--max-positions {max(longer)} takes all), or cut them "
            "with --shorten-method truncate"
        )
