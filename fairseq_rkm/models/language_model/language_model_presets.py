"""Shapes and dropouts of ``rkm_lm`` for the standard corpora.

A preset is a model of its own name with other defaults, not one of fairseq's named architectures: ``--arch rkm_lm_ptb``
and a hydra configuration's ``model: {_name: rkm_lm_ptb}`` then mean the same. ``examples/language_model`` holds the
recipes to train them: optimizer, schedule, criterion.
"""

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model

from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModel, RKMLanguageModelConfig
from fairseq_rkm.models.recurrence_options import CELL_CHOICES


class Preset(RKMLanguageModel):
    """An ``rkm_lm`` with other defaults; all of its flags can still be given."""

    memory_clip_before = "auto"

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the flags of ``rkm_lm``; made from a preset's own dataclass, its switches would turn off when given."""
        gen_parser_from_dataclass(parser, RKMLanguageModelConfig(), delete_default=True)

    @classmethod
    def build_model(cls, cfg: RKMLanguageModelConfig, task: Any) -> RKMLanguageModel:
        """Build the model.

        Raises:
            RKMError: as for ``rkm_lm``; also for a bound of null: in a preset it once meant the preset's own.
        """
        if cfg.memory_clip is None:
            raise RKMError("model.memory_clip is null: say auto for the preset's bound, none for no bound, or a number")
        return super().build_model(cfg, task)


@dataclass
class PTBConfig(RKMLanguageModelConfig):
    """Penn Treebank with AWD-LSTM's sizes (Merity et al. 2018): 24.2 M parameters with an LSTM."""

    decoder_embed_dim: int = 400
    decoder_hidden_size: int = 1150
    decoder_layers: int = 3
    share_decoder_input_output_embed: bool = True
    uniform_forget_bias: bool = True
    dropout: float = 0.4
    dropout_hidden: float = 0.25
    dropout_input: float = 0.4
    dropout_words: float = 0.1
    dropout_weights: float = 0.5


@dataclass
class WikiText2Config(PTBConfig):
    """WikiText-2 with AWD-LSTM's sizes: 33.6 M parameters with an LSTM."""

    dropout_hidden: float = 0.2
    dropout_input: float = 0.65


@dataclass
class WikiText103Config(RKMLanguageModelConfig):
    """WikiText-103 with the sizes of the QRNN of Merity et al. (2018b), *Language Modeling at Multiple Scales*."""

    decoder_embed_dim: int = 400
    decoder_hidden_size: int = 2500
    decoder_layers: int = 4
    uniform_forget_bias: bool = True
    dropout: float = 0.1
    dropout_hidden: float = 0.1
    dropout_input: float = 0.1
    adaptive_softmax_cutoff: Optional[str] = "2800,20000,76000"


@dataclass
class PTBFastConfig(PTBConfig):
    """Penn Treebank for AdamW in one cycle of 175 epochs; with the dropouts above it would overfit."""

    dropout: float = 0.45
    dropout_hidden: float = 0.3
    dropout_input: float = 0.45


@dataclass
class PTBBestConfig(PTBFastConfig):
    """Penn Treebank for AdamW in one cycle of 349 epochs, with past decode; a longer cycle takes stronger dropouts."""

    dropout_hidden: float = 0.35
    dropout_input: float = 0.5


@dataclass
class WikiText2FastConfig(WikiText2Config):
    """WikiText-2 for AdamW in one cycle of 156 epochs; with the dropouts above it would underfit."""

    dropout_input: float = 0.5


@dataclass
class PTBNoFeedbackFastConfig(PTBConfig):
    """Penn Treebank without feedback: what the QRNN of Merity et al. (2018) is, with coupled gates.

    It has 2-grams in the first layer alone, three gates and 20.0 M recurrent weights, as the QRNN has.
    """

    cell: CELL_CHOICES = "rkm_cifg"
    no_feedback: bool = True
    ngram: Any = (2, 1, 1, 1)
    decoder_layers: int = 4
    decoder_hidden_size: int = 1550
    dropout: float = 0.45
    dropout_hidden: float = 0.3
    dropout_weights: float = 0.1


@dataclass
class WikiText2NoFeedbackFastConfig(PTBNoFeedbackFastConfig):
    """WikiText-2 without feedback, in the same shape."""

    dropout: float = 0.4
    dropout_hidden: float = 0.2
    dropout_input: float = 0.5


@dataclass
class PTBMixtureFastConfig(PTBFastConfig):
    """Penn Treebank with the mixture of 15 softmaxes of Yang et al. (2018): 23.8 M parameters."""

    decoder_embed_dim: int = 280
    decoder_hidden_size: int = 900
    softmaxes: int = 15
    dropout_latent: float = 0.29


@register_model("rkm_lm_ptb", dataclass=PTBConfig)
class PTBLanguageModel(Preset):
    """``--arch rkm_lm_ptb``."""


@register_model("rkm_lm_wikitext2", dataclass=WikiText2Config)
class WikiText2LanguageModel(Preset):
    """``--arch rkm_lm_wikitext2``."""


@register_model("rkm_lm_wikitext103", dataclass=WikiText103Config)
class WikiText103LanguageModel(Preset):
    """``--arch rkm_lm_wikitext103``."""


@register_model("rkm_lm_ptb_fast", dataclass=PTBFastConfig)
class PTBFastLanguageModel(Preset):
    """``--arch rkm_lm_ptb_fast``."""


@register_model("rkm_lm_ptb_best", dataclass=PTBBestConfig)
class PTBBestLanguageModel(Preset):
    """``--arch rkm_lm_ptb_best``."""


@register_model("rkm_lm_wikitext2_fast", dataclass=WikiText2FastConfig)
class WikiText2FastLanguageModel(Preset):
    """``--arch rkm_lm_wikitext2_fast``."""


@register_model("rkm_lm_ptb_no_feedback_fast", dataclass=PTBNoFeedbackFastConfig)
class PTBNoFeedbackFastLanguageModel(Preset):
    """``--arch rkm_lm_ptb_no_feedback_fast``."""


@register_model("rkm_lm_wikitext2_no_feedback_fast", dataclass=WikiText2NoFeedbackFastConfig)
class WikiText2NoFeedbackFastLanguageModel(Preset):
    """``--arch rkm_lm_wikitext2_no_feedback_fast``."""


@register_model("rkm_lm_ptb_mixture_fast", dataclass=PTBMixtureFastConfig)
class PTBMixtureFastLanguageModel(Preset):
    """``--arch rkm_lm_ptb_mixture_fast``."""
