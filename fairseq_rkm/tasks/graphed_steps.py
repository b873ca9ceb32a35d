"""Record a segment's forward and backward pass as a CUDA graph, once for each length, and replay it.

An update of a language model is some 200 launches. Each of them takes the host longer than the GPU. A graph is one
launch.

A graph is of one process. Several processes average their gradients after the passes, in a few large tensors that the
graphs write to (:mod:`fairseq_rkm.optim.gradient_buckets`). They do so with a graph and without. So each process may
record and replay by itself, and none waits for a step that another does in another way.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, cast

import torch
from fairseq import utils
from fairseq.optim import FairseqOptimizer
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from fairseq_rkm.graphs.recording import (
    NEEDS_GPU,
    GraphRecorder,
    Recordings,
    copy_all,
    record,
    refuse,
)
from fairseq_rkm.models.language_model.carried_state import CarriedState
from fairseq_rkm.modules import RKMState
from fairseq_rkm.modules.state import state_tensors
from fairseq_rkm.optim.gradient_buckets import buckets_of

MOST_LENGTHS = 1000
"""The most recorded lengths of segments. Further lengths go without a graph."""


class GraphedSteps(FairseqTask):
    """A task that replays training steps with ``--cuda-graphs``. A task inherits from it before fairseq's own task."""

    graphs: Optional["StepGraphs"] = None

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Check that steps can be recorded. fairseq calls this before training.

        Raises:
            RKMError: ``--cuda-graphs`` where graphs cannot be had.
        """
        super().begin_epoch(epoch, model)
        if self.args.cuda_graphs:
            check_graphs(self.args, model)

    def train_step(
        self, sample: dict, model: Any, criterion: Any, optimizer: FairseqOptimizer, update_num: int, **kwargs: Any
    ) -> tuple:
        """Do fairseq's step, or replay it."""
        without = functools.partial(
            super().train_step, sample, model, criterion, optimizer, update_num=update_num, **kwargs
        )
        if not self.args.cuda_graphs or kwargs.get("ignore_grad"):
            return without()
        if self.graphs is None:
            self.graphs = StepGraphs(model, criterion, optimizer)
        model.train()
        model.set_num_updates(update_num)
        return self.graphs.step(sample, without)


def check_graphs(args: Any, model: Any) -> None:
    """Raise RKMError where steps cannot be recorded: they may need nothing but the work of one GPU."""
    refusals = {
        NEEDS_GPU: args.cpu or not torch.cuda.is_available(),
        "cannot be had with --fp16 or --amp, whose loss scale changes: use --bf16": args.fp16 or args.amp,
        "cannot be had with an adaptive softmax, whose sizes depend on the words": (
            getattr(model.decoder, "adaptive_softmax", None) is not None
        ),
        "cannot be had with --reset-at-eos, which cuts each segment into its sentences": (
            getattr(model.decoder, "reset_at_eos", False)
        ),
    }
    refuse("--cuda-graphs", refusals)


