"""Whether a run resumes is for rank 0 to see: other machines may have disks of their own, and see no checkpoint."""

import os
from typing import Any

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import patch

WHY = "each process looks for the checkpoint itself, and some begin anew, or hang, if others resume"
UNTIL = "fairseq lets rank 0 decide"

_seen_by_rank_0: dict[str, bool] = {}
"""While a run of several processes loads its checkpoint: whether rank 0 has these files."""


@patch(checkpoint_utils, "load_checkpoint", why=WHY, until=UNTIL)
def look_at_rank_0(load: Any) -> Any:
    """Make ``load_checkpoint`` find out first which files rank 0 has."""

    def load_checkpoint(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        if trainer.data_parallel_world_size > 1 and not trainer.tpu:
            _seen_by_rank_0.update(_look(cfg, trainer))
        try:
            return load(cfg, trainer, **kwargs)
        finally:
            _seen_by_rank_0.clear()

    return load_checkpoint


def _look(cfg: Any, trainer: Any) -> dict[str, bool]:
    """Return whether rank 0 has the files that a run may start from.

    Raises:
        RKMError: this process has to read a file that rank 0 has, and does not see it.
    """
    suffix = trainer.checkpoint_suffix
    first = cfg.restore_file.replace(".pt", f"{suffix}.pt")
    if cfg.restore_file == "checkpoint_last.pt":  # fairseq's default
        first = os.path.join(cfg.save_dir, first)
    paths = [path for path in (first, cfg.finetune_from_model, cfg.continue_once) if path is not None]
    own = torch.tensor([PathManager.isfile(path) for path in paths], dtype=torch.uint8, device=trainer.device)
    seen = own.clone()
    distributed_utils.broadcast(seen, src=0, group=trainer.data_parallel_process_group)
    if cfg.load_checkpoint_on_all_dp_ranks:
        for path, here, there in zip(paths, own.tolist(), seen.tolist(), strict=True):
            if here != there:
                raise RKMError(
                    f"rank {dist.get_rank()} {'sees' if here else 'does not see'} {path}, unlike rank 0: "
                    "--load-checkpoint-on-all-dp-ranks needs a folder that all machines share. Without the flag rank "
                    "0 reads it for all"
                )
    return dict(zip(paths, map(bool, seen.tolist()), strict=True))


@patch(PathManager, "exists", why=WHY, until=UNTIL)
def exists_for_rank_0(exists: Any) -> Any:
    """Make ``PathManager.exists`` answer for rank 0 while a run's checkpoint is loaded."""
    return _for_rank_0(exists)


@patch(PathManager, "isfile", why=WHY, until=UNTIL)
def is_file_for_rank_0(isfile: Any) -> Any:
    """Make ``PathManager.isfile`` answer for rank 0 while a run's checkpoint is loaded."""
    return _for_rank_0(isfile)


def _for_rank_0(look: Any) -> Any:
    def answer(path: str) -> bool:
        seen = _seen_by_rank_0.get(path)
        return bool(look(path)) if seen is None else seen

    return answer
