import importlib.util
from argparse import Namespace

import fairseq.models
import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf
from torch import nn

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches import data_parallel
from fairseq_rkm.fairseq_patches.data_parallel import ask_for_fairscale, average_after_replay, take_legacy_ddp
from fairseq_rkm.fairseq_patches.error_messages import sentence_of

fairseq_rkm.register()


def config(**distributed):
    cfg = OmegaConf.structured(FairseqConfig)
    for key, value in distributed.items():
        cfg.distributed_training[key] = value
    return cfg


@pytest.mark.parametrize("backend", ["legacy_ddp", "no_c10d", "pytorch_ddp", "c10d"])
def test_models_with_graphs_get_the_wrapper_that_averages_after_the_replay(monkeypatch, backend):
    monkeypatch.setattr(distributed_utils, "get_world_size", lambda _: 2)
    flags, model = config(ddp_backend=backend).distributed_training, nn.Linear(2, 2)
    model.cuda_graphs = True
    wrapped = fairseq.models.DistributedFairseqModel(flags, model, process_group=None, device=torch.device("cpu"))
    assert isinstance(wrapped.module, LegacyDistributedDataParallel)
    assert wrapped.module.module is model


@pytest.mark.parametrize("graphs", [None, False])
def test_other_models_get_what_is_asked_for(graphs):
    model = nn.Linear(2, 2)
    if graphs is not None:
        model.cuda_graphs = graphs
    flags = config(ddp_backend="pytorch_ddp").distributed_training
    seen = average_after_replay(lambda args, *_: str(args.ddp_backend))(flags, model, None, torch.device("cpu"))
    assert seen == "pytorch_ddp"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ddp_backend": "slowmo"}, "cannot be had with --ddp-backend slowmo: take --ddp-backend legacy_ddp"),
        ({"ddp_backend": "fully_sharded"}, "with --ddp-backend fully_sharded: take --ddp-backend legacy_ddp"),
        ({"ddp_backend": "pytorch_ddp", "ddp_comm_hook": "fp16"}, "--ddp-comm-hook fp16 is for gradients that are"),
    ],
)
def test_backends_that_do_more_are_refused_with_graphs(flags, message):
    with pytest.raises(RKMError, match=message):
        take_legacy_ddp(config(**flags).distributed_training)


def main_of_training(_cfg):
    """As fairseq_cli.train's, which the plugin knows by a function beside it."""


def test_backends_of_a_library_that_is_not_installed_are_refused_before_processes_start(monkeypatch):
    started = []
    call_main = ask_for_fairscale(lambda _cfg, main, **_kwargs: started.append(main))
    monkeypatch.setattr(data_parallel, "trains", lambda main: main is main_of_training)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for backend in ("fully_sharded", "slowmo"):
        with pytest.raises(RKMError, match=f"--ddp-backend {backend} needs the library fairscale, which is not"):
            call_main(config(ddp_backend=backend), main_of_training)
        call_main(config(ddp_backend=backend), print)  # a command that only reads a model
    call_main(config(ddp_backend="legacy_ddp"), main_of_training)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: Namespace())
    call_main(config(ddp_backend="fully_sharded"), main_of_training)
    halved = config(ddp_backend="fully_sharded")
    halved.common.bf16 = True
    with pytest.raises(RKMError, match="fully_sharded is for float32 and --fp16"):
        call_main(halved, main_of_training)
    assert started == [print, print, main_of_training, main_of_training]


def test_fairseqs_own_words_about_the_library_are_a_sentence():
    """fairseq-hydra-train reads the plugin when processes have started."""
    words = "Cannot find FullyShardedDataParallel. Please install fairscale with: pip install fairscale"
    for error in (ImportError(words), RuntimeError(f"-- Process 1 terminated:\nTraceback ...\nImportError: {words}\n")):
        assert sentence_of(error).startswith("--ddp-backend fully_sharded needs the library fairscale")
