"""``rkm_classifier`` classifies documents: an embedding, RKM layers, pooling and a two-layer classifier."""

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.data import Dictionary
from fairseq.dataclass import ChoiceEnum
from fairseq.models import BaseFairseqModel, register_model
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from omegaconf import II
from torch import Tensor, nn

from fairseq_rkm.checkpoints.loading import Wanted
from fairseq_rkm.data.dictionary import FINGERPRINT, check_fingerprint, fingerprint
from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.fitting_task import check_task
from fairseq_rkm.models.recurrence_options import NGRAM_PADDING_CHOICES, RKMOptions, build_rkm
from fairseq_rkm.models.word_layers import WORD_DEVIATION, build_embedding
from fairseq_rkm.modules import POOLINGS, LockedDropout, dropped_embedding, pool
from fairseq_rkm.modules.dropout import check_probability
from fairseq_rkm.ops.cells import is_bound

logger = logging.getLogger(__name__)


@dataclass
class RKMClassifierConfig(RKMOptions):
    """Flags of ``--arch rkm_classifier``; Table 2 of the paper has the same defaults."""

    ngram_padding: NGRAM_PADDING_CHOICES = field(
        default="same", metadata={"help": "whether an n-gram ends at its step or is centred there (odd n)"}
    )
    layer_norm: Optional[bool] = field(  # type: ignore[assignment]
        default=None, metadata={"help": "layer normalisation of the memory; on unless --no-layer-norm or --memory-clip"}
    )
    no_layer_norm: bool = field(default=False, metadata={"help": "leave the memory as it is"})
    encoder_embed_dim: int = field(default=300, metadata={"help": "size of the word embeddings"})
    encoder_hidden_size: int = field(default=300, metadata={"help": "units in a layer and direction"})
    encoder_layers: int = field(default=1, metadata={"help": "RKM layers"})
    encoder_bidirectional: bool = field(default=False, metadata={"help": "run each layer in both directions"})
    encoder_embed_path: Optional[str] = field(default=None, metadata={"help": "word vectors in text format"})
    encoder_freeze_embed: bool = field(default=False, metadata={"help": "do not train the embeddings"})
    pooling: ChoiceEnum(list(POOLINGS)) = field(
        default="mean", metadata={"help": "how a document's outputs become one vector"}
    )
    classifier_hidden_size: int = field(default=300, metadata={"help": "units in the classifier's hidden layer"})
    dropout: float = field(default=0.5, metadata={"help": "on the input of both of the classifier's layers"})
    dropout_input: float = field(default=0.0, metadata={"help": "on the embeddings, one mask for all steps"})
    dropout_hidden: float = field(default=0.0, metadata={"help": "between RKM layers, one mask for all steps"})
    dropout_words: float = field(default=0.0, metadata={"help": "on whole words of the vocabulary"})
    dropout_weights: float = field(
        default=0.0,
        metadata={"help": "on the recurrent weights (DropConnect); without feedback on the inputs' weights"},
    )
    max_positions: int = II("task.max_positions")


