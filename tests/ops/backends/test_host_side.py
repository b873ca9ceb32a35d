"""What ``blockwise`` and ``persistent`` do on the host, on a CPU: a stand-in takes the place of their kernels.

It reads its arguments by the names in the kernel's own source, and computes in PyTorch what the kernel computes.
"""

import ctypes
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, forward_and_gradients, join_scales, random_mask, randomized

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.ops import dispatch
from fairseq_rkm.ops.backends.blockwise import blockwise
from fairseq_rkm.ops.backends.persistent import launch, persistent, plan
from fairseq_rkm.ops.cells import cell_of_key
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.gate_layout import gate_slices, recurrent_slice

FEEDBACK = [name for name, cell in CELLS.items() if cell.has_feedback]
OTHER_NAMES = {"weights": "recurrent", "hidden": "hiddens", "memory": "memories", "last_grad_hidden": "grad_hidden"}
OTHER_NAMES |= {"last_grad_memory": "grad_memory"}
OF_FIRST = {"blockwise_backward": ("first_grad_hidden", "first_grad_memory")}
OF_FIRST |= {"recurrence_backward": ("grad_hidden", "grad_memory")}


class StandIn:
    """A compiled kernel that runs on tensors of a CPU."""

    def __init__(self, source, name, cell):
        text = re.search(rf"{name}\((.*?)\) \{{", re.sub("//.*", "", source.read_text()), re.DOTALL).group(1)
        self.parameters = [re.search(r"(\w+)\W*$", parameter).group(1) for parameter in text.split(",")]
        self.types = [re.search(r"Stored|float|u8|u32|int|long", parameter).group() for parameter in text.split(",")]
        self.name, self.cell, self.launches = name, cell, 0

    def launch(self, _blocks, _threads, *arguments):
        assert len(arguments) == len(self.parameters)
        own = dict(zip(self.parameters, arguments, strict=True))
        for kind, value in zip(self.types, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                assert value.is_contiguous()
                wanted = {"Stored": own["gates"].dtype, "float": torch.float32, "u8": torch.uint8, "u32": torch.int32}
                assert value.dtype == wanted[kind]
        first = {name: own.pop(name) for name in OF_FIRST.get(self.name, ())}
        own = {OTHER_NAMES.get(name, name): value for name, value in own.items()}
        if "workspace" in own:
            assert own["workspace"].eq(-1).all()
        steps, batch, _ = own["gates"].shape
        assert (own["steps"], own["batch"]) == (steps, batch)
        if own.get("first", 0) == 0:  # further launches for more rows of the batch: the first has done them all
            run = _backward if first else _forward
            run(self.cell, SimpleNamespace(**own), *(_at(address, own["memories"][0]) for address in first.values()))
        self.launches += 1


def _at(address, like):
    """A float32 tensor over the memory at an address, of the shape of another."""
    flat = torch.frombuffer((ctypes.c_float * like.numel()).from_address(address), dtype=torch.float32)
    return flat.view(like.shape)


def _factors(cell, gates, own, size):
    """``i``, ``f`` and ``o`` of a step's activated gates."""
    of = {gate: gates[:, block] for gate, block in gate_slices(cell, size).items()}
    forget = of["forget"] if cell.forget_is_gate else own.scale_f
    complement = 1 - forget if cell.input_is_complement else own.scale_i
    return of["input"] if cell.input_is_gate else complement, forget, of.get("output", torch.ones(()))


def _forward(cell, own):
    size = own.last_memory.size(1)
    shape = own.last_memory.shape
    h = torch.zeros(shape) if own.first_hidden is None else own.first_hidden
    c = torch.zeros(shape) if own.first_memory is None else own.first_memory
    own.hiddens[0], own.memories[0] = h, c
    for t, gates in enumerate(own.gates):
        if own.bias is not None:
            own.gates[t] += own.bias
        gates[:, recurrent_slice(cell, size)] += h @ own.recurrent.t()
        gates[:, size:] = gates[:, size:].sigmoid()
        if cell.squash_candidate:
            gates[:, :size] = gates[:, :size].tanh()
        i, f, o = _factors(cell, gates, own, size)
        new_c = i * gates[:, :size] + f * c
        new_c = new_c if cell.clip is None else new_c.clamp(-cell.clip, cell.clip)
        new_h = (new_c.tanh() if cell.squash_output else new_c) * o
        real = torch.tensor(True) if own.keep is None else own.keep[t].bool().unsqueeze(1)
        h, c = torch.where(real, new_h, h), torch.where(real, new_c, c)
        own.hiddens[t + 1], own.memories[t + 1] = h, c
    own.last_hidden[:], own.last_memory[:] = h, c


def _backward(cell, own, first_hidden, first_memory):
    size = first_memory.size(1)
    to_h = torch.zeros(first_memory.shape) if own.grad_hidden is None else own.grad_hidden
    to_c = torch.zeros(first_memory.shape) if own.grad_memory is None else own.grad_memory
    shares = torch.zeros(2, *first_memory.shape)
    for t in reversed(range(own.steps)):
        gates, before, now = own.gates[t], own.memories[t], own.memories[t + 1]
        real = torch.tensor(True) if own.keep is None else own.keep[t].bool().unsqueeze(1)
        (i, f, o), candidate = _factors(cell, gates, own, size), gates[:, :size]
        given = to_h + (0 if own.grad_output is None else own.grad_output[t])
        q = now.tanh() if cell.squash_output else now
        raw = to_c + given * o * (1 - q * q if cell.squash_output else 1)
        raw = raw if cell.clip is None else torch.where(now.abs() < cell.clip, raw, 0)
        grads = {"candidate": raw * i * (1 - candidate**2 if cell.squash_candidate else 1)}
        grads["input"] = raw * candidate * i * (1 - i)
        grads["forget"] = raw * (before - (candidate if cell.input_is_complement else 0)) * f * (1 - f)
        grads["output"] = given * q * o * (1 - o)
        for gate, block in gate_slices(cell, size).items():
            own.grad_gates[t][:, block] = torch.where(real, grads[gate], 0)
        shares += torch.where(real, torch.stack([raw * candidate, raw * before]), 0)
        to_c = torch.where(real, raw * f, to_c)
        through = own.grad_gates[t][:, recurrent_slice(cell, size)] @ own.recurrent
        to_h = torch.where(real, through, to_h)
    first_hidden[:], first_memory[:] = to_h, to_c
    for name, share in zip(("grad_scale_i", "grad_scale_f"), shares, strict=True):
        if getattr(own, name, None) is not None:
            getattr(own, name)[:] = share


@pytest.fixture
def kernels(monkeypatch):
    """A machine that seems to have a GPU; the kernels that were compiled for it."""
    made = []
    cells = []

    def compile_kernel(source, name, *_arguments, **_options):
        made.append(StandIn(source, name, cells[-1]))
        return made[-1]

    properties = SimpleNamespace(multi_processor_count=16, shared_memory_per_block_optin=99_000, major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    caches = (blockwise._prepare, blockwise._kernel, blockwise._room, blockwise._rows_for, launch.prepare)
    caches += (plan.plan_for, plan._room)
    for cache in caches:
        cache.cache_clear()
    rows = {
        name: replace(dispatch.BACKENDS[name], refuses=lambda cell, *_: cells.append(cell))
        for name in ("blockwise", "persistent")
    }
    monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, **rows})
    monkeypatch.setattr(dispatch, "_PROVEN", {})
    yield made
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["blockwise", "persistent"])
@pytest.mark.parametrize("cell", FEEDBACK)
def test_outputs_states_and_gradients(backend, cell, kernels):
    for mask, options in (("none", {}), ("mixed", {"ngram": 2, "learn_sigma": True}), ("none", {"bias": False})):
        for batch in (3, 40):
            rkm = randomized(RKM(6, 9, cell=cell, backend=backend, **options))
            exact = RKM(6, 9, cell=cell, backend="reference", dtype=torch.float64, **options)
            exact.load_state_dict(rkm.state_dict())
            given = torch.randn(5, batch, 6), torch.randn(1, batch, 9), torch.randn(1, batch, 9)
            context = [torch.randn(1, batch, 6)] if options.get("ngram") else None
            padding = random_mask(mask, batch, 5)
            runs = []
            for layer in (rkm, exact):
                numbers = [tensor.to(layer.weight_ih_l0.dtype) for tensor in given]
                before = None if context is None else [c.to(layer.weight_ih_l0.dtype) for c in context]
                runs.append(join_scales(forward_and_gradients(layer, *numbers, before, padding)))
            for name, result in runs[0].items():
                assert_close(result, runs[1][name], f"{name}, {mask}, {options}, {batch}")
    assert {kernel.name.split("_")[1] for kernel in kernels} == {"forward", "backward"}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["blockwise", "persistent"])
