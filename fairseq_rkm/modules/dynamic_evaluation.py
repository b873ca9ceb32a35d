"""Dynamic evaluation: Krause, Kahembwe, Murray and Renals (2018), *Dynamic Evaluation of Neural Sequence Models*.

A trained model goes on to learn the text that it scores. Each segment is scored first and learned then. This is the
form that divides gradients by their root mean squares on the training text, and decays to the trained weights.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fairseq_rkm.errors import RKMError

DIVERGED = 100.0
"""A segment's loss, in nats a word, that no model has from which something can be learned."""


class DynamicEvaluation:
    """The update ``w <- w - learning_rate g / (R + epsilon) + min(1, decay R / mean(R)) (w_trained - w)``.

    ``g`` is the gradient of a segment's loss. ``R`` is the root mean square of the gradients of the training text's
    segments, elementwise, and ``mean(R)`` its mean over all weights.

    Args:
        weights: as trained, float32 or float64. Those that need no gradient stay as they are.
        learning_rate: 0 or more.
        decay: to the trained weights; 0 or more.
        epsilon: above 0. It limits the steps of weights whose gradients are rare on the training text.

    Raises:
        RKMError: a value outside its range, or weights in 16 bits.

    Example:
        >>> dynamic = DynamicEvaluation(model.parameters(), learning_rate=5e-5, decay=0.02, epsilon=2e-5)
        >>> dynamic.measure(training_losses())  # one after the other
        >>> for loss in losses():  # of the text's segments, each with the weights as they are then
        ...     dynamic.learn(loss)
        >>> dynamic.forget()
    """

    def __init__(self, weights: Iterable[nn.Parameter], learning_rate: float, decay: float, epsilon: float) -> None:
        for flag, value in (("--dynamic-lr", learning_rate), ("--dynamic-decay", decay)):
            if not 0 <= value < math.inf:
                raise RKMError(f"{flag} must be 0 or more, not {value}")
        if not 0 < epsilon < math.inf:
            raise RKMError(f"--dynamic-epsilon must be above 0, not {epsilon}")
        self.weights = [weight for weight in weights if weight.requires_grad]
        if any(weight.dtype.itemsize < 4 for weight in self.weights):
            raise RKMError("--dynamic-eval changes weights by little, and needs them in float32: leave out --fp16")
        self.trained = [weight.detach().clone() for weight in self.weights]
        self.learning_rate, self.decay, self.epsilon = learning_rate, decay, epsilon
        self.rates: list[Tensor] = []
        self.pulls: list[Tensor] = []

    def measure(self, losses: Iterable[Tensor]) -> None:
        """Find the root mean squares of gradients, by which :meth:`learn` divides.

        Args:
            losses: the means of the training text's segments, ``()`` each.

        Raises:
            RKMError: no loss depends on a weight.
        """
        squares, count = [torch.zeros_like(weight) for weight in self.weights], 0
        for loss in losses:
            for square, gradient in zip(squares, self._gradients(loss), strict=True):
                square.addcmul_(gradient, gradient)
            count += 1
        roots = [square.div_(max(count, 1)).sqrt_() for square in squares]
        mean = sum(float(root.sum()) for root in roots) / sum(root.numel() for root in roots)
        if not 0 < mean < math.inf:
            raise RKMError("--dynamic-eval finds no finite gradient on the training text: is the model trained?")
        self.rates = [self.learning_rate / (root + self.epsilon) for root in roots]
        self.pulls = [root.mul_(self.decay / mean).clamp_(max=1) for root in roots]

    def learn(self, loss: Tensor) -> None:
        """Change the weights by the gradient of a segment's loss, ``()``.

        Raises:
            RKMError: the loss shows that learning has diverged.
        """
        if not loss.item() < DIVERGED:
            raise RKMError(
                "dynamic evaluation has diverged: lower --dynamic-lr, or raise --dynamic-epsilon or --dynamic-decay"
            )
        gradients = self._gradients(loss)
        with torch.no_grad():
            for weight, trained, gradient, rate, pull in zip(
                self.weights, self.trained, gradients, self.rates, self.pulls, strict=True
            ):
                weight.lerp_(trained, pull).addcmul_(gradient, rate, value=-1)

    def forget(self) -> None:
        """Give the model its trained weights back."""
        with torch.no_grad():
            for weight, trained in zip(self.weights, self.trained, strict=True):
                weight.copy_(trained)

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)
