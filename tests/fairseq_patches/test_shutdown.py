import subprocess
import sys

import pytest


def test_a_process_ends_well_while_batches_are_prepared():
    """Without the repair it is aborted (status 134): the thread is in PyTorch nearly all of the time."""
    code = """
import torch, fairseq_rkm; fairseq_rkm.register()
from fairseq.data.iterators import BufferedIterator
class Endless:
    def __len__(self):
        return 10**9
    def __iter__(self):
        while True:
            yield torch.randn(300, 300) @ torch.randn(300, 300)
next(BufferedIterator(10**6, Endless()))
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


@pytest.mark.parametrize("name", ["gloo", "fake"])
def test_gloo_s_groups_are_left_before_python_ends(tmp_path, name):
    code = f"""
import atexit
import torch.distributed as distributed
from torch.testing._internal.distributed import fake_pg
atexit.register(lambda: print("in a group:", distributed.is_initialized()))  # runs after what is registered later
import fairseq_rkm
fairseq_rkm.register()
store = distributed.FileStore({str(tmp_path / "store")!r}, 1)
distributed.init_process_group({name!r}, store=store, rank=0, world_size=1)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"in a group: {name != 'gloo'}"
