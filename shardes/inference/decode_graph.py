"""Decode steps of fixed shapes, which a GPU replays as CUDA graphs: one launch for all kernels.

The shapes come in few sizes (`inference.buckets`), and a graph is captured for each that occurs. A
graph reads weights, cache and inputs at fixed addresses: live weights are written in place, so it
serves all members. If an address has changed, the graphs are captured anew. CPUs compute the same
steps without graphs.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shardes.config.schema import Config, Decode, EngineName, Gather, Offload
from shardes.errors import ConfigError, described
from shardes.inference import rope
from shardes.inference.batch import Batch
from shardes.inference.buckets import attended_length, bucket, padded_length
from shardes.inference.cache import make_cache
from shardes.inference.static_cache import StaticCache

MAX_GRAPHS = 256  # the one that was captured first is dropped for another

Outputs = tuple[torch.Tensor, ...]  # each of shape (rows, ...)
Graph = tuple[torch.cuda.CUDAGraph, Outputs]


def check_static_decoding(config: Config, module: PreTrainedModel) -> None:
    """Check that `generation.decode` is possible with the model and the layout.

    Raises:
        ConfigError: it is not.
    """
    if config.generation.decode is Decode.eager:
        return
    key, sharding = "generation.decode=graph", config.sharding
    remedy = "use generation.decode=eager"
    gathers = sharding.shard > 1 or sharding.offload is Offload.cpu
    if gathers and sharding.gather is Gather.layer:
        raise ConfigError(
            f"{key}: with sharding.gather=layer, weights have no fixed addresses; {remedy}, or "
            "sharding.gather=member"
        )
    if sharding.shard > 1 and config.engine is EngineName.fsdp:
        raise ConfigError(
            f"{key}: FSDP gathers weights to new addresses for every member; {remedy}, "
            "engine=deepspeed, or sharding.shard=1"
        )
    if problem := _unsupported(module):
        raise ConfigError(f"{key}: {config.model.path}: {problem}; {remedy}")


def _unsupported(module: PreTrainedModel) -> str:
    """Why the model's decode step cannot have fixed shapes; "": it can."""
    name = type(module).__name__
    if make_cache(module.config) is None:
        return f"some layers of {name} keep a state other than keys and values"
    if rope.length_scaling(module):
        return f"the rotary frequencies of {name} change with a row's length"
    if not getattr(module, "_can_compile_fullgraph", False):
        return f"transformers says that {name} does not compute with fixed shapes"
    attention = getattr(module.config.get_text_config(), "_attn_implementation", None)
    if attention not in (None, "sdpa", "eager"):
        return f"attention with {attention} takes no mask of fixed shape (sdpa and eager do)"
    return ""


class DecodeGraphs:
    """The decode steps of one module, a batch after another.

    For each batch: `begin`, a forward pass of its prompts with `cache`, then `keep` and `step` in
    turn.
    """

    def __init__(self, device: torch.device):
        self.cache = StaticCache(device)
        self._device = device
        self._module: PreTrainedModel | None = None
        self._rows = 0  # for which there are inputs
        self._clear()

    def _clear(self) -> None:
        self._graphs: dict[Hashable, Graph] = {}
        self._kept: dict[Hashable, Outputs] = {}
        self._addresses: Hashable = None
        self._pool: Any = None  # the memory that graphs share: one is replayed at a time

    def begin(
        self,
        module: PreTrainedModel,
        cache_parameter: str,
        batch: Batch,
        output: Callable[[torch.Tensor], Outputs],
        kind: Hashable,
    ) -> None:
        """Empty the cache for a batch.

        Args:
            output: what a step returns, from logits of shape (rows, vocabulary or its slice).
            kind: is another one for another function `output`.
        """
        if module is not self._module:
            self._clear()
            self._module = module
        self._cache_parameter, self._output, self._kind = cache_parameter, output, kind
        rows, length = batch.ids.shape
        if (capacity := bucket(rows)) > self._rows:
            self._clear()
            self._rows = capacity
            self._ids = torch.zeros(capacity, 1, dtype=torch.long, device=self._device)
            self._padding = torch.zeros(capacity, dtype=torch.long, device=self._device)
        self.cache.begin(padded_length(length), capacity)

    def keep(
        self,
        batch: Batch,
        active: list[bool],
        set_members: Callable[[Sequence[int]], Hashable],
    ) -> None:
        """Drop the rows that are not active from batch and cache. Every row's newest token has not
        been read by a forward pass.
        """
        if not all(active):
            self.cache.select(batch.keep(active), batch.width - 1)
        elif self.cache.attended:
            return  # nothing has changed since the last step
        rows, members = len(batch.rows), batch.row_members
        self.cache.rows = bucket(rows)
        self._padding[:rows] = (batch.mask == 0).sum(-1)
        self._padding[rows:] = 0  # or the rows that fill the shape might have negative positions
        if members:  # the rows that fill the shape are anyone's
            members = members + members[:1] * (self.cache.rows - rows)
        self._members_layout = set_members(members)
        if not self.cache.attended and (addresses := self._read_addresses()) != self._addresses:
            self._clear()
            self._addresses = addresses

    def _read_addresses(self) -> Hashable:
        assert self._module is not None
        tensors = chain(self._module.parameters(), self._module.buffers(), self.cache.buffers())
        return tuple((t.to_local() if isinstance(t, DTensor) else t).data_ptr() for t in tensors)

    def step(self, batch: Batch) -> Outputs:
        """Compute the next tokens' `output` from the batch's newest tokens.

        The tensors are those of the batch's rows, and valid until the next step.
        """
        rows, width = len(batch.rows), batch.width
        self._ids[:rows, 0] = batch.ids[:, width - 1]
        self.cache.slot.fill_(width - 1)
        self.cache.attended = attended_length(width, self.cache.length)
        outputs = self._replay() if self._device.type == "cuda" else self._forward()
        return tuple(output[:rows] for output in outputs)

    def _forward(self) -> Outputs:
        """The step itself. Doing it again changes nothing."""
        rows, attended = self.cache.rows, self.cache.attended
        padding = self._padding[:rows, None]
        module: Any = self._module
        logits = module(
            input_ids=self._ids[:rows],
            attention_mask=(torch.arange(attended, device=self._device) >= padding).long(),
            position_ids=self.cache.slot - padding,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_parameter: self.cache},
        ).logits[:, -1]
        return self._output(logits)

    def _replay(self) -> Outputs:
        cache = self.cache
        shape = cache.rows, cache.attended, cache.length
        key = *shape, self._kind, self._members_layout
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._capture()
        graph, outputs = self._graphs[key]
        graph.replay()
        return outputs

    def _capture(self) -> Graph:
        """Capture the step.

        Raises:
            ConfigError: it does something that cannot be captured.
        """
        kept = self._warm_up()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                for place, value in zip(kept, self._forward(), strict=True):
                    place.copy_(value)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"generation.decode=graph: the decode step of {type(self._module).__name__} cannot "
                f"be captured as a CUDA graph ({described(error)}); use generation.decode=eager"
            ) from error
        self._pool = self._pool or graph.pool()
        return graph, kept

    def _warm_up(self) -> Outputs:
        """Compute the step once without capturing, as libraries prepare themselves at first use.

        Returns where its outputs go, which is the same memory for all numbers of rows.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        if self._kind not in self._kept:
            self._kept[self._kind] = tuple(
                torch.empty(self._rows, *t.shape[1:], dtype=t.dtype, device=t.device)
                for t in outputs
            )
        return tuple(kept[: self.cache.rows] for kept in self._kept[self._kind])
