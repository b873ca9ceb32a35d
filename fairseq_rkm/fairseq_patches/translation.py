"""Repairs of fairseq's translation commands. They hold for all of its models.

1. ``--replace-unk`` copies source words as its help says. fairseq 0.12 computes no alignment for it, reads alignments
   of ``--print-alignment`` as if they were numbers, and without a value looks for a file called ``"@@ "``.
2. Mistakes are told in a sentence before anything is translated: a language pair that the data lacks, a sentence that
   is too long, an empty source sentence, a sentencepiece model that does not fit the source's dictionary.
3. A training set in several files (``train``, ``train1``, ...) has each of them once unless ``--upsample-primary`` is
   given. fairseq 0.12 repeats the first -1 times by default, and fails.

A model may have its own generators (``generator_classes``: without and with alignment). Translation then uses them.
"""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import LanguagePairDataset, data_utils
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import MissingMandatoryValue

from fairseq_rkm.data.sentencepieces import check_pieces
from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import patch

logger = logging.getLogger(__name__)


@patch(
    utils,
    "load_align_dict",
    why="--replace-unk without a value looks for a file called '@@ '",
    until="fairseq's default is no file",
)
def copy_without_file(load: Callable) -> Callable:
    """Make ``--replace-unk`` without a file copy words: its default value ``"@@ "`` is no file's name."""
    return lambda path: load("" if path == "@@ " else path)


