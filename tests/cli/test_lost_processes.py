"""Processes are killed and cables cut: the others end in a sentence, and the run goes on to the same weights."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cli.cable import ADDRESSES, INTERFACE, Cable
from cli.conftest import ROOT, SMALL, Result, finish, start
from cli.test_two_processes import free_port, two_processes

FLAGS = [
    "--max-update", 200, "--save-interval-updates", 20, "--disable-validation", "--dropout", 0.2, "--log-interval",
    1000,
]  # fmt: skip
SECONDS = 12
"""That processes of two machines wait for each other."""


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    two_processes(data, folder, *FLAGS)
    return folder


def assert_same_weights(whole: Path, other: Path) -> None:
    states = [torch.load(folder / "checkpoint_last.pt", weights_only=True) for folder in (whole, other)]
    assert [state["optimizer_history"][-1]["num_updates"] for state in states] == [200, 200]
    for name, value in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], value), name


def sentences(result: Result) -> list[str]:
    return re.findall(r"fairseq-rkm: error: (.*)", result.output)


def wait_for(path: Path, *processes: subprocess.Popen) -> None:
    while not path.exists():
        assert all(process.poll() is None for process in processes), [finish(one).output[-3000:] for one in processes]
        time.sleep(0.05)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_in_root(command: list, environment: dict) -> subprocess.Popen:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


SRUN = """#!/bin/sh
shift
for node in 0 1; do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_STEP_NUM_TASKS=2 "$@" &
  started="$started $!"
done
for one in $started; do wait $one || status=1; done
exit ${status:-0}
"""
"""Runs a command once for each of two machines. It stands for SLURM's."""


def test_a_slurm_job_starts_all_processes_again_after_one_was_killed(data, tmp_path, whole):
    for name, code in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho localhost\necho other\n")):
        (tmp_path / name).write_text(code)
        (tmp_path / name).chmod(0o700)
    slurm = {"JOB_ID": 7, "JOB_NODELIST": "localhost,other", "JOB_NUM_NODES": 2}
    environment = {**ENVIRONMENT, **{f"SLURM_{name}": str(value) for name, value in slurm.items()}}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable, "RESTARTS": "1"}
    environment |= {"PROCESSES": "1", "MASTER_PORT": str(free_port())}
    job = ROOT / "examples/language_model/train.sbatch"
    process = run_in_root(["bash", job, data, tmp_path / "run", *SMALL, *FLAGS], environment)
    wait_for(tmp_path / "run/checkpoint_1_20.pt", process)
    os.kill(rank(1, tmp_path), signal.SIGKILL)
    result = finish(process)
    assert result.status == 0, result.output[-5000:]
    assert "failed (exitcode: -9)" in result.output
    assert "rank 0 lost rank 1 (" in result.output
    assert "Loaded checkpoint" in result.output
    assert_same_weights(whole, tmp_path / "run")


def rank(number: int, folder: Path) -> int:
    """The process number of a rank whose --save-dir is this folder."""
    for process in Path("/proc").iterdir():
        try:
            command, environment = (process / name for name in ("cmdline", "environ"))
            if str(folder) in command.read_text() and f"RANK={number}" in environment.read_text().split("\0"):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {number}")


STOPS = """
import io, pathlib, time, torch
import fairseq_rkm
fairseq_rkm.register()
save = torch.save

def stop_in_the_middle(state, file):
    if isinstance(file, io.BytesIO) or state["optimizer_history"][-1]["num_updates"] < STOP:
        save(state, file)
        return
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    (pathlib.Path(FOLDER) / f"writing{STOP}").touch()
    time.sleep(1000)

torch.save = stop_in_the_middle
"""


def test_processes_killed_while_a_checkpoint_is_written_lose_nothing_that_was_written_before(data, tmp_path, whole):
    """First the one that writes is killed, and the other ends in a sentence; then both."""
    run = tmp_path / "run"
    for stop, killed in ((60, [0]), (120, [0, 1])):
        plugin = tmp_path / f"plugin{stop}"
        plugin.mkdir()
        code = STOPS.replace("FOLDER", repr(str(tmp_path))).replace("STOP", str(stop))
        (plugin / "__init__.py").write_text(code)
        ranks = ranks_of(data, run, "--user-dir", plugin)
        wait_for(tmp_path / f"writing{stop}", *ranks)
        for number in killed:
            ranks[number].kill()
        results = [finish(process) for process in ranks]
        assert [result.status for result in results] == ([-9, 1] if killed == [0] else [-9, -9])
        if killed == [0]:
            (sentence,) = sentences(results[1])
            assert sentence.startswith("rank 1 lost rank 0 (")
        left = torch.load(run / "checkpoint_last.pt", weights_only=True)
        assert left["optimizer_history"][-1]["num_updates"] == stop - 20
        assert list(run.glob("*.tmp"))
    for result in map(finish, ranks_of(data, run)):
        assert result.status == 0, result.output[-5000:]
    assert not list(run.glob("*.tmp"))
    assert_same_weights(whole, run)


def ranks_of(data: Path, run: Path, *flags: object) -> list[subprocess.Popen]:
    place = ["--distributed-world-size", 2, "--distributed-init-method", f"tcp://localhost:{free_port()}"]
    common = [*SMALL, *FLAGS, *place, "--save-dir", run, *flags]
    return [start("train", data, *common, "--distributed-rank", number) for number in (0, 1)]


@pytest.fixture
def cable():
    if shutil.which("ip") is None:
        pytest.skip("needs ip (apt-get install iproute2)")
    found = Cable()
    try:
        found.lay()
    except OSError as error:
        found.remove()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield found
    found.remove()


def test_a_cut_cable_ends_two_machines_and_the_run_goes_on_as_if_nothing_had_happened(data, tmp_path, whole, cable):
    """Each machine has a disk of its own."""
    folders = [tmp_path / f"machine{node}" for node in (0, 1)]
    flags = [*SMALL, *FLAGS, "--heartbeat-timeout", SECONDS]

    def machines() -> list[subprocess.Popen]:
        """By the command of docs/several_processes.md."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
        torchrun += ["--master-addr", ADDRESSES[0], "--master-port", 29500]
        training = ["-m", "fairseq_cli.train", data, *flags, "--save-dir"]
        environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": INTERFACE}
        commands = [[*cable.machines[n], *torchrun, "--node-rank", n, *training, folders[n]] for n in (0, 1)]
        return [run_in_root(command, environment) for command in commands]

    both = machines()
    wait_for(folders[0] / "checkpoint_1_20.pt", *both)
    cable.cut()
    for number, result in enumerate(map(finish, both)):
        assert result.status == 1
        (sentence,) = sentences(result)
        assert sentence.startswith(f"rank {number} lost rank {1 - number} (")
        assert f"within {SECONDS} seconds (--heartbeat-timeout)" in sentence
    assert not (folders[1] / "checkpoint_last.pt").exists()
    cable.connect()
    for result in map(finish, machines()):
        assert result.status == 0, result.output[-5000:]
    assert_same_weights(whole, folders[0])
