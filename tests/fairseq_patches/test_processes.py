import os
import socket
import sys

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches import processes

fairseq_rkm.register()


def config(**distributed):
    cfg = OmegaConf.structured(FairseqConfig)
    cfg.common.cpu = True
    cfg.distributed_training.distributed_world_size = 1
    for key, value in distributed.items():
        cfg.distributed_training[key] = value
    return cfg


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def torchrun(monkeypatch, rank: int, size: int):
    values = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def inferred(cfg):
    distributed_utils.infer_init_method(cfg.distributed_training)
    names = ("init_method", "world_size", "rank", "no_spawn")
    return tuple(cfg.distributed_training[f"distributed_{name}"] for name in names)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_torchrun_s_processes_are_one_run_whatever_devices_are_counted(monkeypatch, world_size):
    torchrun(monkeypatch, 1, 3)
    assert inferred(config(distributed_world_size=world_size)) == ("env://", 3, 1, True)
    torchrun(monkeypatch, 0, 1)
    assert inferred(config())[0] is None


def test_more_processes_than_gpus_are_refused(monkeypatch):
    torchrun(monkeypatch, 1, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(processes, "on_cpus", lambda _: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RKMError, match="process 1 of this machine has no GPU, of which there are 1"):
        inferred(config())


def slurm(monkeypatch, tmp_path, tasks=2):
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho node7\necho node8\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"STEP_NUM_TASKS": tasks, "PROCID": 1, "STEP_NODELIST": "node[7-8]", "JOB_ID": 5}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_srun_s_tasks_on_cpus_are_one_run(monkeypatch, tmp_path):
    slurm(monkeypatch, tmp_path)
    cfg = config(distributed_world_size=2)
    assert inferred(cfg) == ("tcp://node7:20005", 2, 1, True)
    assert inferred(config(distributed_world_size=2, distributed_port=29500))[0] == "tcp://node7:29500"
    with pytest.raises(RKMError, match="--distributed-world-size is 4, and srun started 2 tasks"):
        inferred(config(distributed_world_size=4))


def training_main(_cfg):
    """Taken for training's, which counts here."""


should_stop_early = None


def test_srun_s_tasks_do_not_train_apart_unless_told(monkeypatch, tmp_path):
    slurm(monkeypatch, tmp_path, tasks=4)
    monkeypatch.setattr(sys, "argv", ["fairseq-train", "data"])
    with pytest.raises(RKMError, match="srun started 4 tasks, each of which would train a model by itself"):
        distributed_utils.call_main(config(), training_main)
    monkeypatch.setattr(sys, "argv", ["fairseq-train", "data", "--distributed-world-size=1"])
    distributed_utils.call_main(config(), training_main)


def test_a_number_of_processes_is_enough_on_cpus(monkeypatch):
    method, size, _, no_spawn = inferred(config(distributed_world_size=2))
    assert method.startswith("tcp://localhost:")
    assert (size, no_spawn) == (2, False)
    started = []
    monkeypatch.setattr(processes, "_spawn", lambda cfg, *_: started.append(cfg.distributed_training))
    distributed_utils.call_main(config(distributed_world_size=2), training_main)
    assert (started[0].distributed_backend, started[0].ddp_backend) == ("gloo", "legacy_ddp")


@pytest.mark.parametrize("cpus", [True, False])
def test_processes_of_one_machine_meet_at_a_given_port(monkeypatch, cpus):
    """On GPUs fairseq would take the port for SLURM's, and train in one process."""
    monkeypatch.setattr(processes, "on_cpus", lambda _: cpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = config(distributed_world_size=2, distributed_port=23456)
    assert inferred(cfg) == ("tcp://localhost:23456", 2, 0, False)
    assert inferred(config(distributed_world_size=1, distributed_port=23456))[0] is None


def test_on_cpus_a_named_meeting_place_means_a_command_a_process(monkeypatch):
    """By itself fairseq would start as many as there are GPUs: none."""
    ranks = []
    monkeypatch.setattr(distributed_utils, "distributed_main", lambda *_: ranks.append(1))
    cfg = config(distributed_world_size=2, distributed_init_method="tcp://host:1", distributed_rank=1)
    distributed_utils.call_main(cfg, training_main)
    assert ranks == [1]


def test_hydra_s_processes_do_not_train_apart(monkeypatch, tmp_path):
    from fairseq import checkpoint_utils

    torchrun(monkeypatch, 0, 2)
    with pytest.raises(RKMError, match="torchrun started 2 processes, and each would train a model by itself"):
        checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
