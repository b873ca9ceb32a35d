"""``rkm``: an encoder-decoder of RKM layers with attention, for fairseq's ``translation`` task and its kin."""

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.models import FairseqEncoderDecoderModel, register_model
from fairseq.tasks.translation import TranslationTask
from torch import Tensor, nn

from fairseq_rkm.checkpoints.loading import Wanted
from fairseq_rkm.data.sentencepieces import check_pieces
from fairseq_rkm.errors import RKMError
from fairseq_rkm.graphs.graphed_function import GraphedFunction
from fairseq_rkm.graphs.recording import NEEDS_GPU, refuse
from fairseq_rkm.models import trained_models
from fairseq_rkm.models.fitting_task import check_task
from fairseq_rkm.models.recurrence_options import CELL_CHOICES, RKMOptions
from fairseq_rkm.models.translation.rkm_encoder import RKMEncoder
from fairseq_rkm.models.translation.rkm_generator import RKMGenerator, RKMGeneratorWithAlignment
from fairseq_rkm.models.translation.translation_decoder import RKMTranslationDecoder
from fairseq_rkm.models.translation.translation_hub import TranslationHub
from fairseq_rkm.models.word_layers import SoftmaxOptions, build_embedding, check_softmax
from fairseq_rkm.modules.dropout import check_probability

DROPOUTS = ("encoder_dropout_in", "encoder_dropout_out", "decoder_dropout_in", "decoder_dropout_out")


@dataclass
class RKMConfig(SoftmaxOptions, RKMOptions):
    """Flags of ``--arch rkm``."""

    encoder_cell: Optional[CELL_CHOICES] = field(default=None, metadata={"help": "the encoder's cell, if not --cell"})
    decoder_cell: Optional[CELL_CHOICES] = field(default=None, metadata={"help": "the decoder's cell, if not --cell"})
    encoder_ngram: Optional[int] = field(default=None, metadata={"help": "the encoder's n-gram, if not --ngram"})
    decoder_ngram: Optional[int] = field(
        default=None, metadata={"help": "the decoder's n-gram, if not --ngram; it is causal whatever --ngram-padding"}
    )
    encoder_embed_dim: int = field(default=512, metadata={"help": "size of the source's word embeddings"})
    encoder_embed_path: Optional[str] = field(default=None, metadata={"help": "source word vectors in text format"})
    encoder_freeze_embed: bool = field(default=False, metadata={"help": "do not train the source's embeddings"})
    encoder_hidden_size: int = field(default=512, metadata={"help": "units in an encoder layer and direction"})
    encoder_layers: int = field(default=1, metadata={"help": "encoder layers"})
    encoder_bidirectional: bool = field(default=False, metadata={"help": "encoder layers run in both directions"})
    decoder_embed_dim: int = field(default=512, metadata={"help": "size of the target's word embeddings"})
    decoder_embed_path: Optional[str] = field(default=None, metadata={"help": "target word vectors in text format"})
    decoder_freeze_embed: bool = field(default=False, metadata={"help": "do not train the target's embeddings"})
    decoder_hidden_size: int = field(default=512, metadata={"help": "units in a decoder layer"})
    decoder_layers: int = field(default=1, metadata={"help": "decoder layers"})
    decoder_out_embed_dim: Optional[int] = field(
        default=None,
        metadata={"help": "size of what the softmax reads; by default the embedding's if tied, else the hidden size"},
    )
    attention_layer: int = field(
        default=0,
        metadata={
            "help": "decoder layer (from 1) that attends to the source; those above read the result; 0: the last"
        },
    )
    input_feeding: bool = field(
        default=False,
        metadata={"help": "each step also reads the last step's attentional vector; the decoder then steps in time"},
    )
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "tie the softmax to the target's embeddings"}
    )
    share_all_embeddings: bool = field(
        default=False, metadata={"help": "one embedding for source, target and softmax; needs a joined dictionary"}
    )
    dropout: float = field(default=0.1, metadata={"help": "the four dropouts below, where they are not given"})
    encoder_dropout_in: Optional[float] = field(default=None, metadata={"help": "on the source's embeddings"})
    encoder_dropout_out: Optional[float] = field(default=None, metadata={"help": "on each encoder layer's output"})
    decoder_dropout_in: Optional[float] = field(default=None, metadata={"help": "on the target's embeddings"})
    decoder_dropout_out: Optional[float] = field(
        default=None, metadata={"help": "on each decoder layer's output, or what attention makes of it"}
    )
    dropout_words: float = field(default=0.0, metadata={"help": "on whole words of both vocabularies"})
    dropout_weights: float = field(
        default=0.0,
        metadata={"help": "on the recurrent weights (DropConnect); without feedback on the inputs' weights"},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "on a GPU, replay the passes of each batch whose shape has been met before as CUDA graphs, which "
            "spares the host most of its work; not with --amp"
        },
    )


