import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

import fairseq_rkm
from fairseq_rkm import RKMError

fairseq_rkm.register()


class Trainer:
    """Of one rank of two. It records how it is asked to load a checkpoint, and whether it sees the file."""

    data_parallel_world_size, data_parallel_process_group, tpu, checkpoint_suffix, device = 2, None, False, "", "cpu"

    def __init__(self):
        self.loaded = []

    def load_checkpoint(self, path, reset_optimizer, *_, **__):
        self.loaded.append((os.path.basename(path), reset_optimizer, PathManager.isfile(path)))

    def get_train_iterator(self, **_):
        return SimpleNamespace(epoch=1)

    def lr_step(self, _):
        pass


def config(tmp_path, **values):
    (tmp_path / "pretrained.pt").write_text("")
    pretrained = str(tmp_path / "pretrained.pt")
    return CheckpointConfig(save_dir=str(tmp_path), finetune_from_model=pretrained, **values)


def rank_0_has(monkeypatch, *names):
    """Let rank 0 have these files."""

    def broadcast(tensor, src, group):
        tensor[:] = torch.tensor([name in names for name in ("checkpoint_last.pt", "pretrained.pt")])

    monkeypatch.setattr(distributed_utils, "broadcast", broadcast)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_run_resumes_if_rank_0_does(tmp_path, monkeypatch, resumes):
    """Alone this rank would begin from the pretrained model, or from nothing, with an optimizer of its own."""
    rank_0_has(monkeypatch, *(["checkpoint_last.pt"] if resumes else []), "pretrained.pt")
    trainer, last = Trainer(), tmp_path / "checkpoint_last.pt"
    if not resumes:
        last.write_text("")
    checkpoint_utils.load_checkpoint(config(tmp_path), trainer)
    assert trainer.loaded == [("checkpoint_last.pt" if resumes else "pretrained.pt", not resumes, True)]
    assert PathManager.isfile(str(last)) is not resumes
    assert PathManager.exists(str(last)) is not resumes


def test_a_folder_that_is_not_shared_is_refused_where_each_rank_reads_it(tmp_path, monkeypatch):
    rank_0_has(monkeypatch, "checkpoint_last.pt", "pretrained.pt")
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    cfg, trainer = config(tmp_path, load_checkpoint_on_all_dp_ranks=True), Trainer()
    with pytest.raises(RKMError, match=r"rank 1 does not see .*checkpoint_last.pt, unlike rank 0"):
        checkpoint_utils.load_checkpoint(cfg, trainer)
    (tmp_path / "checkpoint_last.pt").write_text("")
    checkpoint_utils.load_checkpoint(cfg, trainer)
    assert trainer.loaded == [("checkpoint_last.pt", False, True)]
