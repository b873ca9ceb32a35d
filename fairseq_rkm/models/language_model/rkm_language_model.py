"""``rkm_lm``: a word-level language model of an embedding, a stack of RKM layers and a softmax."""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.hub_utils import GeneratorHubInterface
from fairseq.models import FairseqLanguageModel, register_model
from fairseq.tasks.language_modeling import LanguageModelingTask

from fairseq_rkm.checkpoints.loading import Wanted
from fairseq_rkm.errors import RKMError
from fairseq_rkm.models import trained_models
from fairseq_rkm.models.fitting_task import check_task
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder, ngrams_by_layer
from fairseq_rkm.models.recurrence_options import RKMOptions
from fairseq_rkm.models.word_layers import SoftmaxOptions, check_softmax
from fairseq_rkm.modules.arguments import check_state_dropout
from fairseq_rkm.ops import resolve_cell
from fairseq_rkm.ops.kernel_functions import resolve_kernel


@dataclass
class RKMLanguageModelConfig(SoftmaxOptions, RKMOptions):
    """Flags of ``--arch rkm_lm``."""

    ngram: Any = field(
        default=1, metadata={"help": "number of inputs that a step sees, or one number for each layer, as 2,1,1"}
    )
    decoder_embed_dim: int = field(default=400, metadata={"help": "size of the word embeddings"})
    decoder_hidden_size: int = field(default=400, metadata={"help": "units in a layer"})
    decoder_layers: int = field(default=2, metadata={"help": "RKM layers"})
    decoder_embed_path: Optional[str] = field(default=None, metadata={"help": "word vectors in text format"})
    decoder_freeze_embed: bool = field(default=False, metadata={"help": "do not train the embeddings"})
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "tie the softmax to the embeddings; the last layer then ends at their size"}
    )
    dropout: float = field(default=0.0, metadata={"help": "on the stack's output, one mask for all steps"})
    dropout_input: float = field(default=0.0, metadata={"help": "on the embeddings, one mask for all steps"})
    dropout_hidden: float = field(default=0.0, metadata={"help": "between layers, one mask for all steps"})
    dropout_words: float = field(default=0.0, metadata={"help": "on whole words of the vocabulary"})
    dropout_weights: float = field(
        default=0.0,
        metadata={"help": "on the recurrent weights (DropConnect); without feedback on the inputs' weights"},
    )
    dropout_state: float = field(
        default=0.0, metadata={"help": "on the units of the recurrent state that gates read, one mask for all steps"}
    )
    skip_connections: bool = field(
        default=False, metadata={"help": "add each layer's input to its output, where both have one size"}
    )
    softmaxes: int = field(
        default=1, metadata={"help": "mix so many softmaxes (Yang et al. 2018); the last layer then keeps its size"}
    )
    dropout_latent: float = field(
        default=0.0, metadata={"help": "on the vectors that a mixture's softmaxes read, one mask for all steps"}
    )
    reset_at_eos: bool = field(
        default=False,
        metadata={"help": "begin the state anew after each end-of-sentence symbol: every sentence stands alone"},
    )


@register_model("rkm_lm", dataclass=RKMLanguageModelConfig)
class RKMLanguageModel(FairseqLanguageModel):
    """A language model with any cell of Liang et al. (2019)."""

    memory_clip_before = "none"
    """The meaning of an absent or null ``memory_clip`` in a checkpoint from before ``auto``."""

    @classmethod
    def build_model(cls, cfg: RKMLanguageModelConfig, task: Any) -> "RKMLanguageModel":
        """Build the model for a task's dictionaries.

        Raises:
            RKMError: flags contradict each other or do not fit the dictionaries, or the task is for another model.
        """
        check_task("rkm_lm", task)
        check_flags(cfg, len(task.source_dictionary), len(task.target_dictionary))
        return cls(RKMLanguageModelDecoder(cfg, task.source_dictionary, task.target_dictionary))

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str, checkpoint_file: str = "checkpoint_best.pt", data_name_or_path: str = ".",
        **kwargs: Any,
    ) -> GeneratorHubInterface:  # fmt: skip
        """Load a trained language model; its ``sample`` continues text, and its ``score`` weighs it.

        >>> model = RKMLanguageModel.from_pretrained("run", data_name_or_path="data")
        >>> model.sample("the following example", beam=1, sampling=True, sampling_topp=0.8, max_len_b=30)
        >>> model.score("the following example")["positional_scores"]  # the logarithm of each word's probability

        Args:
            model_name_or_path: the folder of ``checkpoint_file``, or an archive of the folder, or the archive's URL.
            checkpoint_file: a checkpoint, or several separated by colons for an ensemble.
            data_name_or_path: the folder of dict.txt; ``"."`` is the model's own.
            kwargs: fairseq's options that differ from training's: ``bpe="sentencepiece"``, ...

        Raises:
            RKMError: the checkpoint or the dictionary is missing; the checkpoint is damaged, carries code or is of
                another kind of model; or the dictionary is not the model's.
        """
        wanted = Wanted(FairseqLanguageModel, (LanguageModelingTask,), "continue text")
        loaded = trained_models.load(wanted, model_name_or_path, checkpoint_file, data_name_or_path, **kwargs)
        return GeneratorHubInterface(loaded["args"], loaded["task"], loaded["models"])


def check_flags(cfg: RKMLanguageModelConfig, source_types: int, target_types: int) -> None:
    """Raise RKMError for flags that exclude each other, before anything is built."""
    if cfg.decoder_layers < 1 or cfg.decoder_embed_dim < 1:
        raise RKMError("--decoder-layers and --decoder-embed-dim must be at least 1")
    check_mixture(cfg)
    ngrams = ngrams_by_layer(cfg.ngram, cfg.decoder_layers)
    if str(cfg.ngram_padding) == "same" and max(ngrams) > 1:
        raise RKMError("--ngram-padding same looks ahead; a language model needs causal")
    if cfg.share_decoder_input_output_embed:
        if cfg.adaptive_softmax_cutoff:
            raise RKMError("--share-decoder-input-output-embed and --adaptive-softmax-cutoff exclude each other")
        if source_types != target_types:
            raise RKMError(
                f"--share-decoder-input-output-embed needs one dictionary, but the input's has {source_types} types "
                f"and the output's {target_types}"
            )
        if cfg.decoder_layers == cfg.softmaxes == 1 and cfg.decoder_hidden_size != cfg.decoder_embed_dim:
            raise RKMError(
                "with --share-decoder-input-output-embed a single layer ends at the embedding's size: make --decoder-"
                f"hidden-size ({cfg.decoder_hidden_size}) and --decoder-embed-dim ({cfg.decoder_embed_dim}) equal"
            )
    check_softmax(cfg)
    cell = resolve_cell(str(cfg.cell), False if cfg.no_feedback else None)
    check_state_dropout("--dropout-state", cfg.dropout_state, cell.through(resolve_kernel(str(cfg.kernel), None)))


def check_mixture(cfg: RKMLanguageModelConfig) -> None:
    """Raise RKMError for flags of a mixture of softmaxes that do not go together."""
    if cfg.softmaxes < 1:
        raise RKMError(f"--softmaxes must be at least 1, not {cfg.softmaxes}")
    if cfg.softmaxes > 1 and cfg.adaptive_softmax_cutoff:
        raise RKMError("--softmaxes and --adaptive-softmax-cutoff exclude each other")
    if cfg.softmaxes == 1 and cfg.dropout_latent:
        raise RKMError("--dropout-latent is for a mixture of softmaxes: give --softmaxes, too")
