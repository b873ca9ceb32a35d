import signal
import subprocess
import sys

import pytest

COMMAND = """
import logging, multiprocessing, signal, sys, time
# A shell's background jobs ignore it, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.disable()
sys.argv[0] = "fairseq-train"
import fairseq_rkm; fairseq_rkm.register()
from fairseq_rkm.fairseq_patches import checkpoint_writing, interruptions
interruptions.GRACE = 0.5
checkpoint_writing.training_folders.append({folder!r})
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
worker.start()
print("ready", flush=True)
{work}
"""

WORKS = {
    "python": "time.sleep(60)",
    # As gloo's functions, which wait without letting Python's handlers run.
    "waiting": "import torch; torch.distributed.HashStore().wait(['nothing'])",
    "failing": "try:\n    time.sleep(60)\nfinally:\n    raise RuntimeError('while it ends')",
}


@pytest.mark.parametrize(
    ("work", "number"), [("python", signal.SIGINT), ("waiting", signal.SIGTERM), ("failing", signal.SIGTERM)]
)
def test_a_command_that_is_told_to_stop_says_so_in_a_sentence(tmp_path, work, number):
    (tmp_path / "checkpoint_last.pt").write_text("")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", COMMAND.format(folder=str(tmp_path), work=WORKS[work])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while process.stdout.readline() not in ("ready\n", ""):
        pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    last = f"{tmp_path}/checkpoint_last.pt"
    assert errors == (
        f"fairseq-rkm: error: stopped by {number.name}. {last} is whole: the same command goes on from it\n"
    )
    assert process.returncode == 128 + number