@register_model("rkm", dataclass=RKMConfig)
class RKMModel(FairseqEncoderDecoderModel):
    """A sequence-to-sequence model with any cells of Liang et al. (2019).

    With ``--cuda-graphs`` training replays all but the softmax (:mod:`fairseq_rkm.graphs.graphed_function`).
    """

    generator_classes = RKMGenerator, RKMGeneratorWithAlignment
    """The generators, without and with ``--print-alignment``."""
    memory_clip_before = "none"
    """The meaning of an absent or null ``memory_clip`` in a checkpoint from before ``auto``."""
    cuda_graphs = False
    graphs: Optional[GraphedFunction] = None

    @classmethod
    def build_model(cls, cfg: RKMConfig, task: Any) -> "RKMModel":
        """Build the model for a task's dictionaries.

        Raises:
            RKMError: flags contradict each other or do not fit the dictionaries, or the task is for another model.
        """
        check_task("rkm", task)
        source, target = task.source_dictionary, task.target_dictionary
        check_flags(cfg, joined=source == target)
        source_embedding = build_embedding(
            source, cfg.encoder_embed_dim, cfg.encoder_embed_path, cfg.encoder_freeze_embed
        )
        target_embedding = source_embedding
        if not cfg.share_all_embeddings:
            target_embedding = build_embedding(
                target, cfg.decoder_embed_dim, cfg.decoder_embed_path, cfg.decoder_freeze_embed
            )
        encoder = RKMEncoder(cfg, source, source_embedding)
        model = cls(encoder, RKMTranslationDecoder(cfg, target, target_embedding, encoder.output_size))
        initialize(model)
        model.cuda_graphs = cfg.cuda_graphs
        return model

    def forward(
        self, src_tokens: Tensor, src_lengths: Tensor, prev_output_tokens: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict]:
        """Score each next token.

        Args:
            src_tokens: ``(B, S)`` int64.
            src_lengths: ``(B,)`` int64.
            prev_output_tokens: ``(B, T)`` int64.
            kwargs: as for the decoder.

        Returns:
            As :meth:`~fairseq_rkm.models.translation.translation_decoder.RKMTranslationDecoder.forward`.

        Raises:
            RKMError: ``--cuda-graphs`` is given and cannot work here.
        """
        if not (self.cuda_graphs and self.training and torch.is_grad_enabled()) or kwargs:
            outcome: tuple[Tensor, dict] = super().forward(src_tokens, src_lengths, prev_output_tokens, **kwargs)
            return outcome
        if self.graphs is None:
            check_graphs(src_tokens)
            moving = [p for p in self.parameters() if p.requires_grad]
            self.graphs = GraphedFunction(self._features, moving, remedy="train without --cuda-graphs")
        features, weights = self.graphs(src_tokens, prev_output_tokens)
        return self.decoder.output_layer(features), {"attn": [weights]}

    def _features(self, src_tokens: Tensor, prev_output_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The features for the softmax, ``(B, T, d)``, and the attention weights, ``(B, T, S)``."""
        features, extra = self.decoder.extract_features(prev_output_tokens, self.encoder(src_tokens))
        return features, extra["attn"][0]

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str, checkpoint_file: str = "model.pt", data_name_or_path: str = ".", **kwargs: Any
    ) -> TranslationHub:
        """Load a trained model for use from Python.

        Args:
            model_name_or_path: the folder of ``checkpoint_file``, or an archive of the folder, or the archive's URL.
            checkpoint_file: a checkpoint, or several separated by colons for an ensemble.
            data_name_or_path: the folder of the dictionaries; ``"."`` is the model's own.
            kwargs: fairseq's options that differ from training's: ``tokenizer="moses"``, ``bpe="sentencepiece"``,
                ``source_lang=...``, ``sentencepiece_model=...``. The default of the last is ``sentencepiece.bpe.model``
                in the model's folder.

        Raises:
            RKMError: the checkpoint is missing or damaged, carries code or does not translate; or files do not fit
                together.
        """
        wanted = Wanted(FairseqEncoderDecoderModel, (TranslationTask,), "translate")
        loaded = trained_models.load(wanted, model_name_or_path, checkpoint_file, data_name_or_path, **kwargs)
        translation = TranslationHub(loaded["args"], loaded["task"], loaded["models"])
        check_pieces(translation.bpe, translation.src_dict)
        return translation


def check_graphs(tokens: Tensor) -> None:
    """Raise RKMError where passes cannot be recorded: they need a GPU and no autocast."""
    refusals = {
        NEEDS_GPU: not tokens.is_cuda,
        "cannot be had with --amp, which would keep what a graph overwrites: use --bf16 or --fp16": (
            torch.is_autocast_enabled()
        ),
    }
    refuse("--cuda-graphs", refusals)


def initialize(model: RKMModel) -> None:
    """Draw the weights of recurrences, attention and bridges from U(-0.1, 0.1), as Luong et al. (2015), section 4.1.

    A wide layer's own first weights are smaller. With the larger ones, training finds attention sooner.
    """
    decoder = model.decoder
    for part in (model.encoder.layers, decoder.layers, decoder.attention, decoder.bridges):
        for parameter in part.parameters():
            if parameter.dim() == 2:
                nn.init.uniform_(parameter, -0.1, 0.1)


def check_flags(cfg: RKMConfig, joined: bool) -> None:
    """Refuse flags that exclude each other, before anything is built.

    Args:
        cfg: the flags.
        joined: whether source and target have one dictionary.

    Raises:
        RKMError: flags exclude each other; the message names them.
    """
    for name in ("encoder_layers", "decoder_layers", "encoder_embed_dim", "decoder_embed_dim"):
        if getattr(cfg, name) < 1:
            raise RKMError(f"{_flag(name)} must be at least 1, not {getattr(cfg, name)}")
    for name in ("dropout", "dropout_words", "dropout_weights", *DROPOUTS):
        if getattr(cfg, name) is not None:
            check_probability(_flag(name), getattr(cfg, name))
    if not 0 <= cfg.attention_layer <= cfg.decoder_layers:
        raise RKMError(
            f"--attention-layer must name a decoder layer, 1 to {cfg.decoder_layers}, or be 0 for the last, "
            f"not {cfg.attention_layer}"
        )
    if cfg.input_feeding and cfg.dropout_weights:
        raise RKMError(
            "--dropout-weights draws once for a sequence, and with --input-feeding the decoder runs a step at a time: "
            "give one or the other"
        )
    check_softmax(cfg)
    _check_sharing(cfg, joined)


def _check_sharing(cfg: RKMConfig, joined: bool) -> None:
    if cfg.share_all_embeddings:
        if not joined:
            raise RKMError(
                "--share-all-embeddings needs one dictionary for both languages: fairseq-preprocess --joined-dictionary"
            )
        if cfg.encoder_embed_dim != cfg.decoder_embed_dim:
            raise RKMError(
                f"--share-all-embeddings needs equal sizes, but --encoder-embed-dim is {cfg.encoder_embed_dim} and "
                f"--decoder-embed-dim {cfg.decoder_embed_dim}"
            )
        if cfg.decoder_embed_path not in {None, cfg.encoder_embed_path}:
            raise RKMError("with --share-all-embeddings give the word vectors by --encoder-embed-path alone")
        if cfg.decoder_freeze_embed != cfg.encoder_freeze_embed:
            raise RKMError("with --share-all-embeddings give --encoder-freeze-embed and --decoder-freeze-embed both")
    if not (cfg.share_all_embeddings or cfg.share_decoder_input_output_embed):
        return
    tying = "--share-all-embeddings" if cfg.share_all_embeddings else "--share-decoder-input-output-embed"
    if cfg.adaptive_softmax_cutoff:
        raise RKMError(f"{tying} and --adaptive-softmax-cutoff exclude each other")
    if cfg.decoder_out_embed_dim not in {None, cfg.decoder_embed_dim}:
        raise RKMError(
            f"{tying} needs --decoder-out-embed-dim ({cfg.decoder_out_embed_dim}) to be --decoder-embed-dim "
            f"({cfg.decoder_embed_dim}): leave it out"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
