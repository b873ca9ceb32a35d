"""Several processes train one model. If one fails, a sentence says which process failed and how to go on."""

import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import DistributedTimeoutWrapper
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf, open_dict

from fairseq_rkm.errors import RKMError, first_line
from fairseq_rkm.fairseq_patches import meetings
from fairseq_rkm.fairseq_patches.checkpoint_writing import training_folders
from fairseq_rkm.fairseq_patches.commands import in_fairseq_command
from fairseq_rkm.fairseq_patches.registry import patch, setting

logger = logging.getLogger(__name__)


def on_cpus(cfg: Any) -> bool:
    """Return whether a run's processes compute on CPUs.

    Args:
        cfg: the section ``distributed_training`` of a configuration, or flags.
    """
    parent = cfg._get_parent() if OmegaConf.is_config(cfg) else None
    return not torch.cuda.is_available() or (parent is not None and bool(parent.common.cpu))


@patch(
    distributed_utils,
    "infer_init_method",
    why="where fairseq counts at most one device, each process that torchrun or SLURM starts trains a model by itself; "
    "without SLURM, --distributed-port makes it train in one process",
    until="fairseq takes the number of processes from WORLD_SIZE, counts no devices on CPUs, and meets at the port",
)
def meet_all_processes(infer: Any) -> Any:
    """Make ``infer_init_method`` join the processes of torchrun and SLURM into one run, on CPUs as well."""

    def infer_init_method(cfg: Any, force_distributed: bool = False) -> None:
        if cfg.tpu or cfg.pipeline_model_parallel or cfg.distributed_init_method is not None:
            infer(cfg, force_distributed)
        elif (started := _started_by_torchrun()) or (on_cpus(cfg) and (started := _started_by_slurm(cfg))):
            _join(cfg, *started)
        elif on_cpus(cfg) and cfg.distributed_world_size > 1:
            cfg.distributed_init_method = _on_this_machine(cfg)
        else:
            infer(cfg, force_distributed)
            # fairseq itself takes a port for SLURM alone, and would train in one process.
            if cfg.distributed_init_method is None and cfg.distributed_world_size > 1 and cfg.distributed_port > 0:
                cfg.distributed_init_method = _on_this_machine(cfg)

    return infer_init_method


def _started_by_torchrun() -> tuple[str, int, int, int] | None:
    """Return the meeting place, the number of processes, this one's rank, and its number on its machine."""
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names) or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    rank = int(os.environ["RANK"])
    return "env://", int(os.environ["WORLD_SIZE"]), rank, int(os.environ.get("LOCAL_RANK", rank))


def _started_by_slurm(cfg: Any) -> tuple[str, int, int, int] | None:
    """Return the same as :func:`_started_by_torchrun` for a job step of several tasks; None for one task.

    Raises:
        RKMError: another number of tasks than of processes, or scontrol does not name the machines.
    """
    tasks = _slurm("STEP_NUM_TASKS", 1)
    if tasks < 2 or cfg.distributed_world_size == 1:
        return None
    if cfg.distributed_world_size != tasks:
        raise RKMError(
            f"--distributed-world-size is {cfg.distributed_world_size}, and srun started {tasks} tasks: on CPUs each "
            "task is a process, so give the same number"
        )
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "localhost"
    try:
        host = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True).split()[0]  # noqa: S603
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise RKMError(
            f"scontrol does not say which machines {nodes} are ({first_line(error)}): give --distributed-init-method "
            "tcp://HOST:PORT and --distributed-rank"
        ) from error
    port = cfg.distributed_port if cfg.distributed_port > 0 else 20000 + _slurm("JOB_ID", 0) % 20000
    return f"tcp://{host}:{port}", tasks, _slurm("PROCID", 0), _slurm("LOCALID", 0)


def _slurm(name: str, default: int) -> int:
    return int(os.environ.get(f"SLURM_{name}", default))


def _join(cfg: Any, method: str, size: int, rank: int, local: int) -> None:
    """Let this process be one of several that something else has started.

    Raises:
        RKMError: there is no GPU left for it.
    """
    here = torch.cuda.device_count()
    if not on_cpus(cfg) and local >= here:
        raise RKMError(
            f"process {local} of this machine has no GPU, of which there are {here}: start no more processes than GPUs "
            "(--nproc-per-node), or give --cpu"
        )
    cfg.distributed_init_method, cfg.distributed_no_spawn = method, True
    cfg.distributed_world_size, cfg.distributed_rank = size, rank
    cfg.device_id = 0 if on_cpus(cfg) else local
    if cfg.device_id > 0:
        torch.cuda.set_device(cfg.device_id)