@patch(
    FairseqTask,
    "build_generator",
    why="fairseq aligns for --print-alignment and not for --replace-unk; a model may have a generator of its own",
    until="fairseq aligns for --replace-unk and asks models for their generators",
)
def build_generator_as_needed(build: Callable) -> Callable:
    """Make ``build_generator`` use the model's own generator, and one that aligns for ``--replace-unk``."""

    def build_generator(
        self: FairseqTask,
        models: list,
        args: Any,
        seq_gen_cls: Any = None,
        extra_gen_cls_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        if getattr(args, "replace_unk", None) is not None and not args.print_alignment:
            args = copy.deepcopy(args)
            args.print_alignment = "hard"
        own = getattr(models[0], "generator_classes", None)
        if own and seq_gen_cls is None:
            kind = getattr(args, "print_alignment", None)
            aligned = {"print_alignment": kind} if kind else {}
            seq_gen_cls, extra_gen_cls_kwargs = own[bool(aligned)], {**(extra_gen_cls_kwargs or {}), **aligned}
        return build(self, models, args, seq_gen_cls, extra_gen_cls_kwargs, **kwargs)

    return build_generator


@patch(
    utils,
    "replace_unk",
    why="--replace-unk reads the alignment's pairs as if they were numbers",
    until="fairseq reads its own alignments",
)
def replace_by_pairs(replace: Callable) -> Callable:
    """Make ``replace_unk`` read the pairs of fairseq's aligner or, with ``soft``, its rows of weights."""

    def replace_unk(hypo_str: str, src_str: str, alignment: list, align_dict: dict, unk: str) -> str:
        return replace(hypo_str, src_str, [_aligned(entry) for entry in alignment], align_dict, unk)

    return replace_unk


def _aligned(entry: Any) -> int:
    """Return a target word's source word.

    Args:
        entry: a pair (source word, target word), or a row of weights as text whose last entry is the end of sentence.
    """
    if isinstance(entry, tuple):
        return entry[0]
    return int(np.argmax([float(weight) for weight in entry[:-1]]))


@patch(
    TranslationTask,
    "setup_task",
    why="languages without data end in a stack trace, and a training set in several files is repeated -1 times",
    until="fairseq checks languages and repeats once by default",
)
def check_languages_first(setup: Callable) -> Callable:
    """Make ``setup_task`` check the languages first, and take each file of a training set once."""

    def setup_task(cls: type, cfg: TranslationConfig, **kwargs: Any) -> TranslationTask:
        check_languages(cfg)
        if cfg.upsample_primary == TranslationConfig.upsample_primary:
            cfg.upsample_primary = 1
        return setup(cls, cfg, **kwargs)

    return setup_task


def check_languages(cfg: TranslationConfig) -> None:
    """Check that the data's folder is there and has the languages that are asked for.

    Raises:
        RKMError: no folder, a language without dictionary, or no languages given and none to be told from the folder.
    """
    folder = Path(utils.split_paths(cfg.data or "")[0])
    if not cfg.data or not folder.is_dir():
        raise RKMError(f"no folder of binarized data at {str(folder)!r}: give the one that fairseq-preprocess wrote")
    languages = sorted(path.name[len("dict.") : -len(".txt")] for path in folder.glob("dict.*.txt"))
    has = f"which has dictionaries of {', '.join(languages)}" if languages else "which has no dictionaries"
    for flag, language in (("--source-lang", cfg.source_lang), ("--target-lang", cfg.target_lang)):
        if language and language not in languages:
            raise RKMError(f"{flag} {language}: there is no dict.{language}.txt in {folder}, {has}")
    if not (cfg.source_lang and cfg.target_lang) and None in data_utils.infer_language_pair(str(folder)):
        raise RKMError(f"give --source-lang and --target-lang: they cannot be told from {folder}, {has}")


@patch(
    FairseqTask,
    "filter_indices_by_size",
    why="sentences beyond the longest, and empty ones, are not told of in a sentence",
    until="fairseq names them",
)
def tell_sizes(filter_: Callable) -> Callable:
    """Make ``filter_indices_by_size`` name sentences that are empty or too long."""

    def filter_indices_by_size(
        self: FairseqTask, indices: Any, dataset: Any, max_positions: Any = None, ignore_invalid_inputs: bool = False
    ) -> Any:
        if isinstance(dataset, LanguagePairDataset):
            check_sizes(dataset, indices, max_positions, ignore_invalid_inputs)
        return filter_(self, indices, dataset, max_positions, ignore_invalid_inputs)

    return filter_indices_by_size


def check_sizes(dataset: LanguagePairDataset, indices: Any, max_positions: Any, ignore_long: bool) -> None:
    """Warn of empty source sentences, and refuse sentences that are too long.

    Args:
        dataset: the pairs of sentences.
        indices: ``(N,)`` int64, the sentences to look at.
        max_positions: the most tokens: one number, or a pair for source and target.
        ignore_long: let long sentences pass; fairseq leaves them out.

    Raises:
        RKMError: a sentence has more tokens than ``max_positions``, and ``ignore_long`` is not set.
    """
    empty = indices[np.asarray(dataset.src_sizes)[indices] <= 1]
    if len(empty):
        logger.warning(
            f"{len(empty)} of {len(indices)} source sentences have no words (the first is number {min(empty)}, counted "
            "from 0): what a model makes of them is no translation"
        )
    long = [] if ignore_long else dataset.filter_indices_by_size(indices, max_positions)[1]
    if len(long):
        source, target = dataset.src_sizes[long[0]], 0 if dataset.tgt_sizes is None else dataset.tgt_sizes[long[0]]
        most = max_positions if isinstance(max_positions, (tuple, list)) else (max_positions, max_positions)
        raise RKMError(
            f"sentence {long[0]} of {len(dataset)} (counted from 0) has {source} tokens"
            + (f" and its translation {target}" if target else "")
            + f", more than the {most[0]} of --max-source-positions or the {most[1]} of --max-target-positions: split "
            "it, raise the limit, or leave such sentences out with --skip-invalid-size-inputs-valid-test"
        )


@patch(
    FairseqTask,
    "build_bpe",
    why="a sentencepiece model that did not make the source's dictionary translates into nonsense",
    until="fairseq compares model and dictionary",
)
def check_sentencepieces(build: Callable) -> Callable:
    """Make ``build_bpe`` refuse a sentencepiece model that does not fit the source's dictionary."""

    def build_bpe(self: FairseqTask, args: Any) -> Any:
        if getattr(args, "_name", None) != "sentencepiece":
            return build(self, args)
        try:
            bpe = build(self, args)
        except MissingMandatoryValue:
            raise RKMError("--bpe sentencepiece needs its model: --sentencepiece-model FILE") from None
        except RuntimeError as error:
            raise RKMError(f"{args.sentencepiece_model} is not a sentencepiece model ({error})") from error
        check_pieces(bpe, self.source_dictionary)
        return bpe

    return build_bpe
