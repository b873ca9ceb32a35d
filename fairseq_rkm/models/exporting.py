"""Trained networks as modules of tensors alone, for ``torch.export``, ``torch.jit.trace`` and ONNX.

Fairseq's models return dictionaries and keep decoding's state in one. Exporters want tensors.
"""

from torch import Tensor, nn

from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.classification.rkm_classifier import RKMClassifier
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModel
from fairseq_rkm.modules import RKMState


class LanguageModelNetwork(nn.Module):
    """A language model that takes and gives its state: a whole text at once, or word by word.

    Args:
        model: a trained model, as ``RKMLanguageModel.from_pretrained(...).models[0]`` is.
        padding: whether the padding symbol stands for no word. Without it every symbol is a word; the cell ``lstm``
            then becomes ONNX's own operator.

    Attributes:
        state_names: the names of the state's tensors, in order: ``hidden0``, ``cell0``, for n-grams ``context0``, and
            so on for each layer.

    Example:
        >>> network = LanguageModelNetwork(model)
        >>> scores, *state = network(tokens, *network.start(tokens.size(0)))
        >>> scores, *state = network(scores[:, -1:].argmax(2), *state)  # the next word
    """

    def __init__(self, model: RKMLanguageModel, padding: bool = True) -> None:
        super().__init__()
        if not isinstance(model, RKMLanguageModel):
            raise RKMError(f"LanguageModelNetwork takes an rkm_lm, as hub.models[0] is, not {type(model).__name__}")
        self.decoder, self.padding = model.decoder, padding
        self.state_names = [
            f"{kind}{number}"
            for number, layer in enumerate(model.decoder.layers)
            for kind in (("hidden", "cell") if layer.ngram == 1 else ("hidden", "cell", "context"))
        ]
        self.train(model.training)  # the older ONNX exporter sets all parts to the whole's mode

    def start(self, batch: int) -> list[Tensor]:
        """The state before ``batch`` texts: for each layer h and c, ``(1, B, d)``, and a context, ``(n - 1, B, m)``."""
        states = [layer.initial_state(batch) for layer in self.decoder.layers]
        return [tensor.detach() for state in states for tensor in state.tensors()]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Predict each next word.

        Args:
            tokens: ``(B, T)`` int64.
            state: the tensors of :attr:`state_names`, from :meth:`start` or an earlier call.

        Returns:
            Logits, ``(B, T, V)``, of an adaptive softmax log probabilities; then the next state's tensors.
        """
        tensors = iter(state)
        states = [
            RKMState(next(tensors), next(tensors), None if layer.ngram == 1 else [next(tensors)])
            for layer in self.decoder.layers
        ]
        mask = tokens.eq(self.decoder.padding_idx) if self.padding else None
        output, states = self.decoder.run(tokens, states, mask, self.decoder.resets(tokens))
        features = self.decoder.dropout_output(output).transpose(0, 1)
        softmax = self.decoder.adaptive_softmax
        scores = self.decoder.output_layer(features) if softmax is None else softmax.get_log_prob(features, None)
        return scores, *(tensor for state in states for tensor in state.tensors())


class ClassifierNetwork(nn.Module):
    """A classifier from tokens to the classes' scores.

    Args:
        model: a trained model, as ``RKMClassifier.from_pretrained(...).model`` is.
        head: its head's name; fairseq's task calls it ``sentence_classification_head``.

    Raises:
        RKMError: it is another model, or has no head of this name.
    """

    def __init__(self, model: RKMClassifier, head: str = "sentence_classification_head") -> None:
        super().__init__()
        if not isinstance(model, RKMClassifier) or head not in model.classification_heads:
            raise RKMError(f"ClassifierNetwork takes an rkm_classifier with a head {head!r}, as hub.model is")
        self.model, self.head = model, head
        self.train(model.training)

    def forward(self, tokens: Tensor) -> Tensor:
        """The classes' logits, ``(B, classes)``, of documents ``(B, T)`` int64, padded on either side."""
        return self.model(tokens, classification_head_name=self.head)[0]