def _on_this_machine(cfg: Any) -> str:
    """Return a meeting place for processes of this machine, at ``--distributed-port`` if that is given."""
    return f"tcp://localhost:{cfg.distributed_port if cfg.distributed_port > 0 else _free_port()}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@patch(
    distributed_utils,
    "call_main",
    why="fairseq starts a process for each GPU, so none on CPUs, and the failure of one prints all their stack traces",
    until="fairseq starts as many processes as are asked for, and says in a sentence which one failed",
)
def start_all_processes(call: Any) -> Any:
    """Make ``call_main`` start processes on CPUs too, and end all of them when one ends."""

    def call_main(cfg: Any, main: Callable, **kwargs: Any) -> None:
        distributed = cfg.distributed_training
        if trains(main):
            training_folders[:] = [cfg.checkpoint.save_dir]
        if distributed.distributed_init_method is None:
            _refuse_tasks_apart(distributed, main)
            distributed_utils.infer_init_method(distributed)
        elif on_cpus(distributed):
            # There are no devices to count: a user who names a meeting place starts each process.
            distributed.distributed_no_spawn = True
        if distributed.distributed_init_method is None or cfg.common.tpu:
            call(cfg, main, **kwargs)
            return
        if on_cpus(distributed):
            _settle_on_cpus(distributed)
        if distributed.distributed_no_spawn:
            distributed_utils.distributed_main(distributed.device_id, main, cfg, kwargs)
        else:
            _spawn(cfg, main, kwargs)

    return call_main


def _refuse_tasks_apart(cfg: Any, main: Callable) -> None:
    """Raise RKMError for tasks of a SLURM step that would each train a model, unless the user asks for that."""
    tasks = _slurm("STEP_NUM_TASKS", 1)
    alone = cfg.distributed_world_size == 1 and not _started_by_torchrun()
    if alone and tasks > 1 and trains(main) and not _named("--distributed-world-size"):
        raise RKMError(
            f"srun started {tasks} tasks, each of which would train a model by itself: give --distributed-world-size "
            f"{tasks} for one run of all, or --distributed-world-size 1 for runs of their own in folders of their own"
        )


def _named(flag: str) -> bool:
    return any(argument.split("=")[0] == flag for argument in sys.argv)


def trains(main: Callable) -> bool:
    """Return whether a command's main function is the one of training."""
    return "should_stop_early" in getattr(main, "__globals__", {})


def _settle_on_cpus(cfg: Any) -> None:
    """Choose backends that work on CPUs in place of the defaults, which are for GPUs."""
    if cfg.distributed_backend == "nccl":
        logger.info("processes on CPUs: --distributed-backend gloo")
        cfg.distributed_backend = "gloo"
    if cfg.ddp_backend in ("c10d", "pytorch_ddp"):
        logger.info("processes on CPUs: --ddp-backend legacy_ddp")
        cfg.ddp_backend = "legacy_ddp"


def _spawn(cfg: Any, main: Callable, kwargs: dict) -> None:
    """Start this machine's processes. If one ends in an error, end all.

    Raises:
        RKMError: a process was killed or left; the message names its rank.
    """
    distributed = cfg.distributed_training
    size = distributed.distributed_world_size
    count = size if on_cpus(distributed) else min(torch.cuda.device_count(), size)
    with open_dict(distributed):
        distributed.distributed_num_procs = count
    first = distributed.distributed_rank
    distributed.distributed_rank = None  # assigned in each process
    arguments = (main, cfg, {**kwargs, "start_rank": first})
    context = torch.multiprocessing.start_processes(run_rank, arguments, count, join=False, start_method="spawn")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        while not context.join():
            pass
    except torch.multiprocessing.ProcessExitedException as error:
        how = f"was ended by {error.signal_name}" if error.signal_name else f"ended with status {error.exit_code}"
        raise RKMError(
            f"the process of rank {first + error.error_index} {how}, and the others were stopped: {meetings.AGAIN}"
        ) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def run_rank(number: int, main: Callable, cfg: Any, kwargs: dict) -> None:
    """Run one process of :func:`_spawn`: fairseq's main function, with the plugin registered before processes meet.

    Args:
        number: of the process on this machine, from 0.
        main: the command's main function.
        cfg: the whole configuration.
        kwargs: further arguments of fairseq's ``distributed_main``.

    Raises:
        RKMError: another process ended or does not answer.
    """
    import fairseq_rkm

    fairseq_rkm.register()
    try:
        distributed_utils.distributed_main(number, main, cfg, kwargs)
    except RuntimeError as error:
        sentence = meetings.lost_process(error)
        if sentence is None:
            raise
        raise RKMError(sentence) from error


