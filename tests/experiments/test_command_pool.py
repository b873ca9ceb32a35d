import itertools
import signal
import socket
import subprocess
import sys
import time

import pytest

from fairseq_rkm.experiments import command_pool
from fairseq_rkm.experiments.command_pool import free_ports, run_commands

CHILD = "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); "


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def ended(pid: int) -> bool:
    """Whether a process ends within ten seconds; one that nobody asked for its status has."""
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def run(commands, tmp_path, jobs=2, seconds=30.0):
    ends = {}
    run_commands(commands, tmp_path, jobs, seconds, ends.__setitem__)
    return ends


def test_commands_end_with_their_status_and_output(tmp_path):
    commands = [script(f"import sys; print({i}); sys.exit('e{i}' if {i} % 2 else 0)") for i in range(5)]
    ends = run(commands, tmp_path)
    assert {number: end[:2] for number, end in ends.items()} == {
        i: (i % 2, f"{i}\ne{i}\n" if i % 2 else f"{i}\n") for i in range(5)
    }


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_run_at_a_time(tmp_path, jobs):
    marks = tmp_path / "marks"
    marks.mkdir()
    text = (
        f"import os, time; path = '{marks}/' + str(os.getpid()); open(path, 'w').close(); time.sleep(0.3); "
        f"print(len(os.listdir('{marks}'))); os.remove(path)"
    )
    ends = run([script(text)] * 4, tmp_path, jobs)
    assert max(int(end.output) for end in ends.values()) == jobs


def test_no_process_outlives_the_time_limit_or_its_command(tmp_path):
    ends = run([script(CHILD + "child.wait()"), script(CHILD)], tmp_path, seconds=3)
    assert [ends[i].status for i in range(2)] == [None, 0]
    assert ends[0].seconds >= 3
    assert all(ended(int(end.output)) for end in ends.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all(tmp_path, number):
    text = f"""
import signal
import sys
from pathlib import Path
from fairseq_rkm.experiments.command_pool import run_commands
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets commands in the background ignore it
run_commands([[sys.executable, "-c", {CHILD + "child.wait()"!r}]] * 3, Path({str(tmp_path)!r}), 2, 60, print)
"""
    pool = subprocess.Popen(script(text), stderr=subprocess.DEVNULL)
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    while not all(file.exists() and file.read_text() for file in files[:2]):
        time.sleep(0.05)
    pool.send_signal(number)
    assert pool.wait() != 0
    assert all(ended(int(file.read_text())) for file in files[:2])
    assert not files[2].exists()


def test_ports_are_free_different_and_not_those_of_connections(monkeypatch):
    with socket.socket() as listener:
        monkeypatch.setattr(command_pool.random, "randrange", lambda _: 0)
        taken = next(free_ports())
        listener.bind(("", taken))
        ports = list(itertools.islice(free_ports(), 20))
    assert taken not in ports
    assert len(set(ports)) == 20
    assert all(command_pool.FIRST_PORT <= port < command_pool.CONNECTIONS for port in ports)
