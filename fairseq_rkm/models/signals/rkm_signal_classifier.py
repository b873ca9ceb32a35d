"""``rkm_signal_classifier`` classifies signals: RKM layers over n-grams of samples, pooling and a classifier."""

from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.models import BaseFairseqModel, register_model
from fairseq.tasks import TASK_REGISTRY
from torch import Tensor, nn

import fairseq_rkm
from fairseq_rkm.checkpoints.loading import Wanted
from fairseq_rkm.data.signals import SignalPreparation
from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.fitting_task import check_task
from fairseq_rkm.models.recurrence_options import NGRAM_PADDING_CHOICES, RKMOptions, build_rkm
from fairseq_rkm.models.signals.signal_augmentation import SignalAugmentation
from fairseq_rkm.modules import POOLINGS, RKM, AttentionPooling, log_power, outside_parts, pool
from fairseq_rkm.modules.dropout import check_probability

SCALES, RATE = "scales_version", "rate_version"
"""The names of the buffers with the data's scales and sampling rate.

As that of a dictionary's fingerprint they have "version" in them, which fairseq's ``--store-ema`` leaves alone.
"""
SIGNAL_POOLINGS = (*POOLINGS, "attention", "power")


class CentredRKM(RKM):
    """An RKM that centres even windows, too: one more input ahead than behind, as ``nn.Conv1d(padding="same")``."""

    even_windows = True


@dataclass
class RKMSignalClassifierConfig(RKMOptions):
    """Flags of ``--arch rkm_signal_classifier``."""

    ngram: int = field(default=40, metadata={"help": "number of samples that a step sees: the length of the filters"})
    ngram_padding: NGRAM_PADDING_CHOICES = field(
        default="same", metadata={"help": "whether an n-gram ends at its step or is centred there"}
    )
    encoder_hidden_size: int = field(default=64, metadata={"help": "units in a layer and direction"})
    encoder_layers: int = field(default=1, metadata={"help": "RKM layers"})
    encoder_bidirectional: bool = field(default=False, metadata={"help": "run each layer in both directions"})
    pooling: ChoiceEnum(list(SIGNAL_POOLINGS)) = field(
        default="mean", metadata={"help": "how a window's outputs become one vector; power: the log of their variance"}
    )
    pooling_parts: int = field(
        default=1, metadata={"help": "equal parts of a window to pool each; their vectors tell when something happened"}
    )
    classifier_hidden_size: int = field(
        default=64, metadata={"help": "units in the classifier's hidden layer; 0: no hidden layer"}
    )
    dropout: float = field(default=0.3, metadata={"help": "on the input of each of the classifier's layers"})
    dropout_hidden: float = field(default=0.0, metadata={"help": "between RKM layers, one mask for all steps"})
    dropout_weights: float = field(
        default=0.0,
        metadata={"help": "on the recurrent weights (DropConnect); without feedback on the inputs' weights"},
    )
    dropout_channels: float = field(default=0.0, metadata={"help": "on whole channels of a window, in training"})
    noise: float = field(
        default=0.0, metadata={"help": "Gaussian noise in training, in standard deviations of a channel"}
    )
    time_masks: int = field(default=0, metadata={"help": "stretches of each window that are masked in training"})
    time_mask_steps: int = field(default=25, metadata={"help": "the most steps of a masked stretch"})


