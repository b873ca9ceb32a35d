"""The network of ``rkm_lm``: an embedding, a stack of RKM layers and a softmax, with the state of its three modes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Optional, cast

from fairseq.data import Dictionary
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor, nn

from fairseq_rkm.data.dictionary import FINGERPRINT, check_fingerprint, fingerprint
from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.language_model.carried_state import CarriedState
from fairseq_rkm.models.language_model.stream_learner import StreamLearner
from fairseq_rkm.models.machine_memory import check_machine_memory
from fairseq_rkm.models.recurrence_options import NO_LIMIT, build_rkm
from fairseq_rkm.models.word_layers import WORD_DEVIATION, build_embedding, build_softmax
from fairseq_rkm.modules import RKM, LockedDropout, RKMState, dropped_embedding
from fairseq_rkm.modules.continuous_cache import CacheMemory, ContinuousCache
from fairseq_rkm.modules.dropout import check_probability
from fairseq_rkm.modules.softmax_mixture import SoftmaxMixture
from fairseq_rkm.modules.word_logits import word_logits
from fairseq_rkm.ops.exported_loop import is_recording
from fairseq_rkm.ops.segments import Reset

States = list[RKMState]
"""One state for each layer of the stack."""


class RKMLanguageModelDecoder(FairseqIncrementalDecoder):
    """The language model's network, built from the flags of ``--arch rkm_lm``.

    It has three modes. It runs over whole sequences, from zeros or the learned initial state. It runs step by step with
    fairseq's incremental state. Or it runs over segments of a stream and carries the state from one to the next
    (:mod:`fairseq_rkm.models.language_model.carried_state`); training and evaluation each carry their own.

    With ``--skip-connections`` a layer adds its input, before dropout, to its output where both have one size.

    With ``--reset-at-eos`` the state begins anew, in all three, before a step that reads the end-of-sentence symbol.
    fairseq begins a sentence alone with this symbol, too: sentences in a stream are scored as sentences alone.
    """

    def __init__(self, cfg: Any, dictionary: Dictionary, output_dictionary: Dictionary) -> None:
        super().__init__(dictionary)
        for name in ("dropout_words", "dropout_weights", "dropout_state"):
            check_probability(f"--{name.replace('_', '-')}", getattr(cfg, name))
        self.padding_idx = dictionary.pad()
        self.register_buffer(FINGERPRINT, fingerprint(dictionary))
        self.embed_tokens = build_embedding(
            dictionary, cfg.decoder_embed_dim, cfg.decoder_embed_path, cfg.decoder_freeze_embed
        )
        self.dropout_words = cfg.dropout_words
        self.dropout_input = LockedDropout(cfg.dropout_input, "--dropout-input")
        self.dropout_hidden = LockedDropout(cfg.dropout_hidden, "--dropout-hidden")
        self.dropout_output = LockedDropout(cfg.dropout, "--dropout")
        tied = cfg.share_decoder_input_output_embed
        sizes = [cfg.decoder_embed_dim] + [cfg.decoder_hidden_size] * cfg.decoder_layers
        self.mixture = build_mixture(cfg, sizes[-1])
        if tied and self.mixture is None:
            sizes[-1] = cfg.decoder_embed_dim
        if cfg.skip_connections and not any(m == d for m, d in pairwise(sizes)):
            raise RKMError(
                f"--skip-connections lead over layers that end at the size they begin at, and none does: the sizes are "
                f"{', '.join(map(str, sizes))} (--decoder-embed-dim, --decoder-hidden-size, --decoder-layers)"
            )
        self.layers = nn.ModuleList(
            build_rkm(
                cfg,
                m,
                d,
                ngram=n,
                weight_dropout=cfg.dropout_weights,
                state_dropout=cfg.dropout_state,
                deviation=WORD_DEVIATION,
            )
            for (m, d), n in zip(pairwise(sizes), ngrams_by_layer(cfg.ngram, cfg.decoder_layers), strict=True)
        )
        self.adaptive_softmax = self.output_projection = None
        self.types = len(output_dictionary)
        read = sizes[-1] if self.mixture is None else cfg.decoder_embed_dim
        softmax = build_softmax(cfg, read, len(output_dictionary), self.embed_tokens if tied else None)
        if cfg.adaptive_softmax_cutoff:
            self.adaptive_softmax = softmax
        else:
            self.output_projection = softmax
        self.reset_at_eos, self.skip_connections = cfg.reset_at_eos, cfg.skip_connections
        self.carried = {True: CarriedState[States](), False: CarriedState[States]()}
        self.cache: Optional[ContinuousCache] = None
        self.cache_memory = CarriedState[CacheMemory]()
        self.temperature = 1.0
        self.learner: Optional[StreamLearner] = None

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: Optional[dict] = None,
        src_lengths: Optional[Tensor] = None,
        segment: Optional[int] = None,
        features_only: bool = False,
    ) -> tuple[Tensor, dict]:
        """Predict each next word.

        Args:
            prev_output_tokens: ``(B, T)`` int64. An incremental state holds the earlier tokens: only the last is then
                read.
            encoder_out: None in a language model.
            incremental_state: fairseq's, for decoding step by step.
            src_lengths: not read: the padding symbol tells padding.
            segment: the number of this segment in its streams, counted from 0, for carried state.
            features_only: stop before the softmax.

        Returns:
            Logits, ``(B, T, V)``; a mixture of softmaxes, or a cache, gives log probabilities. An adaptive softmax or
            ``features_only`` gives features, ``(B, T, d)``. Fairseq's extras follow: ``attn`` is None, and ``features``
            and ``raw_features`` are the last layer's output, ``(T, B, d)``, after and before its dropout. ``reset`` is
            None, or ``(T, B)`` bool, True where the state began anew before the step. In training, except with an
            adaptive softmax, ``logits`` are the logits before columns were cut that a GPU has after the last word's
            (:func:`~fairseq_rkm.modules.word_logits.word_logits`).
        """
        if segment is None or self.training or self.learner is None or features_only:
            features, extra = self._features(prev_output_tokens, incremental_state, segment)
            if features_only:
                return features, extra
            if self.training and self.adaptive_softmax is None:
                extra["logits"] = self._training_logits(features)
                return extra["logits"][..., : self.types], extra
            logits = self.output_layer(features)
        else:
            logits, features, extra = self._learned(self.learner, prev_output_tokens, segment)
        if segment is not None and not self.training:
            logits = self._evaluated(logits, features.detach(), prev_output_tokens, segment)
        return logits, extra

    def _features(
        self, tokens: Tensor, incremental_state: Optional[dict], segment: Optional[int]
    ) -> tuple[Tensor, dict]:
        """Return the last layer's output ``(B, T, d)`` and fairseq's extras, and carry the state."""
        states, mask = None, None
        if incremental_state is not None:
            states = self.get_incremental_state(incremental_state, "states")
            if states is not None:
                tokens = tokens[:, -1:]
        elif segment is not None:
            states = self._states_before(segment, tokens)
        # A recorded program must not depend on the values of its example.
        if segment is None and (is_recording() or tokens.eq(self.padding_idx).any()):
            mask = tokens.eq(self.padding_idx)
        reset = self.resets(tokens)
        raw_features, new_states = self.run(tokens, states, mask, reset)
        dropped = self.dropout_output(raw_features)
        if incremental_state is not None:
            self.set_incremental_state(incremental_state, "states", new_states)
        elif segment is not None:
            self.carried[self.training].after(segment, states, [state.detach() for state in new_states])
        return dropped.transpose(0, 1).contiguous(), extras(dropped, raw_features, reset)

    def _learned(self, learner: StreamLearner, tokens: Tensor, segment: int) -> tuple[Tensor, Tensor, dict]:
        """Learn the segment before, and return logits, features ``(B, T, d)`` and fairseq's extras of this one."""
        reset = self.resets(tokens)
        scored = learner.score(segment, tokens, self._states_before(segment, tokens), reset)
        self.carried[False].after(segment, scored.entered, scored.left)
        features = scored.features
        return scored.logits, features.transpose(0, 1).contiguous(), extras(features, features, reset)

    def _states_before(self, segment: int, tokens: Tensor) -> Optional[States]:
        """Return the carried states that a segment starts from; None for zeros."""
        states = self.carried[self.training].before(segment)
        return None if states is None else check_streams(states, tokens)

    def use_cache(self, cache: ContinuousCache) -> None:
        """Evaluate with a continuous cache from now on; the outputs are the mixture's log probabilities.

        Raises:
            RKMError: the model has an adaptive softmax: its probabilities come with the loss.
        """
        self._need_plain_softmax("--cache-size")
        self.cache = cache

    def use_temperature(self, temperature: float) -> None:
        """Evaluate segments with logits divided by a temperature from now on.

        Raises:
            RKMError: the model has an adaptive softmax.
        """
        self._need_plain_softmax("--softmax-temperature")
        self.temperature = temperature

    def use_learner(self, learner: StreamLearner) -> None:
        """Learn each segment after it was evaluated from now on.

        Raises:
            RKMError: the model has an adaptive softmax.
        """
        self._need_plain_softmax("--dynamic-eval")
        self.learner = learner

    def _need_plain_softmax(self, flag: str) -> None:
        if self.adaptive_softmax is not None:
            raise RKMError(f"{flag} is for models with a plain softmax, and this one has an adaptive one")

    def _evaluated(self, logits: Tensor, outputs: Tensor, tokens: Tensor, segment: int) -> Tensor:
        """Return logits, or a cache's log probabilities, after the temperature."""
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.cache is None:
            return logits
        memory = self.cache_memory.before(segment)
        mixed, left = self.cache.log_probabilities(logits, outputs, tokens, memory)
        self.cache_memory.after(segment, memory, left)
        return mixed

    def resets(self, tokens: Tensor) -> Optional[Reset]:
        """Where a sentence begins anew among tokens ``(B, T)``; None for a model that goes on from one to the next."""
        return Reset(tokens.t().eq(self.dictionary.eos())) if self.reset_at_eos else None

    def run(
        self, tokens: Tensor, states: Optional[States], mask: Optional[Tensor], reset: Optional[Reset]
    ) -> tuple[Tensor, States]:
        """The last layer's output, ``(T, B, d)``, for tokens ``(B, T)``, and the next state."""
        x = dropped_embedding(self.embed_tokens, tokens.t(), self.dropout_words, self.training)
        x = self.dropout_input(x)
        if states is not None and self.training:
            states = [_with_start(cast(RKM, layer), state) for layer, state in zip(self.layers, states, strict=True)]
        new_states = []
        for i, layer in enumerate(self.layers):
            output, state = layer(
                self.dropout_hidden(x) if i else x, None if states is None else states[i], mask, reset=reset
            )
            # A layer's output is zero at padding, and so are the embedding's vectors: their sum stays zero there.
            x = x + output if self.skip_connections and output.size(-1) == x.size(-1) else output
            new_states.append(state)
        return x, new_states

    def output_layer(self, features: Tensor) -> Tensor:
        """Logits, or a mixture's log probabilities.

        An adaptive softmax comes with the loss, and the features stay as they are.
        """
        if self.output_projection is None:
            return features
        return (
            self.output_projection(features) if self.mixture is None else self.mixture(features, self.output_projection)
        )

    def _training_logits(self, features: Tensor) -> Tensor:
        """Logits, on a GPU perhaps with further columns of -inf, or a mixture's log probabilities."""
        if self.mixture is not None:
            return self.output_layer(features)
        return word_logits(cast(nn.Linear, self.output_projection), features)

    def extract_features(self, prev_output_tokens: Tensor, **kwargs: Any) -> tuple[Tensor, dict]:
        """:meth:`forward` up to the softmax."""
        return self.forward(prev_output_tokens, features_only=True, **kwargs)

    def reorder_incremental_state(self, incremental_state: dict, new_order: Tensor) -> None:
        """Reorder all of the state, n-gram contexts included, as the beams are."""
        states = self.get_incremental_state(incremental_state, "states")
        if states is not None:
            self.set_incremental_state(incremental_state, "states", [s.index_select(new_order) for s in states])

    def max_positions(self) -> int:
        """A recurrence has no limit."""
        return NO_LIMIT

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> None:
        """Refuse a checkpoint of another dictionary before reading its weights."""
        check_fingerprint(state_dict, f"{name}.", self, self.dictionary)


