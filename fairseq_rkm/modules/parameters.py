"""The parameters of a stack of recurrences: names, shapes, first values, and the weights of one layer."""

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules.arguments import (
    check_cell,
    check_kernel,
    check_numbers,
    check_projection,
    check_scales,
    check_sizes,
    check_state_dropout,
    check_switches,
)  # fmt: skip
from fairseq_rkm.modules.constant_numbers import ConstantNumber, adopt_numbers
from fairseq_rkm.modules.dropout import LockedDropout, check_probability
from fairseq_rkm.modules.lstm_weights import GATES_OF_TORCH
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.ops import Weights, memory_dtype, resolve_cell
from fairseq_rkm.ops.cells import resolve_clip
from fairseq_rkm.ops.dispatch import check_backend
from fairseq_rkm.ops.kernel_candidates import Filters, candidate, filters_of, sees_hidden
from fairseq_rkm.ops.kernel_functions import resolve_kernel

NGRAM_PADDINGS = ("causal", "same")
UNQUANTIZED = (
    "an RKM has no quantized form: torch.ao.quantization leaves it as it is, in floating point, and quantizes other "
    "modules beside it"
)


class RKMParameters(nn.Module):
    """An :class:`fairseq_rkm.RKM` without its function: arguments and parameters, as described there."""

    dropout: LockedDropout
    # An RKM that was pickled by an earlier version lacks these.
    proj_size = 0
    learn_initial_state = False
    kernel_scale: float | None = None
    kernel_offset: float | None = None
    learn_kernel = True
    _state_dropout_text = "0.0"
    wavefront: int | None = None
    """The number of stretches of time that layers run side by side over, where they can; None leaves it to an estimate,
    and 1 runs one layer after another."""
    even_windows = False
    """Whether ``"same"`` takes even n, too: a subclass may say so."""

    sigma_i2 = ConstantNumber()
    sigma_f2 = ConstantNumber()
    weight_dropout = ConstantNumber()
    state_dropout = ConstantNumber()

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        cell: str = "rkm_lstm",
        ngram: int = 1,
        ngram_padding: str = "causal",
        feedback: bool | None = None,
        bias: bool = True,
        layer_norm: bool = False,
        memory_clip: float | str | None = "auto",
        sigma_i2: float = 0.5,
        sigma_f2: float = 0.5,
        learn_sigma: bool = False,
        forget_bias: float | None = 1.0,
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
        bidirectional: bool = False,
        batch_first: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        proj_size: int = 0,
        learn_initial_state: bool = False,
        kernel: str = "linear",
        kernel_degree: int | None = None,
        kernel_scale: float | None = None,
        kernel_offset: float | None = None,
        learn_kernel: bool = True,
        state_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_cell(cell)
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, ngram=ngram)
        check_switches(
            bias=bias, layer_norm=layer_norm, learn_sigma=learn_sigma, bidirectional=bidirectional,
            batch_first=batch_first, feedback=feedback is not None and feedback,
            learn_initial_state=learn_initial_state, learn_kernel=learn_kernel,
        )  # fmt: skip
        check_numbers(
            sigma_i2=sigma_i2, sigma_f2=sigma_f2, dropout=dropout, weight_dropout=weight_dropout,
            state_dropout=state_dropout,
        )  # fmt: skip
        check_numbers(forget_bias=0.0 if forget_bias is None else forget_bias)
        check_scales(sigma_i2=sigma_i2, sigma_f2=sigma_f2)
        if ngram_padding not in NGRAM_PADDINGS:
            raise RKMError(f"unknown ngram_padding {ngram_padding!r}; choose causal or same")
        if ngram_padding == "same" and ngram % 2 == 0 and not self.even_windows:
            raise RKMError(f"ngram_padding 'same' centres an odd window; ngram is {ngram}")
        check_probability("weight_dropout", weight_dropout)
        check_backend(backend)
        check_projection(proj_size, hidden_size)

        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.proj_size = proj_size
        self._cell = resolve_cell(cell, feedback)
        self.cell, self.feedback = cell, self._cell.has_feedback
        self._set_kernel(kernel, kernel_degree, kernel_scale, kernel_offset, learn_kernel)
        check_state_dropout("state_dropout", state_dropout, self._cell)
        self.state_dropout = state_dropout
        self.ngram, self.ngram_padding = ngram, ngram_padding
        self.bias, self.layer_norm = bias, layer_norm
        self.set_memory_clip(memory_clip)
        self.sigma_i2, self.sigma_f2, self.learn_sigma = sigma_i2, sigma_f2, learn_sigma
        self.forget_bias, self.weight_dropout = forget_bias, weight_dropout
        self.bidirectional, self.batch_first, self.backend = bidirectional, batch_first, backend
        self.dropout = dropout  # type: ignore[assignment]  # __setattr__ makes it a module
        self.learn_initial_state = learn_initial_state
        if learn_initial_state and not (self.feedback or self._cell.has_memory):
            raise RKMError(f"the cell {cell!r} has no state to learn: leave learn_initial_state out")
        self._kinds = tuple(kind for kind in self._shapes(0) if not kind.startswith("initial"))
        for layer in range(num_layers):
            for suffix in self._suffixes:
                for name, shape in self._shapes(layer).items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(f"{name}_l{layer}{suffix}", parameter)
        if self._like_torch and set(self._kinds) <= {"weight_ih", "weight_hh", "weight_hr"}:
            self.register_buffer(self._mark, torch.empty(0, device=device))
        self._in_doubt = False
        self.register_load_state_dict_post_hook(settle_loaded)
        self.reset_parameters()

    def _set_kernel(
        self, name: str, degree: int | None, scale: float | None, offset: float | None, learn: bool
    ) -> None:
        kernel = resolve_kernel(name, degree)
        check_kernel(kernel, scale, offset, learn)
        if not kernel.is_linear and self.proj_size and self.feedback:
            raise RKMError(
                "projections with feedback are for the linear kernel, which alone takes U weight_hr as one matrix: "
                f"leave proj_size out, or use feedback=False, with kernel={name!r}"
            )
        self._cell = self._cell.through(kernel)
        self.learn_kernel = learn
        self.kernel_scale = scale
        if "offset" in kernel.parameters:
            self.kernel_offset = 1.0 if offset is None else offset

    @property
    def kernel(self) -> str:
        """The name of the candidate's kernel."""
        return self._cell.kernel.name

    @property
    def kernel_degree(self) -> int | None:
        """The degree of the candidate's kernel; None if it has none."""
        return self._cell.kernel.degree

    def _first_kernel_values(self, layer: int) -> dict[str, float]:
        """What a kernel's parameters start from, or are fixed at."""
        features = self.ngram * self.layer_input_size(layer) + self.hidden_size * sees_hidden(self._cell)
        scale = self._cell.kernel.default_scale(features) if self.kernel_scale is None else self.kernel_scale
        values = {"scale": scale, "offset": self.kernel_offset}
        return {name: values[name] for name in self._cell.kernel.parameters}  # type: ignore[misc]

    def set_memory_clip(self, memory_clip: float | str | None) -> None:
        """Change the memory's bound; no parameter depends on it.

        Args:
            memory_clip: as in the constructor.

        Raises:
            RKMError: the bound is no positive number, or stands beside layer normalisation.
        """
        self.memory_clip = resolve_clip(memory_clip, self._cell, self.layer_norm)
        self._cell = self._cell.clipped(self.memory_clip)

    @property
    def gates(self) -> tuple[str, ...]:
        """The order of the gates in ``weight_ih_l{k}`` and ``bias_l{k}``."""
        return self._cell.gates

    @property
    def recurrent_gates(self) -> tuple[str, ...]:
        """The order of the gates in ``weight_hh_l{k}``: they see ``h_{t-1}``."""
        return self._cell.recurrent_gates

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def _places(self) -> list[str]:
        """The ends of parameters' names: each layer and direction, in the order of a state's rows."""
        return [f"l{layer}{suffix}" for layer in range(self.num_layers) for suffix in self._suffixes]

    def layer_input_size(self, layer: int) -> int:
        """The features of an input of layer ``layer``, counted from 0."""
        return self.input_size if layer == 0 else self.output_size * len(self._suffixes)

    @property
    def output_size(self) -> int:
        """The features of ``h_t`` in one direction: d, or p with projections."""
        return self.proj_size or self.hidden_size

    def gate_slice(self, gate: str, recurrent: bool = False) -> slice:
        """The rows of one gate in ``weight_ih_l{k}`` and ``bias_l{k}``. For ``nn.LSTM`` they are known by heart.

        Args:
            gate: ``"candidate"``, ``"input"``, ``"forget"`` or ``"output"``.
            recurrent: of the rows in ``weight_hh_l{k}``.

        Raises:
            RKMError: the cell has no such gate, or it does not see ``h_{t-1}``.

        Example:
            >>> rnn = RKM(200, 400, cell="rkm_cifg")
            >>> with torch.no_grad():
            ...     rnn.bias_l0[rnn.gate_slice("forget")] = 1  # was lstm.bias_ih_l0[400:800] = 1
        """
        gates = self.recurrent_gates if recurrent else self.gates
        if gate not in gates:
            held = f"the gates in its weight_{'hh' if recurrent else 'ih'} are {', '.join(gates)}"
            held = held if gates else "it has no weight_hh, as nothing is fed back"
            raise RKMError(f"the cell {self.cell!r} has no rows of a gate {gate!r} here: {held}")
        first = gates.index(gate) * self.hidden_size
        return slice(first, first + self.hidden_size)

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        cell, d = self._cell, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (len(cell.gates) * d, self.ngram * self.layer_input_size(layer))
        }
        if self.feedback:
            shapes["weight_hh"] = (len(cell.recurrent_gates) * d, self.output_size)
        if self.bias:
            shapes["bias"] = (len(cell.gates) * d,)
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, d)
        if self.layer_norm:
            shapes["norm_weight"] = shapes["norm_bias"] = (d,)
        if self.learn_sigma and cell.input_is_constant:
            shapes["sigma_i_logit"] = ()
        if self.learn_sigma and cell.forget_is_constant:
            shapes["sigma_f_logit"] = (d,)
        if self.learn_kernel:
            shapes.update((f"kernel_{name}_log", (d,)) for name in cell.kernel.parameters)
        if self.learn_initial_state and self.feedback:
            shapes["initial_hidden"] = (self.output_size,)
        if self.learn_initial_state and cell.has_memory:
            shapes["initial_memory"] = (d,)
        return shapes

    def reset_parameters(self) -> None:
        """Draw matrices and biases from U(-1/sqrt(d), 1/sqrt(d)), as ``nn.LSTM``; set all other parameters.

        With a kernel other than the linear one, the candidate's bias starts lower by the kernel's value for zeros, so
        that candidates start around zero as linear ones do.
        """
        bound = 1 / math.sqrt(self.hidden_size)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("norm_weight"):
                    parameter.fill_(1)
                elif name.startswith(("norm_bias", "initial")):
                    parameter.zero_()
                elif name.startswith("sigma"):
                    parameter.fill_(_logit(self.sigma_i2 if name.startswith("sigma_i") else self.sigma_f2))
                elif name.startswith("kernel"):
                    kind, place = name.removeprefix("kernel_").split("_log_l")
                    value = self._first_kernel_values(int(place.removesuffix("_reverse")))[kind]
                    parameter.fill_(math.log(value))
                else:
                    parameter.uniform_(-bound, bound)
                if name.startswith("bias") and "forget" in self.gates and self.forget_bias is not None:
                    parameter[self.gate_slice("forget")].fill_(self.forget_bias)
            if self.bias and not self._cell.kernel.is_linear:
                for place in self._places:
                    self._centre(place)

    def _centre(self, place: str) -> None:
        """Lower the candidate's bias by the kernel's value for zeros."""
        filters: Filters = filters_of(self._cell, self._weights(place, None))._replace(bias=0)  # type: ignore[arg-type]
        zeros = torch.zeros_like(filters.squares)
        bias = getattr(self, f"bias_{place}")
        bias[self.gate_slice("candidate")] -= candidate(self._cell, zeros, filters, zeros[:1]).to(bias.dtype)

    def num_weights(self) -> int:
        """The number of elements of all weight matrices, without biases, as the paper counts."""
        shapes = [self._shapes(layer) for layer in range(self.num_layers)]
        matrices = [shape for layer in shapes for name, shape in layer.items() if name.startswith("weight")]
        return len(self._suffixes) * sum(math.prod(shape) for shape in matrices)

    @property
    def _all_weights(self) -> list[list[str]]:
        """The parameters' names, one list a layer and direction, as ``nn.LSTM``'s: code that initializes reads them."""
        return [[f"{kind}_{place}" for kind in self._shapes(0)] for place in self._places]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters, one list a layer and direction, as ``nn.LSTM``'s."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights(self) -> list[Tensor]:
        """The parameters in one list, as ``nn.LSTM``'s."""
        return [weight for weights in self.all_weights for weight in weights]

    def flatten_parameters(self) -> None:
        """Do nothing: parameters may lie anywhere in memory. Code for ``nn.LSTM`` calls it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        adopt_numbers(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Take a number for ``dropout`` too, a number in ``nn.LSTM`` and a module here; warn of quantization.

        Raises:
            RKMError: a number for ``dropout`` or ``wavefront`` is outside its range.
        """
        if name == "dropout" and not isinstance(value, nn.Module):
            check_numbers(dropout=value)
            value = LockedDropout(value)
        if name == "wavefront" and value is not None:
            check_sizes(wavefront=value)
        if name == "qconfig" and value is not None:
            warnings.warn(UNQUANTIZED, stacklevel=2)
        super().__setattr__(name, value)

    def initial_state(self, batch_size: int | None = None) -> RKMState:
        """The state that sequences start from where none is given: zeros, or the learned state.

        Args:
            batch_size: B. None is one sequence without a batch: the state's tensors then lack this dimension.

        Returns:
            A state that begins a sequence, and that gradients reach the learned state through.
        """
        like, rows = self._flat_weights[0], () if batch_size is None else (batch_size,)
        hidden, memory = like.new_zeros(*rows, self.output_size), like.new_zeros(*rows, self.hidden_size)
        starts = [self._start(place) for place in self._places]
        hiddens = torch.stack([hidden if h is None else h.expand_as(hidden) for h, _ in starts])
        memories = torch.stack([memory if c is None else c.expand_as(memory) for _, c in starts])
        sizes = [self.layer_input_size(layer) for layer in range(self.num_layers)]
        context = [like.new_zeros(self.ngram - 1, *rows, size) for size in sizes] if self.ngram > 1 else None
        return RKMState(hiddens, memories.to(memory_dtype(like.dtype)), context)

    def _start(self, place: str) -> tuple[Tensor | None, Tensor | None]:
        """``h_0``, ``(output_size,)``, and ``c_0``, ``(d,)``, of a layer and direction; None stands for zeros."""
        if not self.learn_initial_state:
            return None, None
        hidden = getattr(self, f"initial_hidden_{place}") if self.feedback else None
        return hidden, getattr(self, f"initial_memory_{place}") if self._cell.has_memory else None

    def _weights(self, name: str, dtype: torch.dtype | None) -> Weights:
        """The tensors of one layer and direction; matrices and biases in autocast's ``dtype``, if there is one."""
        own = self._own(name)
        if dtype is not None:
            own.update((kind, own[kind].to(dtype)) for kind in ("weight_ih", "weight_hh", "bias") if kind in own)
        if self.weight_dropout:
            dropped = "weight_hh" if "weight_hh" in own else "weight_ih"
            own[dropped] = F.dropout(own[dropped], self.weight_dropout, self.training)
        if self.state_dropout and self.training:
            # A unit of h_{t-1} that is dropped at all steps is a column that is dropped.
            recurrent = own["weight_hh"]
            own["weight_hh"] = recurrent * F.dropout(recurrent.new_ones(recurrent.size(1)), self.state_dropout)
        get = own.get
        # With a forget gate no cell has constant scales.
        s_i, s_f = (0.5, 0.5) if self._cell.forget_is_gate else (self.sigma_i2, self.sigma_f2)
        return Weights(
            own["weight_ih"],
            get("weight_hh"),
            get("bias"),
            get("norm_weight"),
            get("norm_bias"),
            torch.sigmoid(own["sigma_i_logit"]) if "sigma_i_logit" in own else s_i,
            torch.sigmoid(own["sigma_f_logit"]) if "sigma_f_logit" in own else s_f,
            **(self._kernel_tensors(name, own) if self._cell.kernel.parameters else {}),
        )

    def _own(self, name: str) -> dict[str, Tensor]:
        """The parameters of one layer and direction by kind; parametrizations compute some, as attributes."""
        if torch.compiler.is_compiling():
            return {kind: getattr(self, f"{kind}_{name}") for kind in self._kinds}
        held: dict[str, Any] = self._parameters  # at a tenth of an attribute's time
        own = {}
        for kind, full_name in _names(self._kinds, name):
            tensor = held.get(full_name)
            own[kind] = getattr(self, full_name) if tensor is None else tensor
        return own

    def _kernel_tensors(self, place: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The s and b of the candidate's kernel that it has, ``(d,)`` each."""
        kernel = self._cell.kernel
        if self.learn_kernel:
            return {f"kernel_{name}": own[f"kernel_{name}_log"].exp() for name in kernel.parameters}
        values = self._first_kernel_values(int(place.removesuffix("_reverse")[1:]))
        like = own["weight_ih"]
        wide = memory_dtype(like.dtype)
        return {
            f"kernel_{name}": like.new_full((self.hidden_size,), value, dtype=wide) for name, value in values.items()
        }

    def _projection(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """``weight_hr`` of one layer and direction, as :meth:`_weights`."""
        projection: Tensor = getattr(self, f"weight_hr_{name}")
        return projection if dtype is None else projection.to(dtype)

    @property
    def _like_torch(self) -> bool:
        """Whether the matrices have the names and shapes of a recurrent module of PyTorch."""
        return self.gates == self.recurrent_gates and len(self.gates) in GATES_OF_TORCH

    @property
    def _mark(self) -> str:
        """The key of an empty tensor: it marks weights as an RKM's where names and shapes might be PyTorch's."""
        return f"stacked_{'_'.join(self.gates)}"

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, cell={self.cell!r}"
        if self.proj_size:
            text += f", proj_size={self.proj_size}"
        if self.ngram > 1:
            text += f", ngram={self.ngram}, ngram_padding={self.ngram_padding!r}"
        if self.memory_clip is not None or resolve_clip("auto", self._cell, self.layer_norm) is not None:
            text += f", memory_clip={self.memory_clip}"
        if not self._cell.kernel.is_linear:
            text += f", kernel={self.kernel!r}"
            text += "" if self.kernel_degree is None else f", kernel_degree={self.kernel_degree}"
        flags = ("layer_norm", "learn_sigma", "learn_initial_state", "bidirectional", "batch_first")
        text += "".join(f", {flag}=True" for flag in flags if getattr(self, flag))
        return text + ("" if self.feedback else ", feedback=False")


@functools.cache
def _names(kinds: tuple[str, ...], place: str) -> tuple[tuple[str, str], ...]:
    """The kinds of a layer's and direction's parameters, and their names."""
    return tuple((kind, f"{kind}_{place}") for kind in kinds)


def settle_loaded(rkm: Any, _keys: object) -> None:
    """The hook after a state dict is loaded; whole modules that are pickled name it."""
    rkm._settle()


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)
