"""Changes of signals in training: noise, lost channels and masked stretches of time."""

import torch
from torch import Tensor, nn

from fairseq_rkm.modules import LockedDropout


class SignalAugmentation(nn.Module):
    """Disturb standardized signals in training; in evaluation leave them as they are.

    Args:
        noise: the standard deviation of Gaussian noise, in standard deviations of a channel.
        dropout_channels: the probability that a channel of a window is zero throughout; the others are scaled up.
        time_masks: stretches of a window that are set to zero, the channels' mean.
        time_mask_steps: the most steps of a stretch; its length is drawn from 0 to this.
    """

    def __init__(self, noise: float, dropout_channels: float, time_masks: int, time_mask_steps: int) -> None:
        super().__init__()
        self.noise, self.time_masks, self.time_mask_steps = noise, time_masks, time_mask_steps
        self.dropout_channels = LockedDropout(dropout_channels, "--dropout-channels")

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(T, B, channels)``."""
        if not self.training:
            return x
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        x = self.dropout_channels(x)
        for _ in range(self.time_masks):
            x = x * self._outside(x)
        return x

    def _outside(self, x: Tensor) -> Tensor:
        """``(T, B, 1)``: 0 within a stretch of each window, 1 outside. A stretch may reach over either end."""
        steps = torch.arange(x.size(0), device=x.device).unsqueeze(1)
        draws = torch.rand_like(x[:2, :, 0] if x.size(0) > 1 else x[:1, :, 0].repeat(2, 1), dtype=torch.float32)
        length = (draws[0] * (self.time_mask_steps + 1)).floor()
        start = (draws[1] * (x.size(0) + length)).floor() - length
        within = (steps >= start) & (steps < start + length)
        return (~within).unsqueeze(-1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"noise={self.noise}, time_masks={self.time_masks}, time_mask_steps={self.time_mask_steps}"