def extras(features: Tensor, raw_features: Tensor, reset: Optional[Reset]) -> dict:
    """Return fairseq's extras beside logits (:meth:`RKMLanguageModelDecoder.forward`)."""
    mask = None if reset is None else reset.mask
    return {"attn": None, "features": features, "raw_features": raw_features, "reset": mask}


def _with_start(layer: RKM, state: RKMState) -> RKMState:
    """The same state, from which gradients of zero reach the learned initial state.

    Segments after the first do not read it, and ``DistributedDataParallel`` fails on weights without a gradient.
    """
    if not layer.learn_initial_state:
        return state
    start = layer.initial_state(state.hidden.size(1))
    return state._replace(hidden=state.hidden + 0 * start.hidden, cell=state.cell + 0 * start.cell)


def build_mixture(cfg: Any, features: int) -> Optional[SoftmaxMixture]:
    """Return the mixture of ``--softmaxes``; None for one softmax.

    Args:
        cfg: the flags of ``--arch rkm_lm``.
        features: the size of the last layer.

    Raises:
        RKMError: a flag is outside its range, or the layer does not fit into this machine's memory.
    """
    check_probability("--dropout-latent", cfg.dropout_latent)
    if cfg.softmaxes == 1:
        return None
    what = f"{cfg.softmaxes:,} softmaxes over vectors of size {cfg.decoder_embed_dim:,}"
    check_machine_memory(features * cfg.softmaxes * cfg.decoder_embed_dim, what)
    return SoftmaxMixture(features, cfg.decoder_embed_dim, cfg.softmaxes, cfg.dropout_latent)


