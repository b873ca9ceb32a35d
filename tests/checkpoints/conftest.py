"""A small checkpoint of fairseq's, made in the process, and what loads it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, models, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

import fairseq_rkm

SIZES = {"decoder_embed_dim": 6, "decoder_hidden_size": 6, "decoder_layers": 1}


def checkpoint(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    """What fairseq saves after training a language model of a dictionary of some words; other models likewise."""
    fairseq_rkm.register()
    words = Dictionary()
    for number in range(6):
        words.add_symbol(f"w{number}", n=9 - number)
    words.save(str(folder / "dict.txt"))
    task = {"_name": "language_modeling", "data": str(folder), "tokens_per_sample": 8}
    parts = {**vars(FairseqConfig()), "criterion": {"_name": "cross_entropy"}}
    parts["task"] = OmegaConf.merge(tasks.TASK_DATACLASS_REGISTRY["language_modeling"](), task)
    parts["model"] = OmegaConf.merge(models.MODEL_DATACLASS_REGISTRY[model["_name"]](), model)
    plain: Any = OmegaConf.to_container(OmegaConf.create(parts), resolve=True, enum_to_str=True)
    built = models.build_model(OmegaConf.create(plain["model"]), tasks.setup_task(OmegaConf.create(plain["task"])))
    return {
        "cfg": plain,
        "args": None,
        "model": built.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": 3,
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 3}, "val_loss": 2.5},
        "last_optimizer_state": None,
    }


@pytest.fixture
def state(tmp_path):
    """A checkpoint of ``rkm_lm``, to be changed."""
    return checkpoint(tmp_path, {"_name": "rkm_lm", "cell": "rkm_lstm", **SIZES})


@pytest.fixture
def load(tmp_path):
    """Saves a state, or takes the file that is there, and loads its model."""

    def load(state: Any = None, path: Path | None = None, **options: Any) -> SimpleNamespace:
        path = path or tmp_path / "checkpoint.pt"
        if state is not None:
            torch.save(state, path, **options)
        loaded, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
        return SimpleNamespace(model=loaded[0], cfg=cfg, task=task)

    return load