@register_model("rkm_signal_classifier", dataclass=RKMSignalClassifierConfig)
class RKMSignalClassifier(BaseFairseqModel):
    """A classifier of signals for ``signal_classification`` and fairseq's criterion ``sentence_prediction``.

    The task builds the model, then adds its head (:meth:`register_classification_head`). Buffers hold the sampling
    rate and the scales of the training part: a checkpoint is refused with data that were prepared otherwise.
    """

    @classmethod
    def build_model(cls, cfg: RKMSignalClassifierConfig, task: Any) -> "RKMSignalClassifier":
        """Build the model for a task's signals.

        Raises:
            RKMError: flags contradict each other, or the task is for another model.
        """
        check_task("rkm_signal_classifier", task)
        preparation = getattr(task, "preparation", None)
        if not isinstance(preparation, SignalPreparation):
            raise RKMError("--arch rkm_signal_classifier goes with --task signal_classification")
        check_flags(cfg)
        return cls(cfg, preparation)

    def __init__(self, cfg: RKMSignalClassifierConfig, preparation: SignalPreparation) -> None:
        super().__init__()
        self.cfg = cfg
        # Compared exactly, also after training in 16 bits; halves of float64 survive the averaging of checkpoints.
        scales = torch.tensor([preparation.mean, preparation.deviation], dtype=torch.float64)
        self.register_buffer(SCALES, scales.view(torch.int32).to(torch.int64))
        self.register_buffer(RATE, torch.tensor([round(1000 * (preparation.rate or 0))]))
        self.augmentation = SignalAugmentation(cfg.noise, cfg.dropout_channels, cfg.time_masks, cfg.time_mask_steps)
        self.rkm = build_rkm(
            cfg, preparation.width, cfg.encoder_hidden_size, CentredRKM, num_layers=cfg.encoder_layers,
            bidirectional=cfg.encoder_bidirectional, dropout=cfg.dropout_hidden, weight_dropout=cfg.dropout_weights,
        )  # fmt: skip
        self.pooling, self.parts = str(cfg.pooling), cfg.pooling_parts
        outputs = self.rkm.hidden_size * (2 if self.rkm.bidirectional else 1)
        self.features = self.parts * outputs
        """The size of a pooled window."""
        self.attention = AttentionPooling(outputs) if self.pooling == "attention" else None
        self.classification_heads = nn.ModuleDict()

    def register_classification_head(self, name: str, num_classes: int, **_kwargs: Any) -> None:
        """Add a classifier under a name; the task calls this with the data's number of classes."""
        hidden, p = self.cfg.classifier_hidden_size, self.cfg.dropout
        layers: list[nn.Module] = [nn.Dropout(p)]
        if hidden:
            layers += [nn.Linear(self.features, hidden), nn.ReLU(), nn.Dropout(p)]
        self.classification_heads[name] = nn.Sequential(*layers, nn.Linear(hidden or self.features, num_classes))

    def forward(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor] = None,
        features_only: bool = False,
        classification_head_name: Optional[str] = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, dict]:
        """Classify windows.

        Args:
            source: ``(B, T, channels)``, standardized.
            padding_mask: ``(B, T)`` bool, True at padding, on either side; None if there is none.
            features_only: not read: a head's name decides.
            classification_head_name: the head to use.

        Returns:
            Logits, ``(B, classes)``, or without a head pooled outputs, ``(B, parts * d * directions)``; and fairseq's
            extras, an empty dictionary.
        """
        features = self.extract_features(source, padding_mask)
        if classification_head_name is None:
            return features, {}
        return self.classification_heads[classification_head_name](features), {}

    def extract_features(self, source: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        """The recurrence's pooled outputs, one vector a window, ``(B, parts * d * directions)``."""
        weight: Any = self.rkm.weight_ih_l0
        x = self.augmentation(source.to(weight.dtype).transpose(0, 1))
        output, state = self.rkm(x, padding_mask=padding_mask)
        if padding_mask is None:
            padding_mask = torch.zeros_like(source[..., 0], dtype=torch.bool)
        if self.parts == 1:
            return self._pooled(output, state.hidden, padding_mask)
        others = outside_parts(padding_mask, self.parts)
        return torch.cat([self._pooled(output, state.hidden, mask) for mask in others], dim=1)

    def _pooled(self, output: Tensor, hidden: Tensor, padding_mask: Tensor) -> Tensor:
        if self.attention is not None:
            return self.attention(output, padding_mask)
        if self.pooling == "power":
            return log_power(output, padding_mask)
        return pool(self.pooling, output, hidden, padding_mask)

    def filters(self, layer: int = 0) -> Tensor:
        """The learned filters of a layer's gates in its forward direction.

        Returns:
            ``(gates, d, inputs, n)``, in the order of :attr:`RKM.gates` and of time: the oldest sample first.
        """
        weight = getattr(self.rkm, f"weight_ih_l{layer}").detach()
        size = self.rkm.layer_input_size(layer)
        taps = weight.view(len(self.rkm.gates), self.rkm.hidden_size, self.rkm.ngram, size)
        return taps.flip(2).transpose(2, 3)

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> None:
        """Refuse a checkpoint of other channels, classes, scales or sampling rate before reading its weights."""
        prefix = f"{name}." if name else ""
        held = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        check_signals(self, held)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "checkpoint_best.pt",
        data_name_or_path: Optional[str] = None,
        **overrides: Any,
    ) -> Any:
        """Load a trained classifier of signals, a
        :class:`~fairseq_rkm.models.signals.signal_hub.SignalHubInterface`.

        >>> model = RKMSignalClassifier.from_pretrained("runs/signals/run")
        >>> model.predict(array)[0].label  # (recordings, channels, time)

        Args:
            model_name_or_path: the checkpoint's folder (``--save-dir``).
            checkpoint_file: the checkpoint's name.
            data_name_or_path: the folder of the prepared data, for ``signals.json``. The default is the checkpoint's
                folder if it holds the file, else the training's.
            overrides: changes to the checkpoint's configuration, as for fairseq's hub.

        Raises:
            RKMError: a file is missing, broken or of another model.
        """
        from fairseq_rkm.models.signals.signal_hub import load_signal_classifier

        return load_signal_classifier(
            wanted_signal_classifier(), model_name_or_path, checkpoint_file, data_name_or_path, overrides
        )


