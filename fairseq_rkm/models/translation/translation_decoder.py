"""The decoder of ``rkm``: a stack of causal RKM layers, with attention after one of them."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Optional, cast

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqIncrementalDecoder
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from fairseq_rkm.data.dictionary import FINGERPRINT, check_fingerprint, fingerprint
from fairseq_rkm.graphs.decoding_graphs import DecodingGraphs
from fairseq_rkm.models.recurrence_options import NO_LIMIT, build_rkm, first_given
from fairseq_rkm.models.translation.rkm_encoder import EncoderOut
from fairseq_rkm.models.translation.state_bridge import StateBridge
from fairseq_rkm.models.word_layers import WORD_DEVIATION, build_softmax
from fairseq_rkm.modules import RKM, GlobalAttention, RKMState, Stepper, dropped_embedding

Layers = Iterable[Callable[..., tuple[Tensor, RKMState]]]
"""The decoder's layers, or steppers in their place."""
Source = tuple[Tensor, Tensor]
"""The encoder's states, ``(S, B, e)``, and their padding mask, ``(B, S)``."""


class DecoderState(NamedTuple):
    """The decoder's state between two steps.

    Attributes:
        layers: each layer's state, its n-gram context included.
        fed: the last attentional vector, ``(B, d)``, with input feeding; ``(B, 0)`` without.
    """

    layers: list[RKMState]
    fed: Tensor

    def index_select(self, rows: Tensor) -> "DecoderState":
        """The states of these rows of the batch, ``(rows,)`` int64: beams are reordered so."""
        return self.with_rows(row.index_select(0, rows) for row in self.rows())

    def rows(self) -> list[Tensor]:
        """All tensors of the state, with the batch first."""
        return [tensor.transpose(0, 1) for layer in self.layers for tensor in layer.tensors()] + [self.fed]

    def with_rows(self, rows: Iterable[Tensor]) -> "DecoderState":
        """The state made of these tensors; the inverse of :meth:`rows`."""
        given = iter(rows)
        return DecoderState([layer.map(lambda _: next(given).transpose(0, 1)) for layer in self.layers], next(given))


