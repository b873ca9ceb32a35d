import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches import meetings
from fairseq_rkm.fairseq_patches.meetings import Meeting, here, lost_process, meet

fairseq_rkm.register()


@pytest.fixture(autouse=True)
def _no_meeting(monkeypatch):
    monkeypatch.setattr(meetings, "current", [])
    monkeypatch.setattr(meetings, "ANSWER", 0.3)


def listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("localhost", 0))
    listener.listen()
    return listener


def free_port() -> int:
    with listening() as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_named(rank):
    cfg = OmegaConf.structured(FairseqConfig)
    cfg.common.cpu = True
    cfg.distributed_training.distributed_world_size = 2
    cfg.distributed_training.distributed_rank = rank
    cfg.distributed_training.heartbeat_timeout = 1
    cfg.distributed_training.distributed_init_method = f"tcp://localhost:{free_port()}"
    wanted = "rank 1 of 2 did not come .* within 1 seconds" if rank == 0 else "rank 1 did not find rank 0 within 1 sec"
    with pytest.raises(RKMError, match=wanted):
        distributed_utils.distributed_init(cfg)
    assert not dist.is_initialized()


def test_a_place_that_does_not_answer_is_waited_for_in_vain_and_not_for_ever():
    with listening() as listener:
        place = f"tcp://localhost:{listener.getsockname()[1]}"
        with pytest.raises(RKMError, match=f"rank 0 of 2 did not come to {place} within 1 seconds"):
            meet(place, 1, 2, 1)


@pytest.fixture
def torchrun_store(monkeypatch):
    """The store that torchrun keeps for all starts of a run."""
    port = free_port()
    store = dist.TCPStore("localhost", port, 2, True, timedelta(seconds=10), wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    return store


def test_processes_that_torchrun_starts_again_meet_each_other_and_not_the_ended_ones(torchrun_store):
    with ThreadPoolExecutor(3) as threads:
        first = [threads.submit(meet, "env://", rank, 3, 10) for rank in range(3)]
        first = [one.result() for one in first]
        first[1].store.set("lost1", "1")
        early = [threads.submit(meet, "env://", rank, 3, 10) for rank in (1, 2)]
        assert first[0].homes == first[1].homes == first[2].homes
        # The others have come again, and answer the old call until rank 0 comes.
        while torchrun_store.get(f"{torchrun_store.get('call').decode()}/answer2").decode() == home(first[0], 2):
            pass
        assert not any(one.done() for one in early)
        again = [meet("env://", 0, 3, 10), *(one.result() for one in early)]
    assert again[0].homes == again[1].homes == again[2].homes
    assert not set(again[0].homes) & set(first[0].homes)
    again[0].store.set("here", "1")
    assert again[2].store.get("here") == b"1"  # it waits: a set returns before the store has it
    assert not again[2].store.check(["lost1"])


def home(meeting: Meeting, rank: int) -> str:
    return json.dumps(vars(meeting.homes[rank]))


def test_who_does_not_come_again_is_named(torchrun_store):
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda rank: meet("env://", rank, 2, 10), range(2)))
    with pytest.raises(RKMError, match="rank 1 of 2 did not come to env:// within 1 seconds, for which rank 0 waited"):
        meet("env://", 0, 2, 1)
    with pytest.raises(RKMError, match="rank 0 of 2 did not come to env:// within 1 seconds, for which rank 1 waited"):
        meet("env://", 1, 2, 1)


def test_processes_that_cannot_connect_are_told_of_the_interface(monkeypatch):
    """As where the name of a machine is its loopback's: the processes meet, and gloo then finds nobody."""
    meeting = Meeting(dist.HashStore(), 0, [here(), replace(here(), host="elsewhere", machine="another")], 5)
    monkeypatch.setattr(meetings, "meet", lambda *_: meeting)

    def refuse(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting: Connection refused\nat C++")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    cfg = OmegaConf.structured(FairseqConfig)
    with pytest.raises(RKMError, match=r"rank 0 met all 2 .*on 2 machines, .* refused\. .*GLOO_SOCKET_IFNAME"):
        distributed_utils.distributed_init(cfg)


@pytest.fixture
def meeting(monkeypatch):
    """Of rank 1 of 4: rank 2 has ended, and rank 3 is on another machine of the same name."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    home = here()
    homes = [replace(home, process=os.getppid()), home, replace(home, process=ended.pid)]
    homes.append(replace(home, process=ended.pid, machine="another"))
    found = Meeting(dist.HashStore(), 1, homes, 7)
    meetings.current.append(found)
    return found


def test_who_has_ended_is_named(meeting):
    sentence = lost_process(RuntimeError("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:4"))
    assert sentence.startswith(f"rank 1 lost rank 2 ({meeting.homes[2]}), which has ended or did not answer. See")
    assert meetings.unreachable(meeting, RuntimeError("Connection refused")).startswith("rank 1 lost rank 2")


def test_who_does_not_answer_is_named(meeting):
    meeting.homes[2] = meeting.homes[0]
    threading.Timer(0.1, lambda: [meeting.store.set(f"lost{rank}", "1") for rank in (0, 2)]).start()
    sentence = lost_process(RuntimeError("Timed out waiting 7000ms for recv operation to complete"))
    assert f"rank 1 lost rank 3 ({meeting.homes[3]})" in sentence
    assert "within 7 seconds (--heartbeat-timeout)" in sentence


def test_a_store_that_no_longer_answers_is_rank_0_s(meeting):
    """As behind a cut cable."""
    meeting.homes[2] = meeting.homes[0]

    class Silent:
        def set_timeout(self, _):
            threading.Event().wait()

    meeting.store = Silent()
    assert "rank 1 lost rank 0" in lost_process(RuntimeError("Timed out waiting 7000ms for recv operation"))


def test_other_errors_are_no_lost_process(meeting):
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_process(ValueError("Connection closed by peer")) is None
    meetings.current.clear()
    assert lost_process(RuntimeError("size mismatch")) is None
