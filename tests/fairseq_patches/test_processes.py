import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches import processes
from fairseq_rkm.fairseq_patches.processes import Meeting, lost_process

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


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_named(rank):
    cfg = config(
        distributed_world_size=2, distributed_rank=rank, heartbeat_timeout=1,
        distributed_init_method=f"tcp://localhost:{free_port()}",
    )  # fmt: skip
    wanted = "rank 1 of 2 did not come .* within 1 seconds" if rank == 0 else "rank 1 did not find rank 0 within 1 sec"
    with pytest.raises(RKMError, match=wanted):
        distributed_utils.distributed_init(cfg)
    assert not dist.is_initialized()


@pytest.fixture
def meeting(monkeypatch):
    """Of rank 1 of 4: rank 2 has ended, and rank 3 is on another machine."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "ANSWER", 0.3)
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    here = socket.gethostname()
    homes = [f"{here}:{os.getppid()}", f"{here}:{os.getpid()}", f"{here}:{ended.pid}", "elsewhere:1"]
    found = Meeting(dist.HashStore(), 1, homes, 7)
    monkeypatch.setattr(processes, "_meeting", [found])
    return found


def test_who_has_ended_is_named(meeting):
    sentence = lost_process(RuntimeError("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:4"))
    assert sentence.startswith(f"rank 1 lost rank 2 ({meeting.homes[2]}), which has ended or did not answer. See")


def test_who_does_not_answer_is_named(meeting):
    meeting.homes[2] = meeting.homes[0]
    threading.Timer(0.1, lambda: [meeting.store.set(f"lost{rank}", "1") for rank in (0, 2)]).start()
    sentence = lost_process(RuntimeError("Timed out waiting 7000ms for recv operation to complete"))
    assert "rank 1 lost rank 3 (elsewhere:1)" in sentence
    assert "within 7 seconds (--heartbeat-timeout)" in sentence


def test_other_errors_are_no_lost_process(meeting):
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_process(ValueError("Connection closed by peer")) is None
    processes._meeting.clear()
    assert lost_process(RuntimeError("size mismatch")) is None
