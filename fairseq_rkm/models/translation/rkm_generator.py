"""fairseq's beam search for ``rkm`` on a GPU, each step one CUDA graph."""

import math
from typing import Any, NamedTuple, Optional

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.translation.hypotheses import Choices, follow_back
from fairseq_rkm.models.translation.translation_decoder import DecoderState, RKMTranslationDecoder

ASKING_STEPS = 4
"""The number of steps between two questions to the GPU whether all sentences are done; it waits at each."""

Hypotheses = list[list[dict[str, Tensor]]]


class Beams(NamedTuple):
    """The search's state before a step, beside the decoder's, for B sentences of K beams.

    Attributes:
        tokens: ``(B, K)`` int64, each beam's last token.
        scores: ``(B, K)`` float32, each beam's log-probability.
        found: ``(B,)`` int64, the number of ended hypotheses.
        step: ``(B,)`` int64, the step, counted from 0.
        last: ``(B,)`` int64, the step that ends all hypotheses.
    """

    tokens: Tensor
    scores: Tensor
    found: Tensor
    step: Tensor
    last: Tensor


class RKMGenerator(SequenceGenerator):
    """A faster ``SequenceGenerator`` of fairseq, with the same arguments and the same hypotheses.

    At each step fairseq launches some sixty small operations for the search, asks the GPU for ended hypotheses, notes
    each, and takes finished sentences out of the batch. The host then has more work than the GPU. Here a step is one
    function of tensors, and the decoder's graphs replay it. Finished sentences stay in the batch. Each step's choices
    are kept, and the hypotheses are followed back at the end.

    Steps are replayed for plain beam search with one ``rkm`` on a GPU. All else (other searches, prefixes, constraints,
    ensembles, an adaptive softmax, ...) runs fairseq's own code.

    Raises:
        RKMError: steps are replayed, and no translation of a sentence has a probability; the model's scores may not be
            finite.
    """

    def _generate(
        self,
        sample: dict[str, Any],
        prefix_tokens: Optional[Tensor] = None,
        constraints: Optional[Tensor] = None,
        bos_token: Optional[int] = None,
    ) -> Hypotheses:
        source = sample["net_input"].get("src_tokens")
        most = -1 if source is None else min(int(self.max_len_a * source.size(1) + self.max_len_b), self.max_len - 1)
        asked_for_more = prefix_tokens is not None or constraints is not None
        if asked_for_more or most < self.min_len or not self._is_plain():
            hypotheses: Hypotheses = super()._generate(sample, prefix_tokens, constraints, bos_token)
            return hypotheses
        choices = self._search(sample["net_input"], most, self.eos if bos_token is None else bos_token)
        hypotheses = follow_back(choices, self.eos, self.normalize_scores, self.len_penalty)
        if not all(hypotheses):
            raise RKMError(
                f"no translation of sentence {hypotheses.index([])} of a batch has a probability: the model's scores "
                "are not finite. Use an earlier checkpoint, or float32 if this is half precision"
            )
        return hypotheses

    def _is_plain(self) -> bool:
        """Whether the steps can be replayed: beam search with the usual 2 K candidates."""
        decoder = getattr(self.model.single_model, "decoder", None)
        additions = self.lm_model, self.repeat_ngram_blocker, self.token_indices_to_suppress
        return (
            all(addition is None for addition in additions)
            and self.model.models_size == 1
            and isinstance(decoder, RKMTranslationDecoder)
            and decoder.adaptive_softmax is None
            and decoder.can_replay()
            and type(self.search) is BeamSearch
            and not self.match_source_len
            and 2 * self.beam_size < self.vocab_size
        )

    def _search(self, net_input: dict[str, Tensor], most: int, first: int) -> list[Choices]:
        """The choices of each step, until every sentence has its hypotheses, or for ``most`` tokens."""
        decoder = self.model.single_model.decoder
        (encoder_out,) = self.model.forward_encoder(net_input)
        states, padding_mask = encoder_out["encoder_out"][0], encoder_out["encoder_padding_mask"][0]
        source = [states.transpose(0, 1).contiguous(), padding_mask]
        steppers, initial = decoder.pack(), decoder.initial_state(encoder_out)
        rows = [row.unsqueeze(1).expand(-1, self.beam_size, *row.shape[1:]) for row in initial.rows()]
        beams, choices = self._begin(padding_mask, most, first), []

        def step(*given: Tensor) -> tuple[Tensor, ...]:
            """One step on all the tensors above, with the sentences first."""
            now, (states, padding_mask, *rows) = Beams(*given[: len(Beams._fields)]), given[len(Beams._fields) :]
            state = initial.with_rows(row.flatten(0, 1) for row in rows)
            return self._step(
                now, *decoder.run(steppers, now.tokens.view(-1, 1), (states.transpose(0, 1), padding_mask), state)
            )

        constants = self.min_len, self.unk_penalty, self.temperature, self.eos
        for number in range(most + 1):
            left = decoder.graphs(step, [*beams, *source, *rows], *constants)
            chosen, (found, ahead, *rows) = Choices(*left[: len(Choices._fields)]), left[len(Choices._fields) :]
            choices.append(chosen)
            beams = Beams(chosen.tokens, chosen.scores, found, ahead, beams.last)
            if number % ASKING_STEPS == ASKING_STEPS - 1 and bool((beams.found >= self.beam_size).all()):
                break
        return choices

    def _begin(self, like: Tensor, most: int, first: int) -> Beams:
        """The state before the first step: one beam of each sentence counts, the others continue nothing."""
        shape = like.size(0), self.beam_size
        scores = torch.full(shape, -math.inf, device=like.device)
        scores[:, 0] = 0
        zeros = torch.zeros(shape[:1], dtype=torch.int64, device=like.device)
        return Beams(torch.full(shape, first, device=like.device), scores, zeros, zeros, zeros + most)

    def _step(self, beams: Beams, features: Tensor, attention: Tensor, state: DecoderState) -> tuple[Tensor, ...]:
        """The choices, ``found``, ``step``, and the state's rows in the order of the next beams."""
        sums = self._log_probabilities(features, beams) + beams.scores.unsqueeze(-1)
        candidates, places = sums.flatten(1).topk(2 * self.beam_size)
        parents, words = places // self.vocab_size, places % self.vocab_size
        ends = words.eq(self.eos) & candidates.ne(-math.inf)
        # The best candidates that do not end go on. Of 2 K candidates at most K end, one of each beam.
        on = ends.byte().sort(dim=1, stable=True).indices[:, : self.beam_size]
        best = slice(None), slice(self.beam_size)
        chosen = Choices(
            words.gather(1, on), candidates.gather(1, on), parents.gather(1, on), ends[best], candidates[best],
            parents[best], attention.unflatten(0, beams.tokens.shape).squeeze(2),
        )  # fmt: skip
        first = torch.arange(0, beams.tokens.numel(), self.beam_size, device=on.device)
        order = (chosen.parents + first.unsqueeze(1)).flatten()
        rows = (row.index_select(0, order).unflatten(0, beams.tokens.shape) for row in state.rows())
        return *chosen, beams.found + chosen.ended.sum(dim=1), beams.step + 1, *rows

    def _log_probabilities(self, features: Tensor, beams: Beams) -> Tensor:
        """The log-probabilities of each beam's next token, ``(B, K, V)`` float32; -inf for a forbidden token."""
        model = self.model.single_model
        logits = model.decoder.output_layer(features) / self.temperature
        lprobs = model.get_normalized_probs((logits, None), log_probs=True, sample=None)
        lprobs = lprobs.view(*beams.tokens.shape, self.vocab_size)
        lprobs = lprobs.masked_fill(lprobs.isnan(), -math.inf)
        lprobs[..., self.pad] = -math.inf
        lprobs[..., self.unk] -= self.unk_penalty
        early, late = (when.unsqueeze(1) for when in (beams.step < self.min_len, beams.step >= beams.last))
        end = lprobs[..., self.eos].masked_fill(early, -math.inf)
        lprobs = lprobs.masked_fill(late.unsqueeze(2), -math.inf)
        lprobs[..., self.eos] = end
        return lprobs


class RKMGeneratorWithAlignment(SequenceGeneratorWithAlignment, RKMGenerator):
    """The generator for ``--print-alignment`` and ``--replace-unk``."""
