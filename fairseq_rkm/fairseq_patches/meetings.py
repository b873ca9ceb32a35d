"""The processes of a run meet in a store of torch.distributed. There each finds out later who no longer answers."""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch.distributed as dist

from fairseq_rkm.errors import RKMError, first_line

Result = TypeVar("Result")

TIMEOUT = 600
"""Seconds (ten minutes) that processes wait for each other, unless ``--heartbeat-timeout`` gives another number."""

ANSWER = 3.0
"""Seconds that a process which lost another waits for the rest to answer, or for the store."""

AGAIN = "start the same command again in all processes: it goes on from the last checkpoint"

LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out|timed out|timeout|gloo|NCCL|ncclRemoteError|TCPStore|"
    r"socket"
)
"""Words of torch.distributed in errors of a process that cannot be reached."""


@dataclass(frozen=True)
class Home:
    """Where a process runs.

    Attributes:
        host: the name of its machine.
        process: its number there.
        machine: the machine's running system and its table of processes. Names of machines are not always unlike.
        arrival: other at each start of a process.
    """

    host: str
    process: int
    machine: str
    arrival: str

    def __str__(self) -> str:
        return f"{self.host}:{self.process}"


def here() -> Home:
    """Return this process's home, with a new arrival."""
    parts = []
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as boot:
        parts.append(boot.read().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return Home(socket.gethostname(), os.getpid(), " ".join([socket.gethostname(), *parts]), uuid.uuid4().hex)


@dataclass
class Meeting:
    """A meeting of all of a run's processes.

    Attributes:
        store: the store of torch.distributed, to which all processes write; of this meeting alone.
        rank: this process's rank.
        homes: of each process, by rank.
        seconds: how long processes wait for each other.
    """

    store: Any
    rank: int
    homes: list[Home]
    seconds: int


current: list[Meeting] = []
"""The meeting of this process's run. Empty before."""


def meet(method: str, rank: int, size: int, seconds: int) -> Meeting:
    """Wait until all processes have come to one place, and return their meeting.

    Args:
        method: the place: ``tcp://HOST:PORT``, ``env://`` or ``file://PATH``.
        rank: of this process.
        size: how many processes there are.
        seconds: how long to wait.

    Raises:
        RKMError: a process did not come in time, or the place cannot be reached.
    """
    end = time.monotonic() + seconds

    def come() -> Meeting:
        return _call_roll(_open_store(method, rank, size, seconds), method, rank, size, seconds, end)

    try:
        # A store behind a cut cable never answers, and torch does not limit the time.
        meeting = within(seconds + ANSWER, come)
    except TimeoutError:
        raise RKMError(_absent([0], method, rank, size, seconds)) from None
    current[:] = [meeting]
    return meeting


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return a function's result.

    Args:
        seconds: how long to wait for it.
        function: runs in a thread of its own, which is left to itself if it takes longer.

    Raises:
        TimeoutError: it took longer.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 raised again, in the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=seconds)


def _open_store(method: str, rank: int, size: int, seconds: int) -> Any:
    """Open the store at a meeting place.

    Raises:
        RKMError: the place cannot be reached in time.
    """
    time_allowed = timedelta(seconds=seconds)
    try:
        place = _place(method)
        if place is None:
            return next(dist.rendezvous(method, rank, size, timeout=time_allowed))[0]
        keeps = rank == 0 and not _kept_by_torchrun(method)
        if not keeps:
            _await_listener(*place, seconds)
        return dist.TCPStore(*place, size, keeps, time_allowed, wait_for_workers=False)
    except (RuntimeError, ValueError, OSError) as error:
        what = "cannot listen" if rank == 0 else f"did not find rank 0 within {seconds} seconds (--heartbeat-timeout)"
        raise RKMError(
            f"rank {rank} {what} at {method}: {first_line(error)}: start a process for each rank, all with the same "
            "address, of rank 0's machine, and a port that is free there"
        ) from error


def _place(method: str) -> tuple[str, int] | None:
    """Return the host and port of a meeting place; None if it is a file."""
    url = urlsplit(method)
    if url.scheme == "env":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if url.scheme == "tcp" and url.port:
        return url.hostname or "localhost", url.port
    return None