class _Recorded(NamedTuple):
    """A recorded step: the place of its inputs, its replay, the weights that get a gradient, its values for the log."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    moved: list[int]
    logged: dict[str, Any]


class StepGraphs:
    """The recorded steps of one model. They share their memory, and the tensors that all of them read and write.

    A segment's length is met once without a graph, and recorded when it is met again
    (:class:`~fairseq_rkm.graphs.recording.Recordings`).

    Args:
        model: the model, in training; of several processes in fairseq's wrapper for ``--ddp-backend legacy_ddp``.
        criterion: its tensors must have sizes that follow from the sample's sizes.
        optimizer: fairseq's, without loss scale.
        record: :func:`~fairseq_rkm.graphs.recording.record`, or a test's substitute.
    """

    def __init__(self, model: Any, criterion: Any, optimizer: FairseqOptimizer, record: Callable = record) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.carried: CarriedState[list[RKMState]] = model.decoder.carried[True]
        # A criterion may have weights of its own, and in several processes a wrapper of its own.
        owners = [part for part in (model, criterion) if isinstance(part, nn.Module)]
        trained = [[p for p in part.parameters() if p.requires_grad] for part in owners]
        self.weights = [weight for weights in trained for weight in weights]
        self.gradients = [
            gradient for part, weights in zip(owners, trained, strict=True) for gradient in gradients_of(part, weights)
        ]
        self.modules = list(unwrapped(model))
        self.recorder = GraphRecorder(self.weights[0].device, record, "train without --cuda-graphs")
        self.steps: Recordings[torch.Size, _Recorded] = Recordings(MOST_LENGTHS)
        self.entered: list[RKMState] = []
        self.left: list[RKMState] = []

    def takes(self, sample: dict) -> bool:
        """Return whether a step can be replayed: no padding, a state to start from, no hooks to call."""
        whole = sample["ntokens"] == sample["target"].numel()
        return bool(sample["net_input"]["segment"]) and whole and not any(m._forward_hooks for m in self.modules)

    def step(self, sample: dict, without: Callable[[], tuple]) -> tuple:
        """Return loss, sample size and logging output, as fairseq's ``train_step``. The weights have their gradients.

        Args:
            sample: the segment.
            without: does the step without a graph.
        """
        with self.recorder.own_stream():
            if not self.takes(sample):
                return without()
            found = self.steps.find(sample["target"].shape, lambda: self._record(sample))
            return without() if found is None else self._replay(found, sample)

    def _replay(self, step: _Recorded, sample: dict) -> tuple[Tensor, int, dict[str, Any]]:
        segment = sample["net_input"]["segment"]
        self._enter(segment)
        copy_all(step.inputs, _sample_tensors(sample))
        step.replay()
        self.carried.after(segment, self.entered, self.left)
        for i in step.moved:
            self.weights[i].grad = self.gradients[i]
        mark_gradients(self.optimizer)
        return step.logged["loss"], step.logged["sample_size"], dict(step.logged)

    def _enter(self, segment: int) -> None:
        """Copy the state that the segment before left to the place that graphs read."""
        state = self.carried.before(segment) or []
        if not self.entered:
            self.entered, self.left = ([layer.map(torch.empty_like) for layer in state] for _ in range(2))
        copy_all(state_tensors(self.entered), state_tensors(state))

    def _record(self, sample: dict) -> _Recorded:
        self._enter(sample["net_input"]["segment"])
        held = utils.apply_to_sample(torch.clone, sample)
        moved: list[int] = []
        logged: dict[str, Any] = {}

        def run() -> None:
            self.carried.restore(sample["net_input"]["segment"] - 1, self.entered)
            for weight in self.weights:
                weight.grad = None
            loss, _, outcome = self.criterion(self.model, held)
            self.optimizer.backward(loss)
            copy_all(state_tensors(self.left), state_tensors(self.carried.left or []))
            moved[:] = [i for i, weight in enumerate(self.weights) if weight.grad is not None]
            copy_all([self.gradients[i] for i in moved], [self.weights[i].grad for i in moved])
            for weight in self.weights:
                weight.grad = None  # its memory is free for the other graphs
            logged.update(outcome)

        return _Recorded(_sample_tensors(held), self.recorder.record(run), moved, logged)


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model after all the wrappers in which several processes have it."""
    yield model
    while "module" in model._modules:
        model = cast(nn.Module, model._modules["module"])
        yield model


def gradients_of(model: nn.Module, weights: list[nn.Parameter]) -> list[Tensor]:
    """Return tensors for the gradients. Several processes average them there, so that none is copied."""
    buckets = buckets_of(model)
    places = {} if buckets is None else dict(zip(map(id, buckets.weights), buckets.places, strict=True))
    return [places[id(p)] if id(p) in places else torch.empty_like(p) for p in weights]


def mark_gradients(optimizer: FairseqOptimizer) -> None:
    """Tell fairseq's optimizer for half precision, in a wrapper or not, of new gradients, as its ``backward`` does."""
    wrapped: Any = getattr(optimizer, "_optimizer", None)
    for each in (optimizer, wrapped):
        if hasattr(each, "_needs_sync"):
            each._needs_sync = True


def _sample_tensors(sample: dict) -> list[Tensor]:
    found: list[Tensor] = []
    utils.apply_to_sample(found.append, sample)
    return found