def ngrams_by_layer(ngram: Any, layers: int) -> list[int]:
    """Return the n of each layer.

    >>> ngrams_by_layer(2, 3), ngrams_by_layer([2, 1, 1], 3), ngrams_by_layer("2,1,1", 3)
    ([2, 2, 2], [2, 1, 1], [2, 1, 1])

    Args:
        ngram: a number for all layers, or a list of one for each, or the command line's text of either. A list of one
            number is for all.
        layers: the layers.

    Raises:
        RKMError: anything but whole numbers from 1 to 10,000, or a list of another length.
    """
    parts = ngram.strip("()[] ").split(",") if isinstance(ngram, str) else ngram
    numbers = [_whole(part) for part in (parts if isinstance(parts, Sequence) else [parts])]
    if not all(1 <= number <= 10**4 for number in numbers):
        raise RKMError(f"--ngram takes a whole number from 1 to 10,000, or one for each layer, as 2,1,1, not {ngram!r}")
    if len(numbers) == 1:
        return numbers * layers
    if len(numbers) != layers:
        raise RKMError(f"--ngram has {len(numbers)} numbers, one for each layer, and --decoder-layers is {layers}")
    return numbers


def _whole(value: Any) -> int:
    """Return a whole number or the one that a text is; 0 for anything else."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def check_streams(states: States, tokens: Tensor) -> States:
    """Move carried states to the tokens' device; raise RKMError if the number of streams differs."""
    carried = states[0].hidden.size(1)
    if carried != tokens.size(0):
        raise RKMError(f"the carried state is of {carried} streams, this batch of {tokens.size(0)}: keep --batch-size")
    return [state.to(tokens.device) for state in states]