def _kept_by_torchrun(method: str) -> bool:
    """Return whether torchrun keeps the store, in place of rank 0."""
    return method.startswith("env:") and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _await_listener(host: str, port: int, seconds: float) -> None:
    """Return once somebody listens. torch's own waiting prints stack traces of C++.

    Raises:
        OSError: nobody listened within ``seconds``.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _call_roll(store: Any, method: str, rank: int, size: int, seconds: int, end: float) -> Meeting:
    """Return the meeting that all processes are in.

    Rank 0 calls, all others answer the call, and rank 0 writes the roll of all answers. torchrun keeps one store for
    all starts of a run, and a file keeps what was written: answers to an earlier call count for nothing, and a process
    that was started again waits for a roll with its own arrival.

    Raises:
        RKMError: a process did not come until ``end``.
    """
    own = json.dumps(asdict(here()))
    call = _write_roll(store, own, size, end) if rank == 0 else _answer(store, own, rank, end)
    if call.roll is None:
        missing = [other for other in range(size) if other != rank and not call.has_answered(other)]
        raise RKMError(_absent(missing or [0], method, rank, size, seconds))
    return Meeting(call.store, rank, [Home(**json.loads(home)) for home in call.roll], seconds)


@dataclass
class _Call:
    """One call of rank 0: a part of the store by itself, and the roll if it is complete. No store if none came."""

    store: Any = None
    roll: list[str] | None = None

    def has_answered(self, rank: int) -> bool:
        return self.store is not None and self.store.check([f"answer{rank}"])


def _write_roll(store: Any, own: str, size: int, end: float) -> _Call:
    name = uuid.uuid4().hex
    call = _Call(dist.PrefixStore(name, store))
    call.store.set("answer0", own)
    store.set("call", name)
    if not _missing(call.store, "answer", list(range(size)), end):
        call.roll = [call.store.get(f"answer{rank}").decode() for rank in range(size)]
        call.store.set("roll", json.dumps(call.roll))
    return call


def _answer(store: Any, own: str, rank: int, end: float) -> _Call:
    call, heard = _Call(), None
    while time.monotonic() < end:
        name = store.get("call").decode() if store.check(["call"]) else None
        if name is not None and name != heard:
            call, heard = _Call(dist.PrefixStore(name, store)), name
            call.store.set(f"answer{rank}", own)
        if heard is not None and call.store.check(["roll"]):
            roll = json.loads(call.store.get("roll"))
            if roll[rank] == own:
                call.roll = roll
                break
        time.sleep(0.1)
    return call


def _missing(store: Any, key: str, ranks: list[int], end: float) -> list[int]:
    """Return the ranks that have not written ``key`` with their number to the store until ``end``."""
    # Poll: torch's own waiting prints warnings of C++.
    while missing := [rank for rank in ranks if not store.check([f"{key}{rank}"])]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return missing


def _absent(missing: list[int], method: str, rank: int, size: int, seconds: float) -> str:
    return (
        f"{_ranks(missing)} of {size} did not come to {method} within {seconds} seconds, for which rank {rank} "
        "waited (--heartbeat-timeout): start a process for each rank, all with the same address and world size"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def unreachable(meeting: Meeting, error: BaseException) -> str:
    """Return a sentence for processes that have met and cannot connect to each other."""
    ended = _ended(meeting)
    if ended:
        return _lost(meeting, ended, "")
    machines = len({home.machine for home in meeting.homes})
    return (
        f"rank {meeting.rank} met all {len(meeting.homes)} processes, on {machines} machine{'s' * (machines > 1)}, and "
        f"cannot connect to each of them: {first_line(error)}. If none of them has ended, let the machines reach each "
        "other on all ports, and name the network interface on each: export GLOO_SOCKET_IFNAME=eth0 on CPUs, "
        "NCCL_SOCKET_IFNAME=eth0 on GPUs"
    )


def lost_process(error: BaseException) -> str | None:
    """Return a sentence for an error that came of another process's end or silence; None for any other error."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError) or not LOST.search(str(error)):
        return None
    if not current:
        return f"rank {dist.get_rank()} lost another process. See the output of the others for the reason, then {AGAIN}"
    meeting = current[0]
    too_late = re.search("[Tt]imed out|timeout", str(error))
    late = f" within {meeting.seconds} seconds (--heartbeat-timeout)" if too_late else ""
    return _lost(meeting, _ended(meeting) or _silent(meeting), late)


def _lost(meeting: Meeting, gone: list[int], late: str) -> str:
    who = _ranks(gone) if gone else "another process"
    homes = "".join(f" ({meeting.homes[rank]})" for rank in gone[:1])
    return (
        f"rank {meeting.rank} lost {who}{homes}, which has ended or did not answer{late}. See the output of {who} for "
        f"the reason, then {AGAIN}"
    )


def _ended(meeting: Meeting) -> list[int]:
    """Return the ranks of this machine that have ended."""
    time.sleep(0.2)  # the end of one may be noticed before it is complete
    return [rank for rank in _others(meeting) if _has_ended(meeting.homes[rank])]


def _others(meeting: Meeting) -> list[int]:
    return [rank for rank in range(len(meeting.homes)) if rank != meeting.rank]


def _has_ended(home: Home) -> bool:
    """Return whether a process of this machine has ended; False for a process of another machine."""
    if home.machine != here().machine:
        return False
    # An ended process stays in the table, as a zombie, until its parent asks for its status.
    try:
        with open(f"/proc/{home.process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return os.path.isdir("/proc/self")


def _silent(meeting: Meeting) -> list[int]:
    """Return the ranks that do not report, as this one does, that they have lost another."""

    def ask() -> list[int]:
        with contextlib.suppress(RuntimeError):
            meeting.store.set_timeout(timedelta(seconds=ANSWER))
        meeting.store.set(f"lost{meeting.rank}", "1")
        return _missing(meeting.store, "lost", _others(meeting), time.monotonic() + ANSWER)

    try:
        return within(2 * ANSWER, ask)
    except (RuntimeError, TimeoutError):
        return [0]  # the store is kept by the process of rank 0, or on its machine