@patch(
    distributed_utils,
    "distributed_init",
    why="processes wait half an hour for one that never comes or no longer answers, and do not say for which",
    until="fairseq gives torch.distributed a time, and names the ranks that are missing",
)
def meet_in_time(init: Any) -> Any:
    """Make ``distributed_init`` wait ``--heartbeat-timeout`` seconds, and name the processes that did not come."""

    def distributed_init(cfg: Any) -> Any:
        distributed = cfg.distributed_training
        if not cfg.common.tpu and not dist.is_initialized():
            _meet(distributed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Distributed is already initialized")
            return init(cfg)

    return distributed_init


def _meet(cfg: Any) -> None:
    """Initialize torch.distributed, as fairseq does, once all processes have come.

    Raises:
        RKMError: a process did not come in time, or cannot be reached; the message names its rank.
    """
    rank, size, method = cfg.distributed_rank, cfg.distributed_world_size, cfg.distributed_init_method
    seconds = cfg.heartbeat_timeout if cfg.heartbeat_timeout > 0 else meetings.TIMEOUT
    logger.info(f"distributed init (rank {rank}): {method}; processes wait {seconds} seconds for each other")
    meeting = meetings.meet(method, rank, size, seconds)
    time_allowed = _wait_at_most(seconds)
    try:
        dist.init_process_group(
            cfg.distributed_backend, store=dist.PrefixStore("groups", meeting.store), rank=rank, world_size=size,
            timeout=time_allowed,
        )  # fmt: skip
    except RuntimeError as error:
        raise RKMError(meetings.unreachable(meeting, error)) from error
    logger.info(f"initialized host {socket.gethostname()} as rank {rank}")
    if torch.cuda.is_available():
        dist.all_reduce(torch.zeros(1).cuda())


@setting(
    "torch.distributed",
    why="processes wait half an hour for one that no longer answers, also where fairseq-hydra-train has met already",
    until="fairseq gives torch.distributed a time",
)
def wait_ten_minutes() -> None:
    """Let the processes of fairseq's commands wait ten minutes for each other, unless another time was asked for."""
    if in_fairseq_command() and not meetings.current:
        _wait_at_most(meetings.TIMEOUT)


def _wait_at_most(seconds: int) -> timedelta:
    """Set the time for later groups: fairseq makes them with torch's default, not with the time of the first group."""
    time_allowed = timedelta(seconds=seconds)
    dist.distributed_c10d.default_pg_timeout = time_allowed
    dist.distributed_c10d.default_pg_nccl_timeout = time_allowed
    return time_allowed


@patch(
    DistributedTimeoutWrapper,
    "__init__",
    why="--heartbeat-timeout interrupts a process that waits, before it can say for which other it waits",
    until="fairseq gives the time to torch.distributed",
)
def leave_time_to_torch(init: Any) -> Any:
    """Make fairseq's own clock stand still where torch.distributed already limits the time that processes wait."""

    def initialize(wrapper: Any, module: Any, timeout: int, *args: Any, **kwargs: Any) -> None:
        init(wrapper, module, -1 if meetings.current else timeout, *args, **kwargs)

    return initialize


@patch(
    checkpoint_utils,
    "verify_checkpoint_directory",
    why="started by torchrun, fairseq-hydra-train on CPUs trains a model in each process, all into one folder",
    until="fairseq takes the number of processes from WORLD_SIZE",
)
def refuse_to_train_apart(verify: Any) -> Any:
    """Make ``verify_checkpoint_directory``, which training calls first, refuse processes that would train apart."""

    def verify_checkpoint_directory(folder: str) -> None:
        if _started_by_torchrun() and not dist.is_initialized():
            raise RKMError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, and each would train a model by itself: "
                "fairseq-hydra-train counts GPUs. Add distributed_training.distributed_init_method=env:// "
                "distributed_training.distributed_no_spawn=true distributed_training.distributed_backend=gloo "
                "distributed_training.ddp_backend=legacy_ddp distributed_training.distributed_world_size=$WORLD_SIZE "
                "distributed_training.distributed_rank=$RANK, or use fairseq-train"
            )
        verify(folder)

    return verify_checkpoint_directory
