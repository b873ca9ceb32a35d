"""``cross_entropy_ar_tar``: cross entropy with activation and temporal activation regularisation (AR and TAR).

Merity, McCann and Socher (2017), *Revisiting Activation Regularization for Language RNNs*. Large outputs cost
something, and so do outputs that change fast from step to step. Past decode regularisation can be added:
:mod:`fairseq_rkm.criterions.past_decoding`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.logging import metrics
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.criterions.past_decoding import PastDecoder
from fairseq_rkm.criterions.word_costs import word_costs
from fairseq_rkm.errors import RKMError


@dataclass
class CrossEntropyARTARConfig(CrossEntropyCriterionConfig):
    """Flags of ``--criterion cross_entropy_ar_tar``."""

    alpha: float = field(
        default=2.0, metadata={"help": "weight of AR, the mean square of the last layer's output after dropout"}
    )
    beta: float = field(
        default=1.0,
        metadata={"help": "weight of TAR, the mean square of its change from step to step before dropout"},
    )
    past_decode: float = field(
        default=0.0,
        metadata={
            "help": "weight of past decode regularisation, the cross entropy of the input word, decoded from the "
            "predicted distribution by the embedding; 0: none"
        },
    )


@register_criterion("cross_entropy_ar_tar", dataclass=CrossEntropyARTARConfig)
class CrossEntropyARTARCriterion(CrossEntropyCriterion):
    """Cross entropy and its regularisers in training, and cross entropy alone in evaluation.

    The loss is cross entropy + alpha * AR + beta * TAR + past_decode * PDR.

    The last layer's output h is ``(T, B, d)``. AR is the mean of ``dropped(h)_t ** 2``, and TAR the mean of ``(h_t -
    h_{t-1}) ** 2``, over positions that are not padded (Merity et al. 2018). A step before which the state begins anew
    has no change to count. The logged ``nll_loss`` and ``ppl`` are of the cross entropy alone. ``ar`` and ``tar`` are
    logged without their weights.

    PDR is the mean cross entropy of the input words, decoded from the predicted distributions
    (:class:`~fairseq_rkm.criterions.past_decoding.PastDecoder`); it is logged in bits as ``past_nll``. It
    needs a whole softmax. It has weights, a bias for each word: they are in the checkpoint's ``criterion``, and no
    evaluation needs them.

        fairseq-train ... --arch rkm_lm --criterion cross_entropy_ar_tar --alpha 2 --beta 1

    The model's extras must hold ``features`` and ``raw_features``, both ``(T, B, d)``: the output with and without its
    dropout. ``rkm_lm`` gives them. Where it gives ``logits``, ``(B, T, V')``, too, they are not normalised before their
    costs are known; columns after the last word's hold -inf. With an adaptive softmax the cross entropy is the
    softmax's own. A cluster of it may then have no gradient: several processes need ``--ddp-backend legacy_ddp``.

    Raises:
        RKMError: a weight is negative, or the model lacks these extras or a whole softmax.
    """

    def __init__(self, task: Any, sentence_avg: bool, alpha: float, beta: float, past_decode: float = 0.0) -> None:
        super().__init__(task, sentence_avg)
        weights = {"alpha": alpha, "beta": beta, "past-decode": past_decode}
        for flag, value in weights.items():
            if not 0 <= value < math.inf:
                raise RKMError(f"--{flag} must be 0 or more, not {value}")
        self.alpha, self.beta, self.past_decode = weights.values()
        self.past = PastDecoder(len(task.target_dictionary)) if past_decode else None

    def forward(self, model: Any, sample: dict, reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        """Return the loss, the sample size and the values to log.

        Args:
            model: the model; AR and TAR are added only if it is in training.
            sample: fairseq's batch, with ``target`` ``(B, T)``.
            reduce: sum the cross entropy; else it has a value for each token.

        Returns:
            The loss, summed over the tokens that are not padded; the number to divide it by; a dictionary of sums to
            log.

        Raises:
            RKMError: the model in training does not give its last layer's output.
        """
        output, extra = model(**sample["net_input"])
        nll, predicted = self._cross_entropy(model, output, extra, sample, reduce)
        ntokens = sample["ntokens"]
        sample_size = sample["target"].size(0) if self.sentence_avg else ntokens
        logged = {
            "nll_loss": nll.data,
            "ntokens": ntokens,
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        loss = nll
        if model.training:
            if "raw_features" not in extra:
                raise RKMError(
                    f"--criterion cross_entropy_ar_tar needs a model that gives its last layer's output, which "
                    f"{type(model).__name__} does not: use --arch rkm_lm"
                )
            ar, tar = self._regularisers(extra, sample)
            parts = {"ar": (self.alpha, ar), "tar": (self.beta, tar)}
            if self.past is not None:
                parts["past_nll"] = self.past_decode, self._past(self.past, model, predicted, sample)
            loss = nll + sample_size * sum(weight * value for weight, value in parts.values())
            # Sums over tokens, so that processes and updates can be added up.
            logged |= {name: ntokens * value.data for name, (_, value) in parts.items()}
        return loss, sample_size, {"loss": loss.data, **logged}

    def load_state_dict(self, state_dict: Mapping[str, Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Load the weights of PDR. A checkpoint of a run without PDR has None: its bias then begins at 0."""
        return super().load_state_dict(self.state_dict() if state_dict is None else state_dict, *args, **kwargs)

    def _cross_entropy(
        self, model: Any, output: Tensor, extra: dict[str, Any], sample: dict, reduce: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the cross entropy, and the predicted distributions ``(N, V')`` if the past is to be decoded of them.

        An adaptive softmax has none.
        """
        softmax, how = getattr(model.decoder, "adaptive_softmax", None), "sum" if reduce else "none"
        if softmax is None:
            predict = model.training and self.past is not None
            target = model.get_targets(sample, (output,)).flatten()
            if "logits" in extra:
                return word_costs(extra["logits"].flatten(0, 1), target, self.padding_idx, how, predict)
            log_probs = model.get_normalized_probs((output,), log_probs=True).flatten(0, 1)
            nll = F.nll_loss(log_probs, target, ignore_index=self.padding_idx, reduction=how)
            return nll, log_probs.exp() if predict else None
        # The head's targets are the dictionary's numbers, padding among them. The clusters count from 0.
        ignored = [self.padding_idx, *[-100] * len(softmax.tail)]
        parts = [
            word_costs(logits, target, ignore, how)[0]
            for logits, target, ignore in zip(*softmax(output, sample["target"].view(-1)), ignored, strict=True)
            if target is not None
        ]
        return torch.stack(parts).sum() if reduce else torch.cat(parts), None

    def _past(self, decoder: PastDecoder, model: Any, predicted: Tensor | None, sample: dict) -> Tensor:
        """Return PDR, in nats."""
        if predicted is None:
            raise RKMError("--past-decode is for models with a plain softmax, and this one has an adaptive one")
        embedding, types = model.decoder.embed_tokens.weight, len(decoder.bias)
        if len(embedding) != types:
            raise RKMError(
                f"--past-decode needs one dictionary, but the input's has {len(embedding)} types and the output's "
                f"{types}"
            )
        costs = decoder(predicted, embedding, sample["net_input"]["src_tokens"].flatten())
        return _mean_where(costs, sample["target"].flatten().ne(self.padding_idx))

    def _regularisers(self, extra: dict[str, Any], sample: dict) -> tuple[Tensor, Tensor]:
        """Return AR and TAR in float32, from outputs ``(T, B, d)`` with and without dropout."""
        raw, reset = extra["raw_features"], extra.get("reset")
        squares = extra["features"].float().square()
        changes = (raw[1:] - raw[:-1]).float().square()
        if sample["ntokens"] == sample["target"].numel() and reset is None:
            # A mean over no steps is NaN: a single step has not changed.
            return squares.mean(), changes.mean() if len(changes) else changes.sum()
        real = sample["target"].ne(self.padding_idx).t()
        pairs = real[1:] & real[:-1]
        if reset is not None:
            pairs = pairs & ~reset[1:]
        return _mean_where(squares.mean(-1), real), _mean_where(changes.mean(-1), pairs)

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log loss and cross entropy in bits, as fairseq does, perplexity, and each regulariser."""

        def total(key: str) -> Any:
            return sum(output.get(key, 0) for output in logging_outputs)

        tokens, sample_size = total("ntokens"), total("sample_size")
        metrics.log_scalar("loss", total("loss") / sample_size / math.log(2), sample_size, round=3)
        metrics.log_scalar("nll_loss", total("nll_loss") / tokens / math.log(2), tokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        if any("ar" in output for output in logging_outputs):
            metrics.log_scalar("ar", total("ar") / tokens, tokens, round=5)
            metrics.log_scalar("tar", total("tar") / tokens, tokens, round=5)
        if any("past_nll" in output for output in logging_outputs):
            metrics.log_scalar("past_nll", total("past_nll") / tokens / math.log(2), tokens, round=4)


def _mean_where(values: Tensor, positions: Tensor) -> Tensor:
    """Return the mean of values over the positions, of the same shape, that are True; 0 if there are none."""
    return (values * positions).sum() / positions.sum().clamp(min=1)
