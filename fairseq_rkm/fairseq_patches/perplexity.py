"""``fairseq-eval-lm`` counts each word once, wherever the text is cut into samples, and skips no impossible word.

fairseq joins subwords within a sample only. It counts a word that is cut between two samples twice, so that its
perplexity of words depends on ``--tokens-per-sample``. It leaves out tokens of probability 0.
"""

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.logging.meters import StopwatchMeter
from fairseq.sequence_scorer import SequenceScorer

from fairseq_rkm.data.word_scores import Sample, WordScores
from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import setting

logger = logging.getLogger("fairseq_cli.eval_lm")


@setting(
    "fairseq_cli.eval_lm.eval_lm",
    why="words cut between samples count twice, impossible ones not at all, and sentencepiece's are not known",
    until="fairseq joins words across samples and reports an infinite perplexity",
)
def count_words_once() -> None:
    """Put :func:`eval_lm` in its place in the running command, under either of the command's names."""
    for name in ("fairseq_cli.eval_lm", "__main__"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "eval_lm") and hasattr(module, "WordStat"):
            module.eval_lm = eval_lm  # type: ignore[attr-defined]


def eval_lm(
    models: list,
    source_dictionary: Dictionary,
    batch_iterator: Iterable[dict],
    post_process: str | None = None,
    output_word_probs: bool = False,
    output_word_stats: bool = False,
    target_dictionary: Dictionary | None = None,
    softmax_batch: int = 0,
    remove_bos_token: bool = False,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Evaluate language models. This is fairseq's function of the same name, with its arguments.

    Args:
        models: the models; their probabilities are averaged.
        source_dictionary: the dictionary of the tokens, unless ``target_dictionary`` is given.
        batch_iterator: fairseq's batches.
        post_process: how words were cut into subwords; None gives the perplexity of tokens.
        output_word_probs: log each word with its score.
        output_word_stats: log counts for each distinct word.
        target_dictionary: the dictionary of the predicted tokens.
        softmax_batch: as in fairseq's ``SequenceScorer``; 0 sets no limit.
        remove_bos_token: leave out the first token of each sample.
        device: where to compute; by default the first model's device.

    Returns:
        ``loss`` in bits a word, and ``perplexity``. Both are of words if ``post_process`` joins subwords, else of
        tokens.

    Raises:
        RKMError: an unknown ``post_process``, no tokens, a word of probability 0, or missing parts of words.
    """
    dictionary = target_dictionary or source_dictionary
    found = WordScores(dictionary, post_process)
    timer = StopwatchMeter()
    scorer = SequenceScorer(dictionary, softmax_batch)
    for sample in score(models, scorer, batch_iterator, device or next(models[0].parameters()).device, timer):
        found.add(without_bos(sample, dictionary) if remove_bos_token else sample)
    found.sort()
    check_scores(found)
    loss = -float(found.scores().sum()) / (int(found.number(found.tokens())[-1]) + 1) / math.log(2)
    rate = 1.0 / timer.avg if timer.avg > 0 else 0
    logger.info(f"Evaluated {timer.n:,} tokens in {timer.sum:.1f}s ({rate:.2f} tokens/s)")
    if output_word_probs or output_word_stats:
        report(found, output_word_probs, output_word_stats)
    return {"loss": loss, "perplexity": 2**loss}


def score(
    models: list, scorer: SequenceScorer, batches: Iterable[dict], device: torch.device, timer: StopwatchMeter
) -> Iterator[Sample]:
    """Yield the scored samples of all batches, on the CPU.

    Args:
        models: the models; the scorer averages their probabilities.
        scorer: fairseq's.
        batches: fairseq's.
        device: where the models are.
        timer: counts the tokens and the seconds of scoring.
    """
    for batch in batches:
        if "net_input" not in batch:
            continue
        moved = utils.move_to_cuda(batch, device=device)
        timer.start()
        hypotheses = scorer.generate(models, moved)
        timer.stop(moved["ntokens"])
        for number, (best, *_) in zip(batch["id"].tolist(), hypotheses, strict=True):
            yield Sample(number, best["tokens"].cpu(), best["positional_scores"].float().cpu())


def without_bos(sample: Sample, dictionary: Dictionary) -> Sample:
    """Return a sample without the beginning of sentence that ``--add-bos-token`` put before it.

    Raises:
        RKMError: the sample does not begin with that token.
    """
    if not len(sample.tokens) or int(sample.tokens[0]) != dictionary.bos():
        raise RKMError(f"--add-bos-token: sample {sample.id} does not begin with {dictionary[dictionary.bos()]}")
    return Sample(sample.id, sample.tokens[1:], sample.scores[1:])


def check_scores(found: WordScores) -> None:
    """Raise RKMError if there are no tokens, or if one has a probability of 0 or NaN."""
    tokens, scores = found.tokens(), found.scores()
    if not len(tokens):
        raise RKMError(
            "no tokens to evaluate: the split is empty, or all samples are longer than the model takes "
            "(--tokens-per-sample)"
        )
    wrong = (~scores.isfinite()).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        value = float(scores[first])
        raise RKMError(
            f"{len(wrong):,} of {len(tokens):,} tokens have "
            + ("no probability that is a number" if math.isnan(value) else "probability 0, a perplexity without bound")
            + f"; the first is token {first + 1:,} of the text, {found.dictionary[int(tokens[first])]!r}"
        )


def report(found: WordScores, probabilities: bool, statistics: bool) -> None:
    """Log the words of each sample, and fairseq's counts for each word.

    Args:
        found: the words, sorted.
        probabilities: log each sample's words with their scores.
        statistics: log each distinct word's counts, the most frequent word first.
    """
    words = found.words()
    if probabilities:
        lines: list[list[str]] = [[] for _ in found.samples]
        for word in words:
            lines[word.sample].append(f"{word.text} [{word.score:2f}]")
        for sample, line in zip(found.samples, lines, strict=True):
            logger.info(f"{sample.id} " + "\t".join(line))
    if statistics:
        kind = _command().WordStat
        counted: dict[str, Any] = {}
        for word, following in zip(words, [*words[1:], None], strict=True):
            goes_on = following is not None and found.samples[following.sample].id == found.samples[word.sample].id
            entry = counted.setdefault(word.text, kind(word.text, word.pieces > 1))
            entry.add(word.score, following.score if following is not None and goes_on else None)
        for entry in sorted(counted.values(), key=lambda entry: entry.count, reverse=True):
            logger.info(entry)


def _command() -> ModuleType:
    main = sys.modules["__main__"]
    return main if hasattr(main, "WordStat") else sys.modules["fairseq_cli.eval_lm"]
