"""``lightning``: a training in its ``Trainer`` is the training written by hand, and goes on from its checkpoint."""

import copy

import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fairseq_rkm import RKM

lightning = pytest.importorskip("lightning", reason="needs lightning; see CONTRIBUTING, compatibility")
pytestmark = pytest.mark.filterwarnings("ignore")


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = RKM(3, 4, cell="rkm_cifg", ngram=2, bias=False, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        _, (hidden, _) = self.rnn(x)
        return self.out(hidden[-1])

    def training_step(self, batch, _number):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(folder, epochs):
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, gradient_clip_val=0.1,
    )  # fmt: skip


def test_a_training_and_its_continuation(tmp_path):
    loader = DataLoader(TensorDataset(torch.randn(8, 5, 3), torch.randn(8, 1)), batch_size=4)
    model = Regression()
    plain, first = copy.deepcopy(model), copy.deepcopy(model)
    trainer(tmp_path, 3).fit(model, loader)

    optimizer = plain.configure_optimizers()
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            plain.training_step(batch, 0).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
    for given, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(given, wanted)

    begun = trainer(tmp_path, 1)
    begun.fit(first, loader)
    begun.save_checkpoint(tmp_path / "first.ckpt")
    continued = Regression()
    trainer(tmp_path, 3).fit(continued, loader, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    for given, wanted in zip(continued.parameters(), model.parameters(), strict=True):
        assert_close(given, wanted)
