"""RKM: stacked recurrences of any cell, a drop-in for ``torch.nn.LSTM``."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.torch_version import TorchVersion

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules.directions_at_once import run_at_once
from fairseq_rkm.modules.lstm_exchange import ExchangeWithLSTM
from fairseq_rkm.modules.parameters import settle_loaded as _settle  # noqa: F401 - pickles of earlier versions name it
from fairseq_rkm.modules.per_sample_gradients import SLOT, watch
from fairseq_rkm.modules.plain_calls import run_layer
from fairseq_rkm.modules.projections import Projection
from fairseq_rkm.modules.sequences import Batch, Packed, layout_of
from fairseq_rkm.modules.short_calls import take_steps
from fairseq_rkm.modules.side_by_side import run_side_by_side
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.ops import anew, recurrence
from fairseq_rkm.ops.dispatch import leaves_room
from fairseq_rkm.ops.exported_loop import checks_of_sizes
from fairseq_rkm.ops.memories import memories
from fairseq_rkm.ops.ngram import extend, next_context, steps_ahead
from fairseq_rkm.ops.plain_tensors import are_plain
from fairseq_rkm.ops.segments import Reset
from fairseq_rkm.ops.side_streams import Fork

Rows = Tensor | list[Tensor]
"""The rows of all layers and directions, ``(B, d)`` each."""
WITHOUT_CONTEXT = (
    "this RKMState has no n-gram context, and an empty one takes its place. Code that rebuilds tuples, as "
    "DistributedDataParallel does, loses the context: hand it state.tensors(), and make "
    "RKMState(hidden, cell, context) of them again. Give a plain pair (hidden, cell) where an empty context is meant"
)


def outside_old_compilers(forward: Callable, version: str = torch.__version__) -> Callable:
    """Leave a module's pass out of what ``torch.compile`` reads before PyTorch 2.8: it runs as it does without it.

    Those compilers end in RecursionError at the descriptors of ``constant_numbers``.
    """
    return forward if TorchVersion(version) >= "2.8" else torch.compiler.disable(forward)


class RKM(ExchangeWithLSTM):
    """A stack of recurrent kernel machines (Liang et al. 2019) that takes the place of ``torch.nn.LSTM``.

    Args:
        input_size: m, the features of an input.
        hidden_size: d, the units of a layer and direction.
        num_layers: layers in the stack.
        cell: one of :data:`fairseq_rkm.CELLS`.
        ngram: n, the number of inputs that a step sees.
        ngram_padding: ``"causal"`` ends a step's window at the step, in the direction of travel. ``"same"`` centres the
            window, for odd n only: it reaches ``(n - 1) / 2`` inputs ahead, and zeros pad the sequence's end. With
            ``"same"`` a sequence run in pieces differs from the sequence run whole.
        feedback: None keeps the cell's own equations. False drops ``U``: gates then see the inputs alone.
        bias: whether the gates have biases.
        layer_norm: normalise the memory, ``c_t <- LN(c_t)``.
        memory_clip: clip ``c_t`` to ``[-memory_clip, memory_clip]`` at each step, as ``torch.clamp`` (Sak et al. 2014).
            ``"auto"`` is 1 for a cell that feeds back a memory without squashing, layer normalisation or a bounded
            kernel (``"gaussian"``, ``"arccos"`` of degree 0): unbounded, it overflows in ordinary training. For all
            others ``"auto"`` is no limit. None is no limit, as in the paper. The attribute holds the bound in force, a
            number or None.
        sigma_i2: ``s_i`` of the cells with a constant input scale, within (0, 1).
        sigma_f2: ``s_f`` of the cells with a constant memory scale, within (0, 1).
        learn_sigma: learn both, as sigmoids that start at the values given: ``s_i`` one number a layer, ``s_f`` one a
            unit. Cells whose scales are gates have none to learn.
        forget_bias: the first value of the forget gate's bias. None draws it as the other biases, as ``nn.LSTM`` does.
        dropout: on the output of every layer but the last, one mask for all steps (locked dropout).
        weight_dropout: on the elements of ``weight_hh``, one mask for all steps (DropConnect). Without feedback it acts
            on ``weight_ih``, as in the QRNN of Merity et al. (2018).
        bidirectional: run a second recurrence backward in time and concatenate the outputs.
        batch_first: take and give ``(B, T, ...)`` in place of ``(T, B, ...)``.
        backend: ``"auto"`` or one of :data:`fairseq_rkm.ops.BACKENDS`. A named backend is used or refuses; no other
            takes its place.
        device: where the parameters live.
        dtype: their type.
        proj_size: p, the features of ``h_t = W_hr h'_t``, where ``h'_t`` is the cell's output (Sak et al. 2014), as in
            ``nn.LSTM``. It is less than d. 0 is no projection. Weights and what follows the layer become smaller, the
            recurrence itself does not become faster: it runs with the d columns of ``U W_hr``.
        learn_initial_state: learn ``h_0`` and ``c_0`` of each layer and direction. They start at zero, and sequences
            start there that are given no state. A layer without feedback has no ``h_0``, a cell without memory no
            ``c_0``; with neither there is nothing to learn, and an error. Neither ``memory_clip`` nor layer
            normalisation acts on ``c_0``, as on a state that is given.
        kernel: one of :data:`fairseq_rkm.ops.kernel_functions.KERNELS`: the candidate is ``c~_t[j] = k(w_j, z_t) +
            bias_j``, where row j of the candidate's weights is the filter ``w_j`` and ``z_t`` holds what it multiplies.
            Gates stay linear. A cell that squashes its candidate squashes this one (docs/kernel_machines.md).
        kernel_degree: p of ``"polynomial"``, 2 by default; the degree of ``"arccos"``, 1 by default, or 0.
        kernel_scale: where s of ``"polynomial"`` and ``"gaussian"`` starts. None is 1 for the former and the root of
            the number of ``z``'s features for the latter: the length of ``z`` if they have variance 1.
        kernel_offset: where b of ``"polynomial"`` starts, 1 by default, at least 0.
        learn_kernel: learn s and b, one of each a unit. False fixes them where they start.
        state_dropout: on the units of ``h_{t-1}`` that gates and candidate read, one mask for all steps (Gal and
            Ghahramani 2016) and, unlike there, for all sequences: columns of ``weight_hh``. It takes no time.

    Example:
        >>> rnn = RKM(200, 400, num_layers=2, ngram=3, dropout=0.3)  # was nn.LSTM(200, 400, num_layers=2, dropout=0.3)
        >>> output, state = rnn(torch.randn(35, 20, 200))  # (35, 20, 400), RKMState
        >>> same = RKM.from_lstm(nn.LSTM(200, 400))  # the same function as the LSTM's

    Derivatives:
        All backends give the same derivatives, of any order. The reference, the slowest backend, computes gradients
        that are differentiated again (``create_graph=True``). It also runs under ``torch.func``, and on tensors that
        hold no plain memory. A backend named by the user refuses there.

    Compiling:
        ``torch.compile``, ``make_fx``, FakeTensorMode and meta tensors take each backend as one operator,
        ``torch.ops.fairseq_rkm.native`` and so on (docs/kernels.md): one graph serves all lengths and batches.

    Layers side by side:
        On a GPU, small layers of a stack of one direction work at different stretches of time at once, where this is
        faster by an estimate (docs/kernels.md). The attribute ``wavefront``, None, holds the number of stretches if it
        is set: 1 runs the layers one after another.

    Exporting:
        ``torch.export``, ``torch.jit.trace`` and both ONNX exporters record one loop a layer and direction, of
        PyTorch's own operators: a program takes any number of steps and sequences (docs/exporting.md). With
        ``backend="reference"`` a program has a fixed number of steps, and refuses another. ``torch.jit.trace`` gives
        states as plain pairs.

    Padding:
        Outputs are zero at padding. Inputs and gradients are not read there: NaN and infinity have no effect.

    Loading:
        With ``cell="lstm"``, ``load_state_dict`` converts the weights of an ``nn.LSTM`` (another order of gates, two
        biases). Other cells refuse them. Names and shapes of weights without biases do not tell their owner. An RKM
        without biases and of one, three or four gates therefore saves an empty tensor ``stacked_...`` too, named after
        the order of its gates. PyTorch's modules refuse this tensor. Earlier versions did not save it: the modules that
        ``state_dict()`` records beside the tensors tell such weights from PyTorch's. A dict made anew lacks the record;
        its weights are refused, in a sentence that says how to go on. Another RKM cell of the same shapes takes weights
        gate by gate, as they are.

    Parameters, for layer k and the suffix ``""`` or ``"_reverse"``:
        ``weight_ih_l{k}`` ``(len(gates) * d, n * m)``, ``weight_hh_l{k}`` ``(len(recurrent_gates) * d, d)``,
        ``bias_l{k}`` ``(len(gates) * d,)``, ``norm_weight_l{k}``, ``norm_bias_l{k}``, ``sigma_f_logit_l{k}`` ``(d,)``,
        ``sigma_i_logit_l{k}`` ``()``, ``initial_hidden_l{k}``, ``initial_memory_l{k}`` ``(d,)``; the logarithms of a
        kernel's s and b, ``kernel_scale_log_l{k}`` and ``kernel_offset_log_l{k}``, ``(d,)``. With projections
        ``weight_hh_l{k}`` has p columns, ``initial_hidden_l{k}`` p numbers, the layers after the first have inputs of p
        features a direction, and ``weight_hr_l{k}`` is ``(p, d)``.

    Raises:
        RKMError: an argument of another type, or outside its range.
    """

    @outside_old_compilers
    def forward(
        self,
        x: Tensor | PackedSequence | None = None,
        state: RKMState | tuple[Tensor, Tensor] | None = None,
        padding_mask: Tensor | None = None,
        *,
        reset: Tensor | Reset | None = None,
        return_memory: bool = False,
        input: Tensor | PackedSequence | None = None,  # noqa: A002 - nn.LSTM's name
        hx: RKMState | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Run the stack over a batch of sequences.

        Args:
            x: ``(T, B, m)``, or ``(B, T, m)`` with ``batch_first``. One sequence alone is ``(T, m)``. A
                ``PackedSequence`` is taken, too.
            state: the state that an earlier call returned, or a pair ``(hidden, cell)``, in the order of the user's
                batch. None stands for :meth:`initial_state`. A plain pair has an empty n-gram context. In a
                bidirectional stack the forward direction takes the context; the backward one starts without.
            padding_mask: ``(B, T)`` bool, True at padding, on either side; ``(T,)`` for one sequence alone. At padding
                the state stands still, the output is zero, and inputs count as zero in every window.
            reset: ``(B, T)`` bool; ``(T,)`` for one sequence alone. Where True, state and n-gram context are before the
                step as :meth:`initial_state`: episodes, or documents packed into one row. No window reaches across. The
                backward direction is cut at the same places; it ends in the state of a row's first part. Modules with
                one mask may share a :class:`fairseq_rkm.ops.segments.Reset`: the host then reads it once.
            return_memory: give the memories, too.
            input: another name for ``x``, as in ``nn.LSTM``.
            hx: another name for ``state``, as in ``nn.LSTM``.

        Returns:
            The last layer's output in the layout of the input, with ``d * directions`` features, and the final state,
            each sequence's own. For one sequence alone the state's tensors lack the dimension of the batch. With
            ``return_memory`` the last layer's memories ``c_t`` follow, in the layout of the output, with gradients.
            They are zero at padding, and float32 for models of 16 bits.

        Raises:
            RKMError: a shape, type or device does not fit, or an argument is given by both of its names.
        """
        if not return_memory and padding_mask is None and reset is None and input is None and hx is None:
            taken = take_steps(self, x, state)
            if taken is None:
                taken = run_layer(self, x, state)
            if taken is not None:
                return taken
        given = _one_of("x", x, "input", input)
        state = _one_of("state", state, "hx", hx)
        with checks_of_sizes():
            self._check_input(given)
            layout = layout_of(given, self.batch_first)
            keep = self._keep(layout, padding_mask)
            where_anew = self._anew(layout, reset)
            autocast = self._autocast_dtype(layout.steps.device)
            steps = layout.steps if autocast is None else layout.steps.to(autocast)
            initial = self._initial_state(steps, state, layout)
        along, final = self._run(steps, *initial, keep, where_anew, autocast, return_memory)
        output, *more = [layout.restored(tensor) for tensor in along]
        results = output, layout.leaving(final), *more
        if SLOT in self.__dict__:  # opacus has prepared this layer
            results = watch(self, given, state, {"padding_mask": padding_mask, "reset": _mask_of(reset)}, results)
        return results

    def _run(
        self, x: Tensor, hidden: Rows | None, memory: Rows | None, context: list[Tensor] | None,
        keep: Tensor | None, reset: Reset | None, autocast: torch.dtype | None, wants_memories: bool,
    ) -> tuple[list[Tensor], RKMState]:  # fmt: skip
        """The last layer's output, ``(T, B, d * directions)``, perhaps its memories, and the final state of all."""
        if reset is None and not wants_memories:
            run = run_at_once if self.bidirectional else run_side_by_side
            done = run(self, x, hidden, memory, context, keep, autocast)
            if done is not None:
                return done
        contexts: list[Tensor] = []
        hiddens: list[Tensor] = []
        final_memories: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer:
                x = self.dropout(x)
            if keep is not None:
                x = x.masked_fill(~keep.unsqueeze(-1), 0)
            before = None if context is None else context[layer]
            if self.ngram > 1:
                contexts.append(next_context(x, self.ngram, before, keep, None if reset is None else reset.mask))
            results = []
            memories_too = wants_memories and layer == self.num_layers - 1
            fork = Fork(x.device) if self._leaves_room(x) else None
            for direction, suffix in enumerate(self._suffixes):
                i = layer * len(self._suffixes) + direction
                first_hidden = None if hidden is None else hidden[i]
                first_memory = None if memory is None else memory[i]
                shared = x, first_hidden, first_memory, keep, None if reset is None else reset.mask
                with nullcontext() if fork is None or not direction else fork.beside(shared):
                    along, final_hidden, final_memory = self._direction(
                        f"l{layer}{suffix}", x, first_hidden, first_memory, before, keep, reset, autocast, memories_too
                    )
                if fork is not None and direction:
                    fork.join([*along, final_hidden, final_memory])
                results.append(along)
                hiddens.append(final_hidden)
                final_memories.append(final_memory)
            x, *more = [
                torch.cat(both, dim=-1) if self.bidirectional else both[0] for both in zip(*results, strict=True)
            ]
        return [x, *more], RKMState(_stack(hiddens), _stack(final_memories), contexts or None)

    def _leaves_room(self, x: Tensor) -> bool:
        """Whether a direction leaves enough of a GPU idle for the other to run beside it."""
        if not (x.is_cuda and self.bidirectional) or torch.compiler.is_compiling() or not are_plain(x):
            return False
        return leaves_room(self.backend, self._cell, self.hidden_size, x.dtype, self.layer_norm)

    def _check_input(self, x: Any) -> None:
        packed = isinstance(x, PackedSequence)
        tensor = x.data if packed else x
        dimensions = (2,) if packed else (2, 3)
        if torch.is_tensor(tensor) and tensor.dim() in dimensions and tensor.size(-1) == self.input_size:
            return
        shape = tuple(tensor.shape) if torch.is_tensor(tensor) else type(x).__name__
        wanted = "(B, T, m)" if self.batch_first else "(T, B, m)"
        raise RKMError(
            f"the input must be a tensor {wanted} with m = {self.input_size}, not {shape}; "
            "one sequence alone is (T, m), and the data of a PackedSequence (steps, m)"
        )

    def _autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """The type of matrix products under autocast, which leaves float64 as it is; None outside it."""
        # torch.compile cannot read the first question before PyTorch 2.13.
        available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
        if not available or not torch.is_autocast_enabled(device.type):
            return None
        wide = self._flat_weights[0].dtype == torch.float64
        return None if wide else torch.get_autocast_dtype(device.type)

    def _direction(
        self, name: str, x: Tensor, hidden: Tensor | None, memory: Tensor | None, context: Tensor | None,
        keep: Tensor | None, reset: Reset | None, autocast: torch.dtype | None, wants_memories: bool,
    ) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
        """The output, ``(T, B, d)``, perhaps followed by the memories; the final hidden state and memory."""
        reverse = name.endswith("_reverse")
        if reverse:
            x, context = x.flip(0), None
            keep = None if keep is None else keep.flip(0)
            reset = None if reset is None else reset.backward()
        inputs = extend(x, self.ngram, self.ngram_padding, context)
        weights = self._weights(name, autocast)
        ahead = steps_ahead(self.ngram, self.ngram_padding)
        fresh, projection = self._start(name), None
        with nullcontext() if autocast is None else torch.autocast(x.device.type, enabled=False):
            if self.proj_size:
                matrix, begins = self._projection(name, autocast), None if reset is None else reset.mask
                projection = Projection(matrix, hidden, fresh[0], keep, begins)
                inputs, weights = projection.fold(self._cell, inputs, weights, ahead)
                hidden, fresh = None, (None, fresh[1])
            problem = self._cell, inputs, weights, self.hidden_size, hidden, memory, keep, self.backend
            if reset is None:
                output, *final = recurrence(*problem)
            else:
                output, *final = anew.recurrence(*problem, reset, fresh, ahead)
            along = [output]
            if wants_memories:
                along.append(memories(output, *problem, reset, fresh, ahead))
            if projection is not None:
                along[0], final[0] = projection.apply(output, final[0])
        return [tensor.flip(0) for tensor in along] if reverse else along, final[0], final[1]

    def _keep(self, layout: Batch, padding_mask: Tensor | None) -> Tensor | None:
        """``(T, B)``, True at real steps; None if all are."""
        if padding_mask is None:
            return layout.keep
        if isinstance(layout, Packed):
            raise RKMError("a PackedSequence tells its padding: give no padding_mask beside it")
        return ~self._marks("padding_mask", layout, padding_mask)

    def _anew(self, layout: Batch, reset: Tensor | Reset | None) -> Reset | None:
        """Where sequences begin anew; None if it is known that they nowhere do."""
        if reset is None:
            return None
        if isinstance(reset, Reset):
            self._check_marks("reset.mask", reset.mask, layout.steps, "(T, B)", tuple(layout.steps.shape[:2]))
            if isinstance(layout, Packed):
                raise RKMError("the rows of a PackedSequence are sorted: give reset as a tensor (B, T), in your order")
        else:
            mask = self._marks("reset", layout, reset)
            # A packed sequence has no steps behind its last.
            reset = Reset(mask if layout.keep is None else mask & layout.keep)
        return None if reset.nowhere else reset

    def _marks(self, name: str, layout: Batch, marks: Any) -> Tensor:
        """A user's marks at steps as ``(T, B)``."""
        x = layout.steps
        names, shape = ("(B, T)", (x.size(1), x.size(0))) if layout.batched else ("(T,)", (x.size(0),))
        self._check_marks(name, marks, x, names, shape)
        return layout.marks(marks).t()

    def _check_marks(self, name: str, marks: Any, x: Tensor, names: str, shape: tuple[int, ...]) -> None:
        if not torch.is_tensor(marks) or marks.device != x.device:
            given = f"a tensor on {marks.device}" if torch.is_tensor(marks) else type(marks).__name__
            raise RKMError(f"{name} must be a tensor on {x.device}, as the input is, not {given}")
        if marks.shape != shape or marks.dtype != torch.bool:
            raise RKMError(
                f"{name} must be bool of shape {names} = {shape}, not {marks.dtype} of shape {tuple(marks.shape)}"
            )

    def _initial_state(
        self, x: Tensor, state: Any, layout: Batch
    ) -> tuple[Rows | None, Rows | None, list[Tensor] | None]:
        """Hidden state, memory and context with the rows of ``x``; None stands for zeros."""
        if state is None:
            return *self._learned_rows(x.size(1)), None
        if not isinstance(state, (tuple, list)) or not 2 <= len(state) <= 3:
            given = f"{len(state)} of them" if isinstance(state, (tuple, list)) else type(state).__name__
            raise RKMError(f"the state must be an RKMState or a pair (hidden, cell) of tensors, not {given}")
        plain = not isinstance(state, RKMState)
        state = RKMState(*state) if plain else state
        if state.context is None and self.ngram > 1:
            _check_lost_context(plain)
        rows = (x.size(1),) if layout.batched else ()
        self._check_pair(x, state, rows)
        if state.context is not None:
            state = state._replace(context=self._initial_context(x, state.context, rows))
        state = layout.entering(state)
        return state.hidden, state.cell, state.context

    def _check_pair(self, x: Tensor, state: RKMState, rows: tuple[int, ...]) -> None:
        for what, tensor, size, letter in (
            ("hidden", state.hidden, self.output_size, "p" if self.proj_size else "d"),
            ("cell", state.cell, self.hidden_size, "d"),
        ):
            shape = (self.num_layers * len(self._suffixes), *rows, size)
            names = f"(layers * directions, B, {letter})" if rows else f"(layers * directions, {letter})"
            if not torch.is_tensor(tensor):
                raise RKMError(f"the state's {what} must be one tensor {names}, not a {type(tensor).__name__}")
            if tensor.shape != shape:
                raise RKMError(f"the state's {what} must have shape {names} = {shape}, not {tuple(tensor.shape)}")

    def _learned_rows(self, batch: int) -> tuple[Rows | None, Rows | None]:
        """Hidden state and memory of each layer and direction, as learned; None stands for zeros."""
        if not self.learn_initial_state:
            return None, None
        starts = [self._start(place) for place in self._places]
        hiddens = [hidden.expand(batch, -1) for hidden, _ in starts if hidden is not None]
        memories = [memory.expand(batch, -1) for _, memory in starts if memory is not None]
        return hiddens or None, memories or None

    def _initial_context(self, x: Tensor, context: Any, rows: tuple[int, ...]) -> list[Tensor]:
        if not isinstance(context, (tuple, list)) or not all(torch.is_tensor(c) for c in context):
            raise RKMError(f"the state's context must be a list of tensors, not {type(context).__name__}")
        wanted = [(self.ngram - 1, *rows, self.layer_input_size(k)) for k in range(self.num_layers)]
        given = [tuple(c.shape) for c in context]
        if self.ngram == 1 or given != wanted:
            wanted_text = "None for ngram 1" if self.ngram == 1 else f"one tensor a layer of shapes {wanted}"
            raise RKMError(f"the state's context must be {wanted_text}, not {given}")
        for c in context:
            if c.device != x.device or not c.is_floating_point():
                wanted_text = f"floating-point numbers on {x.device}"
                raise RKMError(f"the state's context must be {wanted_text}, not {c.dtype} on {c.device}")
        return [c.to(x.dtype) for c in context]


def _check_lost_context(plain: bool) -> None:
    """Tell of a state for n-grams whose context was lost; a plain pair has none on purpose.

    Raises:
        RKMError: ``torch.jit.trace`` is recording: it makes plain pairs of all states.
    """
    if torch.jit.is_tracing():
        raise RKMError(
            "torch.jit.trace takes a state apart and loses its n-gram context: trace a module that takes "
            "state.tensors(), and makes RKMState(hidden, cell, context) of them"
        )
    if not plain and not torch.compiler.is_compiling():
        warnings.warn(WITHOUT_CONTEXT, stacklevel=6)


def _mask_of(reset: Tensor | Reset | None) -> Tensor | None:
    """The mask of a reset, ``(B, T)``."""
    return reset.mask.t() if isinstance(reset, Reset) else reset


def _stack(tensors: list[Tensor]) -> Tensor:
    """``torch.stack``, without a copy of a single tensor."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The value of an argument that has two names."""
    if other is None:
        return value
    if value is not None:
        raise RKMError(f"{name} and {other_name} are two names of one argument: give one of them")
    return other
