"""The lines of "From nn.LSTM to RKM" run, and do as the page says."""

import re

import torch
from helpers import assert_close
from package_imports import ROOT

PAGE = (ROOT / "docs/from_lstm.md").read_text(encoding="utf-8")


def test_its_lines_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    switches = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    scope: dict = {}
    after = []
    for block in blocks:
        exec(block, scope)  # noqa: S102
        after.append(dict(scope))
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = switches
    assert len(blocks) == 13
    weights = next(values for values, block in zip(after, blocks, strict=True) if "load_state_dict" in block)
    x = torch.randn(5, 3, 200)
    lstm = weights["lstm"].eval()
    for module in (weights["same"], weights["back"], weights["rnn"]):
        assert_close(module.eval()(x)[0], lstm(x)[0])
    gates = next(values["rnn"] for values, block in zip(after, blocks, strict=True) if "gate_slice" in block)
    assert gates.cell == "lstm"
    forget = gates.bias_l0[gates.gate_slice("forget")]
    assert torch.equal(forget, torch.full((400,), 2.0))
    assert (gates.bias_l0 == 2).sum() == 400
    candidate = gates.weight_hh_l0[gates.gate_slice("candidate", recurrent=True)]
    assert_close(candidate @ candidate.t(), torch.eye(400))
    last = after[-1]
    assert last["x"].grad.isfinite().all()
    (alone,) = torch.autograd.grad(last["rnn"](last["x"][:, 4:5])[0].sum(), last["rnn"].bias_l0)
    assert_close(last["each"]["bias_l0"][4], alone)
    assert_close(last["outputs"][2], last["models"][2](last["x"])[0])
    assert last["Classifier"]()(torch.randn(2, 3, 200)).shape == (2, 2)


def test_all_differences_have_a_line():
    differences = re.search(r"\n## What differs\n(.*?)\n## ", PAGE, re.S)[1]
    for difference in re.split(r"\n\n\*\*", differences)[1:]:
        assert "```python" in difference or difference.startswith(("One bias", "Arguments by name")), difference
