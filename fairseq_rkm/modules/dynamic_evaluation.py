"""Dynamic evaluation: Krause, Kahembwe, Murray and Renals (2018), *Dynamic Evaluation of Neural Sequence Models*.

A trained model goes on to learn the text that it scores. Each segment is scored first and learned then. This is the
form that divides gradients by their root mean squares on the training text, and decays to the trained weights.
"""

import math
from collections.abc import Iterable, Sequence

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
        >>> dynamic.check()  # before any number is used
        >>> dynamic.forget()
    """

    def __init__(self, weights: Iterable[nn.Parameter], learning_rate: float, decay: float, epsilon: float) -> None:
        for flag, value in (("--dynamic-lr", learning_rate), ("--dynamic-decay", decay)):
            if not 0 <= value < math.inf:
                raise RKMError(f"{flag} must be 0 or more, not {value}")
        if not 0 < epsilon < math.inf:
            raise RKMError(f"--dynamic-epsilon must be above 0, not {epsilon}")
        self.weights: list[Tensor] = [weight for weight in weights if weight.requires_grad]
        if any(weight.dtype.itemsize < 4 for weight in self.weights):
            raise RKMError("--dynamic-eval changes weights by little, and needs them in float32: leave out --fp16")
        self.trained = [weight.detach().clone() for weight in self.weights]
        self.learning_rate, self.decay, self.epsilon = learning_rate, decay, epsilon
        self.squares: list[Tensor] = []
        self.rates: list[Tensor] = []
        self.pulls: list[Tensor] = []
        # On the device: learning does not wait for it.
        self.worst = torch.full((), -math.inf, device=self.weights[0].device if self.weights else None)

    def measure(self, losses: Iterable[Tensor]) -> None:
        """Find the root mean squares of gradients, by which :meth:`learn` divides.

        Args:
            losses: the means of the training text's segments, ``()`` each.

        Raises:
            RKMError: no loss depends on a weight.
        """
        count = 0
        for loss in losses:
            self.add_squares(loss)
            count += 1
        self.use_squares(count)

    def add_squares(self, loss: Tensor) -> None:
        """Add the squares of one segment's gradients, for :meth:`use_squares`."""
        if not self.squares:
            self.squares = [torch.zeros_like(weight) for weight in self.weights]
        gradients = self._gradients(loss)
        with torch.no_grad():
            add_products(self.squares, gradients, gradients)

    def use_squares(self, count: int) -> None:
        """Divide by root mean squares from now on.

        Args:
            count: the number of segments whose squares were added.

        Raises:
            RKMError: the gradients are zero or not finite.
        """
        squares, self.squares = self.squares, []
        roots = [square.div_(count).sqrt_() for square in squares]
        mean = sum(float(root.sum()) for root in roots) / max(1, sum(root.numel() for root in roots))
        if not 0 < mean < math.inf:
            raise RKMError("--dynamic-eval finds no finite gradient on the training text: is the model trained?")
        self.rates = [self.learning_rate / (root + self.epsilon) for root in roots]
        self.pulls = [root.mul_(self.decay / mean).clamp_(max=1) for root in roots]

    def learn(self, loss: Tensor) -> None:
        """Change the weights by the gradient of a segment's loss, ``()``.

        It does not wait for a GPU, and can be recorded as a CUDA graph. :meth:`check` tells whether learning diverged.
        """
        gradients = self._gradients(loss)
        with torch.no_grad():
            torch.maximum(self.worst, loss.detach(), out=self.worst)  # of NaN and a number it is NaN
            torch._foreach_lerp_(self.weights, self.trained, self.pulls)
            add_products(self.weights, gradients, self.rates, -1)

    def check(self) -> None:
        """Wait for the device, and look at all losses since the trained weights.

        Raises:
            RKMError: one of them shows that learning has diverged.
        """
        if self.worst.item() < DIVERGED:
            return
        raise RKMError(
            "dynamic evaluation has diverged: lower --dynamic-lr, or raise --dynamic-epsilon or --dynamic-decay"
        )

    def forget(self) -> None:
        """Give the model its trained weights back."""
        self.worst.fill_(-math.inf)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.trained)

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)


def add_products(targets: Sequence[Tensor], ones: Sequence[Tensor], others: Sequence[Tensor], value: float = 1) -> None:
    """Add ``value * one * other`` to each target, for the contiguous ones with one launch."""
    groups: dict[bool, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for row in zip(targets, ones, others, strict=True):
        # With one tensor that is not contiguous, PyTorch would take all one by one.
        groups.setdefault(all(tensor.is_contiguous() for tensor in row), []).append(row)
    for group in groups.values():
        into, first, second = ([row[place] for row in group] for place in range(3))
        torch._foreach_addcmul_(into, first, second, value=value)