class RKMTranslationDecoder(FairseqIncrementalDecoder):
    """Score the next token from target tokens and source states.

    One layer's output queries the source (:class:`~fairseq_rkm.modules.GlobalAttention`). The layers above it, or the
    softmax, read the attentional vector. ``attention_layer`` 0 puts attention after the last layer. With
    ``input_feeding`` too, this is the model of Luong et al. (2015), sections 3.1 and 3.3.

    Without input feeding no recurrence reads later attention. A whole target is then one pass of each layer and one
    product over all queries, in place of single steps. Input feeding tells the decoder the source words that it has
    attended to. An ``attention_layer`` below the last does so too: the layers above are recurrences over attentional
    vectors, and still take one pass each.

    Args:
        cfg: the flags of ``--arch rkm``.
        dictionary: the target's.
        embed_tokens: the target's embedding.
        source_size: e, the size of the encoder's states.
    """

    def __init__(self, cfg: Any, dictionary: Dictionary, embed_tokens: nn.Embedding, source_size: int) -> None:
        super().__init__(dictionary)
        self.padding_idx = dictionary.pad()
        self.register_buffer(FINGERPRINT, fingerprint(dictionary))
        self.embed_tokens = embed_tokens
        self.dropout_words = cfg.dropout_words
        self.dropout_in = FairseqDropout(first_given(cfg.decoder_dropout_in, cfg.dropout), type(self).__name__)
        self.dropout_out = FairseqDropout(first_given(cfg.decoder_dropout_out, cfg.dropout), type(self).__name__)
        self.attention_layer = cfg.attention_layer or cfg.decoder_layers
        tied = cfg.share_all_embeddings or cfg.share_decoder_input_output_embed
        hidden, count = cfg.decoder_hidden_size, cfg.decoder_layers
        features = first_given(cfg.decoder_out_embed_dim, cfg.decoder_embed_dim if tied else hidden)
        outputs = [hidden] * count
        if self.attention_layer < count:
            outputs[-1] = features
        attended = features if self.attention_layer == count else hidden
        self.fed_size = attended if cfg.input_feeding else 0
        inputs = [embed_tokens.embedding_dim + self.fed_size] + [hidden] * (count - 1)
        layers = [
            build_rkm(
                cfg, m, d, ngram_padding="causal", cell=str(first_given(cfg.decoder_cell, cfg.cell)),
                ngram=first_given(cfg.decoder_ngram, cfg.ngram), weight_dropout=cfg.dropout_weights,
                deviation=WORD_DEVIATION, learn_initial_state=False,  # the bridges' biases are one
            )
            for m, d in zip(inputs, outputs, strict=True)
        ]  # fmt: skip
        self.layers = nn.ModuleList(layers)
        self.attention = GlobalAttention(hidden, source_size, attended)
        self.bridges = nn.ModuleList(StateBridge(source_size, layer) for layer in layers)
        softmax = build_softmax(cfg, features, len(dictionary), embed_tokens if tied else None)
        self.adaptive_softmax = softmax if cfg.adaptive_softmax_cutoff else None
        self.output_projection = None if cfg.adaptive_softmax_cutoff else softmax
        self.graphs = DecodingGraphs()

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: EncoderOut,
        incremental_state: Optional[dict] = None,
        features_only: bool = False,
        **_unused: Any,
    ) -> tuple[Tensor, dict]:
        """Predict each next token.

        Args:
            prev_output_tokens: ``(B, T)`` int64, padded on either side. An incremental state holds the earlier tokens:
                only the last is then read.
            encoder_out: the output of :class:`~fairseq_rkm.models.translation.rkm_encoder.RKMEncoder`.
            incremental_state: fairseq's, for decoding step by step.
            features_only: stop before the softmax.

        Returns:
            Scores, ``(B, T, V)``; an adaptive softmax or ``features_only`` gives features, ``(B, T, d)``. Fairseq's
            extras follow: ``{"attn": [weights]}``, the attention weights, ``(B, T, S)``.
        """
        state, order, tokens = None, None, prev_output_tokens
        if incremental_state is not None:
            state, order = (self.get_incremental_state(incremental_state, name) for name in ("state", "order"))
            if state is not None:
                tokens = tokens[:, -1:]
        if state is None:
            state = self.initial_state(encoder_out)
        source = encoder_out["encoder_out"][0], encoder_out["encoder_padding_mask"][0]
        if incremental_state is not None and tokens.size(1) == 1 and self._can_step():
            features, weights, state = self._step(incremental_state, tokens, source, state, order)
        else:
            state = state if order is None else state.index_select(order)
            features, weights, state = self.run(self.layers, tokens, source, state)
        if incremental_state is not None:
            self.set_incremental_state(incremental_state, "state", state)
            self.set_incremental_state(incremental_state, "order", None)
        return (features if features_only else self.output_layer(features)), {"attn": [weights]}

    def initial_state(self, encoder_out: EncoderOut) -> DecoderState:
        """The state before the first token; each layer's comes from the encoder layer beside it, seen from the top."""
        (hiddens,), (memories,) = encoder_out["encoder_hiddens"], encoder_out["encoder_memories"]
        ahead = hiddens.size(0) - len(self.layers)
        beside = [max(0, i + ahead) for i in range(len(self.layers))]
        states = [bridge(hiddens[k], memories[k]) for bridge, k in zip(self.bridges, beside, strict=True)]
        return DecoderState(states, states[0].hidden.new_zeros(hiddens.size(1), self.fed_size))

    def _can_step(self) -> bool:
        """Whether steppers may take the place of layers: without gradients, and with ``backend="auto"`` everywhere."""
        return not torch.is_grad_enabled() and all(layer.backend == "auto" for layer in self.layers)

    def can_replay(self) -> bool:
        """Whether single steps can be replayed as CUDA graphs: on a GPU, without dropout drawn in a step."""
        dropouts = self.dropout_in, self.dropout_out
        drawing = any(dropout.training or dropout.apply_during_inference for dropout in dropouts)
        return self._can_step() and not drawing and self.graphs.available(self.embed_tokens.weight)

    def pack(self) -> list[Stepper]:
        """Pack the layers' present weights for the single steps of one sequence, where graphs look for them."""
        return self.graphs.hold([Stepper(cast(RKM, layer)) for layer in self.layers], self.parameters())

    def _step(
        self, incremental_state: dict, tokens: Tensor, source: Source, state: DecoderState, order: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """As :meth:`run`, for the state reordered by ``order``, with weights packed once a sequence.

        On a GPU the step and the reordering are replayed.
        """
        steppers = self.get_incremental_state(incremental_state, "steppers")
        if steppers is None:
            steppers = self.pack()
            self.set_incremental_state(incremental_state, "steppers", steppers)
        if not self.can_replay() or steppers is not self.graphs.steppers:
            return self.run(steppers, tokens, source, state if order is None else state.index_select(order))

        def step(
            tokens: Tensor, order: Tensor, source: Tensor, padding_mask: Tensor, *rows: Tensor
        ) -> tuple[Tensor, ...]:
            before = state.with_rows(row.index_select(0, order) for row in rows)
            features, weights, after = self.run(steppers, tokens, (source.transpose(0, 1), padding_mask), before)
            return features, weights, *after.rows()

        if order is None:
            order = torch.arange(tokens.size(0), device=tokens.device)
        states, padding_mask = source
        inputs = [tokens, order, states.transpose(0, 1), padding_mask, *state.rows()]
        features, weights, *rows = self.graphs(step, inputs)
        return features, weights, state.with_rows(rows)

    def run(
        self, layers: Layers, tokens: Tensor, source: Source, state: DecoderState
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Features, ``(B, T, d)``, attention weights, ``(B, T, S)``, and the next state."""
        mask = tokens.eq(self.padding_idx) if tokens.size(1) > 1 else None
        x = self.dropout_in(dropped_embedding(self.embed_tokens, tokens.t(), self.dropout_words, self.training))
        run = self._run_fed if self.fed_size else self._run_layers
        features, weights, state = run(layers, x, source, state, mask)
        return features.transpose(0, 1), weights, state

    def _run_layers(
        self, layers: Layers, x: Tensor, source: Source, state: DecoderState, mask: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Features, ``(T, B, d)``, attention weights, ``(B, T, S)``, and the next state; each layer takes one pass."""
        states, fed = [], state.fed
        for number, layer in enumerate(layers, 1):
            before = state.layers[number - 1]
            x, left = layer(x, before) if mask is None else layer(x, before, mask)
            states.append(left)
            if number == self.attention_layer:
                x, weights = self.attention(x, *source)
            x = self.dropout_out(x)
            if number == self.attention_layer and self.fed_size:
                fed = x[-1]
        return x, weights, DecoderState(states, fed)

    def _run_fed(
        self, layers: Layers, x: Tensor, source: Source, state: DecoderState, mask: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """As :meth:`_run_layers`, step by step; each step reads the last attentional vector (Luong et al., 3.3)."""
        features, weights = [], []
        for t in range(x.size(0)):
            padding = None if mask is None else mask[:, t : t + 1]
            fed = torch.cat([x[t], state.fed], dim=-1).unsqueeze(0)
            output, weight, left = self._run_layers(layers, fed, source, state, padding)
            if padding is not None:
                left = left._replace(fed=torch.where(padding, state.fed, left.fed))
            state = left
            features.append(output)
            weights.append(weight)
        return torch.cat(features), torch.cat(weights, dim=1), state

    def output_layer(self, features: Tensor) -> Tensor:
        """Scores; an adaptive softmax comes with the loss, and the features stay as they are."""
        return features if self.output_projection is None else self.output_projection(features)

    def extract_features(
        self, prev_output_tokens: Tensor, encoder_out: EncoderOut, **kwargs: Any
    ) -> tuple[Tensor, dict]:
        """:meth:`forward` up to the softmax."""
        return self.forward(prev_output_tokens, encoder_out, features_only=True, **kwargs)

    def reorder_incremental_state(self, incremental_state: dict, new_order: Tensor) -> None:
        """Note the beams' new order; the next step reads all of the state in it."""
        if self.get_incremental_state(incremental_state, "state") is None:
            return
        order = self.get_incremental_state(incremental_state, "order")
        order = new_order if order is None else order.index_select(0, new_order)
        self.set_incremental_state(incremental_state, "order", order)

    def reorder_incremental_state_scripting(self, incremental_state: dict, new_order: Tensor) -> None:
        """As fairseq's, without its walk over all submodules at every step: none has a state of its own."""
        self.reorder_incremental_state(incremental_state, new_order)

    def max_positions(self) -> int:
        """A recurrence has no limit; the task sets one."""
        return NO_LIMIT

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> None:
        """Refuse a checkpoint of another dictionary before reading its weights."""
        check_fingerprint(state_dict, f"{name}.", self, self.dictionary)
