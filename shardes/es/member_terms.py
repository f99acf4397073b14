"""What layers add to their outputs for the members of their rows: see `es.side_by_side`."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from shardes.errors import ConfigError
from shardes.es import side_by_side_cpu
from shardes.es.matrix_layers import unsupported


class Kept:
    """Tensors on a device at addresses that stay, as captured decode steps need, until one is set
    that is longer than ever before: `moves` counts these.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._memory: dict[Hashable, torch.Tensor] = {}
        self.moves = 0

    def set(self, key: Hashable, values: torch.Tensor) -> torch.Tensor:
        """The memory of a key, which begins with these values."""
        memory = self._memory.get(key)
        if memory is None or len(memory) < len(values):
            self._memory.pop(key, None)  # freed before more is allocated
            memory = torch.empty(values.shape, dtype=values.dtype, device=self._device)
            self._memory[key] = memory
            self.moves += 1
        memory[: len(values)] = values
        return memory


class Rows:
    """Which member each row of a batch belongs to; all layers look here.

    Attributes:
        slots: shape (rows,), int64: where the row's factors lie.
        scales: shape (rows,), float32: σ/√r, negative for the second member of a pair.
    """

    def __init__(self, device: torch.device):
        self._kept = Kept(device)
        self.set([], [])

    @property
    def moves(self) -> int:
        """How often the tensors have moved."""
        return self._kept.moves

    def set(self, slots: Sequence[int], scales: Sequence[float]) -> None:
        values = torch.tensor(slots, dtype=torch.long), torch.tensor(scales, dtype=torch.float32)
        self.slots, self.scales = (
            self._kept.set(i, value)[: len(value)] for i, value in enumerate(values)
        )

    def of_tokens(self, tokens: torch.Tensor, count: int) -> "Rows":
        """The rows of some of the `count` tokens that the rows have."""
        rows, chosen = tokens // (count // len(self)), copy(self)
        chosen.slots, chosen.scales = self.slots[rows], self.scales[rows]
        return chosen

    def __len__(self) -> int:
        return len(self.slots)


@dataclass
class Factors:
    """This rank's factors of one parameter, transposed, for the members of a group: float32.

    There may be memory for more members.

    Attributes:
        a: shape (..., members, rank, rows of the matrix), where ... are the dimensions of a stack.
        b: shape (..., members, rank, columns of the matrix).
    """

    a: torch.Tensor
    b: torch.Tensor


def add_linear_term(
    name: str, rows: Rows, factors: Factors, x: torch.Tensor, y: torch.Tensor
) -> None:
    """y += (σ/√r)·(x·b)·aᵀ, in place, where `Factors` holds aᵀ and bᵀ.

    Args:
        name: of the matrix, in messages.
        x: input, shape (rows, tokens, columns of the matrix), or the first two flattened.
        y: output, likewise.

    Raises:
        ConfigError: the input is not that of all rows.
    """
    if not len(rows):
        return
    x, y = (t.to_local() if isinstance(t, DTensor) else t for t in (x, y))
    _check_all_rows(name, rows, len(x))
    x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if y.device.type == "cpu" and x.dtype == y.dtype == torch.float32:
        side_by_side_cpu.add_term(x, y, rows.slots, rows.scales, factors.a, factors.b)
        return
    a, b = (t[rows.slots] for t in (factors.a, factors.b))
    scaled = (a * rows.scales[:, None, None]).to(y.dtype)
    inner = torch.bmm(x.view(len(rows), -1, x.shape[-1]), b.to(x.dtype).transpose(1, 2))
    y.view(len(rows), -1, y.shape[-1]).baddbmm_(inner, scaled)


def _check_all_rows(name: str, rows: Rows, count: int) -> None:
    if count % len(rows) or not count:
        raise ConfigError(
            f"es.members_per_batch: members cannot share {name}: its layer computes with {count} "
            f"of {len(rows)} rows; set es.members_per_batch=1, which perturbs the weights in place"
        )


def add_expert_term(
    terms: Mapping[str, tuple[str, Factors]],
    rows: Rows,
    key: str,
    expert: int,
    tokens: torch.Tensor,
    count: int,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """The same for one expert of a stack, which computes with `tokens` of the rows' `count`.

    Args:
        terms: the stack's name and factors by their keys in the layer.
    """
    if key in terms and len(rows):
        name, factors = terms[key]
        _check_all_rows(name, rows, count)
        own = Factors(factors.a[expert], factors.b[expert])
        add_linear_term(name, rows.of_tokens(tokens, count), own, x, y)


class _RouterCall(TorchFunctionMode):
    """Adds the term to the one product that a router makes with its matrix."""

    def __init__(self, term: Callable[[torch.Tensor, torch.Tensor], None], shape: torch.Size):
        super().__init__()
        self._term, self._shape, self.calls = term, shape, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        # DeepSpeed replaces F.linear by a function that transposes the weight and calls matmul.
        right = {"linear": self._shape, "matmul": self._shape[::-1]}.get(func.__name__)
        if right and args[1].shape == right:
            self.calls += 1
            self._term(args[0], y)
        return y


def route(forward: Callable, term: Callable, shape: torch.Size, name: str, *args) -> Any:
    """A router's output, computed with the term in its product.

    Raises:
        ConfigError: it does not make exactly one.
    """
    with _RouterCall(term, shape) as call:
        out = forward(*args)
    if call.calls != 1:
        raise unsupported(name, "its router")
    return out


def embed(
    forward: Callable[[torch.Tensor], torch.Tensor],
    layer: Any,
    rows: Rows,
    factors: Factors,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """An embedding's output plus (σ/√r)·a[token]·bᵀ, scaled as the embedding is."""
    out = forward(tokens)
    if not len(rows):
        return out
    chosen = factors.a[rows.slots[:, None], :, tokens] * rows.scales[:, None, None]
    term = torch.bmm(chosen.to(out.dtype), factors.b[rows.slots].to(out.dtype))
    scale = getattr(layer, "embed_scale", None)
    return out + (term if scale is None else term * scale)