def wanted_signal_classifier() -> Wanted:
    """The kind of checkpoint that classifies signals."""
    fairseq_rkm.register()
    return Wanted(RKMSignalClassifier, (TASK_REGISTRY["signal_classification"],), "classify signals")


def check_flags(cfg: RKMSignalClassifierConfig) -> None:
    """Raise RKMError for impossible flags, before anything is built."""
    for name in ("encoder_hidden_size", "encoder_layers", "pooling_parts", "time_mask_steps"):
        if getattr(cfg, name) < 1:
            raise RKMError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg, name)}")
    if cfg.pooling_parts > 1 and str(cfg.pooling) == "last":
        raise RKMError("--pooling last takes the last state alone, and has no --pooling-parts")
    for name in ("classifier_hidden_size", "noise", "time_masks"):
        if not getattr(cfg, name) >= 0:
            raise RKMError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(cfg, name)}")
    for name in ("dropout", "dropout_hidden", "dropout_weights", "dropout_channels"):
        check_probability(f"--{name.replace('_', '-')}", getattr(cfg, name))


def check_signals(model: RKMSignalClassifier, held: dict[str, Tensor]) -> None:
    """Compare a checkpoint's buffers with those of the data.

    Raises:
        RKMError: the data have other channels, classes, scales, or another sampling rate.
    """
    remedy = "give the data that it was trained on, or predict from files (python -m fairseq_rkm.predict)"
    here, rate = model.get_buffer(SCALES), model.get_buffer(RATE)
    if any(key.startswith("rkm.") for key in held):  # fairseq's average leaves the buffers out
        held.setdefault(SCALES, here)
        held.setdefault(RATE, rate)
    trained = held.get(SCALES)
    if trained is None or held.get(RATE) is None:
        raise RKMError("the checkpoint is of no rkm_signal_classifier: it lacks the scales of its channels")
    if trained.shape != here.shape:
        raise RKMError(
            f"the checkpoint was trained on {trained.size(-1) // 2} channels, and the data have {here.size(-1) // 2}: "
            f"{remedy}"
        )
    if not torch.equal(held[RATE].cpu(), rate.cpu()):
        rates = [int(number) / 1000 for number in (held[RATE], rate)]
        raise RKMError(
            f"the checkpoint was trained at {rates[0]:g} samples a second, and the data have {rates[1]:g}: {remedy}"
        )
    for key, weight in held.items():
        found = key.startswith("classification_heads.") and key.endswith(".weight") and weight.dim() == 2
        mine = model.state_dict().get(key) if found else None
        if mine is not None and mine.size(0) != weight.size(0):
            raise RKMError(
                f"the checkpoint's layer {key} has {weight.size(0)} outputs, and the data ask for {mine.size(0)}: were "
                f"there other classes? {remedy}"
            )
    if not np.array_equal(trained.cpu().numpy(), here.cpu().numpy()):
        raise RKMError(f"the checkpoint was trained on signals of other means and scales by channel: {remedy}")