def test_plain_calls_and_operators_give_the_same_bits(backend):
    passes = {"blockwise": blockwise, "persistent": persistent}[backend].PASSES
    rkm = randomized(RKM(8, 8, backend=backend))
    x, grads = torch.randn(5, 3, 8, requires_grad=True), (torch.randn(5, 3, 8), None, torch.randn(3, 8))
    output, state = rkm(x)
    torch.autograd.backward([output, state.cell], [grads[0], grads[2].unsqueeze(0)])
    weights = dispatch.Weights(*(p.detach() for p in (rkm.weight_ih_l0, rkm.weight_hh_l0, rkm.bias_l0)))
    cell = cell_of_key(rkm._cell.key)
    own = passes.forward(cell, x.detach(), weights, None, None, None)
    assert torch.equal(own.output, output)
    saved = persistent.Saved(cell, None, x.detach(), None, None, weights, own.own)
    needs = (True, False, False, True, True, True, *(False,) * 6)
    found = passes.backward(saved, grads, needs)
    wanted = (x.grad, None, None, rkm.weight_ih_l0.grad, rkm.weight_hh_l0.grad, rkm.bias_l0.grad, *(None,) * 6)
    for given, expected in zip(found, wanted, strict=True):
        assert given is expected is None or torch.equal(given, expected)
