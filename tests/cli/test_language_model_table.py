"""examples/language_model/table.py, small, on a CPU."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.conftest import ROOT

TINY = [
    "common.cpu=true", "+model.decoder_embed_dim=8", "+model.decoder_hidden_size=12", "dataset.batch_size=4",
    "dataset.batch_size_valid=2", "optimization.max_update=6", "lr_scheduler.warmup_updates=1", "common.log_interval=1",
]  # fmt: skip


def command_line(*arguments):
    return [sys.executable, str(ROOT / "examples/language_model/table.py"), *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def table(*arguments):
    return subprocess.run(command_line(*arguments), env=environment(), capture_output=True, text=True, check=False)


def running(text):
    """The command lines of running processes that hold a text, by the processes' numbers."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended in between
            lines[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return {number: line for number, line in lines.items() if str(text) in line}


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@pytest.fixture
def interruptible():
    """What is started in the background ignores SIGINT; if these tests are, what they start is not to."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("command", ["train.sh", "fairseq-hydra-train"])
@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_a_table_that_is_told_to_end_leaves_nothing_running(data, tmp_path, command, told):
    flags = [f"ptb_fast={data}", "--out", tmp_path, "--cells", "lstm", "--", *TINY, "optimization.max_update=100000"]
    process = subprocess.Popen(
        command_line(*flags), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        wait_until(lambda: any(f"/{command} " in line for line in running(tmp_path).values()))
        process.send_signal(told)
        assert process.wait(60) != 0
        wait_until(lambda: not running(tmp_path))
    finally:
        for number in running(tmp_path):
            os.kill(number, signal.SIGKILL)


def test_a_table_is_stopped_and_goes_on_until_all_its_runs_are_done(data, tmp_path):
    rows = {
        "": "none",
        "shuffle+overlap_3+past_decode_0.01+skip+state_dropout_0.3-": (
            "shuffle+overlap=3+past_decode=0.01+skip+state_dropout=0.3"
        ),
    }
    common = [f"ptb_fast={data}", "--out", tmp_path, "--cells", "rkm_lstm", "--parts", *rows.values(), "--jobs", 2]
    stopped = table(*common, "--minutes", 0.01, "--", *TINY)
    assert "out of time, 2 not done" in stopped.stdout, stopped.stderr
    whole = table(*common, "--", *TINY)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    variants = []
    for parts in rows:
        name = f"ptb_fast-rkm_lstm-{parts}1"
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert (run["cell"], run["seed"], run["updates"]) == ("rkm_lstm", 1, 6)
        assert f"{name}: valid {run['valid_perplexity']}, test {run['test_perplexity']}" in whole.stdout
        assert f"{run['valid_perplexity']:10.2f}  {name.removesuffix('-1')}" in whole.stdout
        variants.append(run["variant"])
    assert variants[0] == "memory clip 1, partial shuffle"
    assert variants[1] == (
        "memory clip 1, partial shuffle, overlap 3, past decode 0.01, skip connections, state dropout 0.3"
    )
    assert "2 of 2 runs are done" in table(*common, "--", *TINY).stdout


def test_what_is_missing_is_said_before_any_run(data, tmp_path):
    for corpus, message in (
        ("ptb_quick=x", "no configuration ptb_quick"),
        (f"ptb_fast={tmp_path}/none", "no data for ptb_fast in"),
        ("ptb_fast", "give CONFIG=DATA"),
    ):
        result = table(corpus, "--out", tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
    wrong = table(f"ptb_fast={data}", "--out", tmp_path, "--parts", "shufle")
    assert "unknown part 'shufle': there are none, past_decode, shuffle" in wrong.stderr
    assert "--length must be above 0, not 0.0" in table(f"ptb_fast={data}", "--out", tmp_path, "--length", 0).stderr
    assert "invalid choice: 'gru'" in table(f"ptb_fast={data}", "--out", tmp_path, "--cells", "gru").stderr


def test_a_run_that_fails_is_named(data, tmp_path):
    result = table(f"ptb_fast={data}", "--out", tmp_path, "--cells", "ran", "--", *TINY, "optimizer.adam_eps=-1")
    assert result.returncode == 1
    assert "failed: ptb_fast-ran-1 (see" in result.stderr