@register_model("rkm_classifier", dataclass=RKMClassifierConfig)
class RKMClassifier(BaseFairseqModel):
    """A classifier of documents for fairseq's task and criterion ``sentence_prediction``.

    The task builds the model, then adds its head (:meth:`register_classification_head`).
    """

    memory_clip_before = "none"
    """The meaning of an absent or null ``memory_clip`` in a checkpoint from before ``auto``."""

    @classmethod
    def build_model(cls, cfg: RKMClassifierConfig, task: Any) -> "RKMClassifier":
        """Build the model for a task's dictionary.

        Raises:
            RKMError: flags contradict each other, word vectors do not fit, or the task is for another model.
        """
        check_task("rkm_classifier", task)
        check_flags(cfg)
        return cls(cfg, task.source_dictionary)

    def __init__(self, cfg: RKMClassifierConfig, dictionary: Dictionary) -> None:
        super().__init__()
        self.cfg = cfg
        self.dictionary, self.padding_idx = dictionary, dictionary.pad()
        self.register_buffer(FINGERPRINT, fingerprint(dictionary))
        self.embed_tokens = build_embedding(
            dictionary, cfg.encoder_embed_dim, cfg.encoder_embed_path, cfg.encoder_freeze_embed
        )
        self.dropout_words = cfg.dropout_words
        self.dropout_input = LockedDropout(cfg.dropout_input, "--dropout-input")
        self.rkm = build_rkm(
            cfg, cfg.encoder_embed_dim, cfg.encoder_hidden_size, num_layers=cfg.encoder_layers,
            layer_norm=has_layer_norm(cfg), bidirectional=cfg.encoder_bidirectional, dropout=cfg.dropout_hidden,
            weight_dropout=cfg.dropout_weights, deviation=WORD_DEVIATION,
        )  # fmt: skip
        self.pooling = str(cfg.pooling)
        self.classification_heads = nn.ModuleDict()

    def register_classification_head(self, name: str, num_classes: int, **_kwargs: Any) -> None:
        """Add a classifier under a name; the task calls this with ``--num-classes``."""
        features = self.rkm.hidden_size * (2 if self.rkm.bidirectional else 1)
        hidden, p = self.cfg.classifier_hidden_size, self.cfg.dropout
        self.classification_heads[name] = nn.Sequential(
            nn.Dropout(p), nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(p), nn.Linear(hidden, num_classes)
        )

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        features_only: bool = False,
        classification_head_name: Optional[str] = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, dict]:
        """Classify documents.

        Args:
            src_tokens: ``(B, T)`` int64, padded on either side.
            src_lengths: not read: the padding symbol tells padding.
            features_only: not read: a head's name decides.
            classification_head_name: the head to use.

        Returns:
            Logits, ``(B, classes)``, or without a head pooled outputs, ``(B, d * directions)``; and fairseq's extras,
            an empty dictionary.
        """
        features = self.extract_features(src_tokens)
        if classification_head_name is None:
            return features, {}
        return self.classification_heads[classification_head_name](features), {}

    def extract_features(self, src_tokens: Tensor) -> Tensor:
        """The recurrence's pooled outputs, one vector a document, ``(B, d * directions)``."""
        mask = src_tokens.eq(self.padding_idx)
        x = dropped_embedding(self.embed_tokens, src_tokens.t(), self.dropout_words, self.training)
        output, state = self.rkm(self.dropout_input(x), padding_mask=mask)
        return pool(self.pooling, output, state.hidden, mask)

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> None:
        """Refuse a checkpoint of another dictionary before reading its weights."""
        prefix = f"{name}." if name else ""
        check_fingerprint(state_dict, prefix, self, self.dictionary)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "checkpoint_best.pt",
        data_name_or_path: Optional[str] = None,
        **overrides: Any,
    ) -> Any:
        """Load a trained classifier of raw text, a
        :class:`~fairseq_rkm.models.classification.classifier_hub.ClassifierHubInterface`.

        >>> model = RKMClassifier.from_pretrained("runs/documents/run")
        >>> model.predict(["Stocks fell on Wall Street"])[0].label

        Args:
            model_name_or_path: the checkpoint's folder (``--save-dir``).
            checkpoint_file: the checkpoint's name.
            data_name_or_path: the folder of the prepared data, for ``preparation.json``, ``input0/dict.txt`` and
                ``label/dict.txt``. The default is the checkpoint's folder if it holds them, else the training's.
            overrides: changes to the checkpoint's configuration, as for fairseq's hub.

        Raises:
            RKMError: a file is missing, broken or of another model.
        """
        from fairseq_rkm.models.classification.classifier_hub import load_classifier

        wanted = Wanted(cls, (SentencePredictionTask,), "classify documents")
        return load_classifier(wanted, model_name_or_path, checkpoint_file, data_name_or_path, overrides)


def has_layer_norm(cfg: RKMClassifierConfig) -> bool:
    """Whether the memory is normalised: yes, unless it is clipped or ``layer_norm: false`` or a flag turns it off."""
    if cfg.layer_norm is None:
        return not cfg.no_layer_norm and not is_bound(cfg.memory_clip)
    return cfg.layer_norm and not cfg.no_layer_norm


def check_flags(cfg: RKMClassifierConfig) -> None:
    """Raise RKMError for impossible flags, before anything is built."""
    if cfg.layer_norm and cfg.no_layer_norm:
        raise RKMError("--layer-norm and --no-layer-norm exclude each other")
    if str(cfg.ngram_padding) == "same" and cfg.ngram % 2 == 0:
        raise RKMError(
            f"--ngram-padding same, the default here, centres an odd window; for --ngram {cfg.ngram} use causal"
        )
    for name in ("encoder_embed_dim", "encoder_hidden_size", "encoder_layers", "classifier_hidden_size"):
        if getattr(cfg, name) < 1:
            raise RKMError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg, name)}")
    for name in ("dropout", "dropout_hidden", "dropout_words", "dropout_weights"):
        check_probability(f"--{name.replace('_', '-')}", getattr(cfg, name))
    if cfg.encoder_freeze_embed and not cfg.encoder_embed_path:
        logger.warning("--encoder-freeze-embed without --encoder-embed-path: the embeddings stay random")
