"""What a rank holds, worked out from config.json before anything starts.

Sizes are in bytes, of the rank that holds most. On GPUs the center is on the host; on CPUs all is the host's. The CPU's
figures are compared with measured runs by the tests; no GPU was measured.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel

from shardes.center import SAMPLE
from shardes.config import Config, ConfigError, Engine, Gather, Offload, Restore
from shardes.engines import check_model, empty_model
from shardes.generation import batches

# Freed memory that glibc's malloc cannot give back, as measured: so much from loading, and as much as temporaries take
# at a time, unless they are in blocks above 32 MiB (a layer has about seven at a time), which are mapped one by one.
HOLES, MAPPED = 48 << 20, 7 * 32 << 20
SUMS = 32 << 20  # most bytes that DeepSpeed's sums through shared memory take at a time
PROCESS = 720_000_000  # measured on a CPU: Python, torch, deepspeed, compiled kernels and a model of next to nothing
RESERVE = 0.1  # of a GPU's memory: CUDA's context, NCCL's buffers, the allocator's gaps. Assumed, not measured
PREFETCH = 50_000_000  # elements that ZeRO-3 gathers ahead: DeepSpeed's default
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Parameter:
    """A parameter, and how tensor parallel cuts it: `dim` (None: every rank has it all) in units that stay whole."""

    name: str
    shape: tuple[int, ...]
    dim: int | None
    units: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def shape_on(self, tensor: int, rank: int) -> tuple[int, ...]:
        """The shape of a tensor-parallel rank's slice."""
        if self.dim is None or tensor == 1:
            return self.shape
        each, more = divmod(self.units, tensor)
        size = self.shape[self.dim] // self.units * (each + (rank < more))
        return *self.shape[: self.dim], size, *self.shape[self.dim + 1 :]


@dataclass(frozen=True)
class Model:
    """A model's shapes, as one engine cuts it."""

    engine: Engine
    itemsize: int
    parameters: tuple[Parameter, ...]
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    experts: int  # 0: dense
    experts_per_token: int
    expert_intermediate: int

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    def held(self, tensor: int, shard: int, tensor_rank: int, shard_rank: int) -> list[int]:
        """The elements of each parameter that a rank holds, without padding."""
        found = []
        for parameter in self.parameters:
            shape = parameter.shape_on(tensor, tensor_rank)
            if self.engine is Engine.fsdp:  # rows
                step, size, row = -(-shape[0] // shard), shape[0], prod(shape[1:])
            else:  # a flat stretch
                step, size, row = -(-prod(shape) // shard), prod(shape), 1
            first = min(step * shard_rank, size)
            found.append(min(step, size - first) * row)
        return found

    def experts_numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters if ".experts." in parameter.name)


def config_file(path: str) -> Path:
    """config.json of a model directory, or of a hub id (that file alone is downloaded).

    Raises:
        ConfigError: it is neither here nor at the hub.
    """
    if Path(path).is_dir():
        return Path(path) / "config.json"
    try:
        return Path(hf_hub_download(path, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path={path}: not a directory here, and the hub says: {reason}") from error


def read_model(config: Config) -> tuple[Model, PreTrainedModel]:
    """The shapes of the configured model, and its module without storage, from config.json alone.

    Raises:
        ConfigError: config.json is missing, unreadable, or lacks a size; names it.
    """
    path, file = config.model.path, config_file(config.model.path)
    try:
        given = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: no readable config.json: {error}") from error
    dtype = getattr(torch, config.model.dtype.value)
    module = empty_model(file.parent, dtype)
    text = module.config.get_text_config()
    given = given | given.get("text_config", {})
    for name in NEEDED:
        if name not in given and text.attribute_map.get(name) not in given:
            raise ConfigError(f"model.path={path}: config.json does not say {name}")
    heads = text.num_attention_heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    tied = "lm_head.weight" not in dict(module.named_parameters())
    styles = {name: style for name, style in (module.tp_plan or {}).items()}
    parameters = []
    for name, param in module.named_parameters():
        dim = _cut(name, tuple(param.shape), styles, config.engine is Engine.fsdp or tied)
        units = 1 if dim is None else param.shape[dim]
        if config.engine is Engine.deepspeed and ".mlp." not in name and ".layers." in name and dim is not None:
            units = key_value_heads
        elif config.engine is Engine.fsdp and dim is not None and "packed" in _style(name, styles):
            units = param.shape[dim] // 2
        parameters.append(Parameter(name, tuple(param.shape), dim, units))
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    model = Model(
        config.engine,
        dtype.itemsize,
        tuple(parameters),
        text.hidden_size,
        text.num_hidden_layers,
        heads,
        key_value_heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        text.vocab_size,
        experts,
        getattr(text, "num_experts_per_tok", 0) if experts else 0,
        (getattr(text, "moe_intermediate_size", None) or text.intermediate_size) if experts else 0,
    )
    return model, module


def _style(name: str, styles: dict[str, str]) -> str:
    """What transformers' plan does with a parameter."""
    owner = name.rpartition(".")[0]
    return next((style for key, style in styles.items() if fnmatchcase(name, key) or fnmatchcase(owner, key)), "")


def _cut(name: str, shape: tuple[int, ...], styles: dict[str, str], embedding: bool) -> int | None:
    """The dimension that tensor parallel cuts; AutoTP leaves an embedding whole that is not also the head."""
    style = _style(name, styles)
    if style == "embedding_rowwise":
        return 0 if embedding else None
    if "colwise" in style:
        return max(len(shape) - 2, 0)
    if style == "rowwise" and len(shape) > 1:
        return len(shape) - 1
    return None


@dataclass(frozen=True)
class Layout:
    replicas: int
    shard: int
    tensor: int
    gather: Gather
    offload: Offload = Offload.none

    def __str__(self) -> str:
        how = f", gather={self.gather.value}" if self.shard > 1 or self.offload is Offload.cpu else ""
        return f"{self.replicas} × {self.shard} × {self.tensor}{how}{', offload' * (self.offload is Offload.cpu)}"


@dataclass(frozen=True)
class Work:
    """What is asked: the training prompts' and the held-out prompts' lengths in tokens, and how they are decoded."""

    train: tuple[int, ...]
    test: tuple[int, ...]
    max_new_tokens: int
    batch_tokens: int

    def batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(rows, longest prompt) of each batch."""
        for rows in batches(lengths, self.max_new_tokens, self.batch_tokens):
            yield len(rows), max(lengths[row] for row in rows)

    def of_rank(self, layout: Layout) -> list[list[int]]:
        """The lengths of the prompts that the first rank of the shard axis gets at a time: a member's, the center's."""
        center = [list(split[:: min(layout.replicas, len(split))]) for split in (self.train, self.test) if split]
        return [part[:: layout.shard] for part in [list(self.train), *center]]


@dataclass(frozen=True)
class Machine:
    """Nodes and what each has. `gpu_memory` is None on CPUs, where `per_node` counts ranks."""

    nodes: int
    per_node: int
    gpu_memory: int | None
    host_memory: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for, of the largest rank: on its GPU, and on the host."""

    gpu: dict[str, int]
    host: dict[str, int]

    def fits(self, machine: Machine) -> bool:
        on_gpu = machine.gpu_memory is None or sum(self.gpu.values()) <= machine.gpu_memory
        return on_gpu and self.node(machine) <= machine.host_memory

    def node(self, machine: Machine) -> int:
        """The host's bytes on one node."""
        return machine.per_node * sum(self.host.values())


def memory(
    model: Model, layout: Layout, work: Work, restore: Restore, gpu_memory: int | None, tensor_rank: int = 0
) -> Memory:
    """What the ranks of a layout hold when they hold most."""
    held = model.held(layout.tensor, layout.shard, tensor_rank, 0)
    slices = [prod(p.shape_on(layout.tensor, tensor_rank)) for p in model.parameters]
    offload = layout.offload is Offload.cpu
    gathers = layout.shard > 1 or (offload and model.engine is Engine.deepspeed)
    live = {"live shard": sum(held) * model.itemsize}
    if gathers and layout.gather is Gather.member:
        extra = _layers(model, slices)[0] if model.engine is Engine.fsdp else 0  # FSDP gathers, then copies a layer out
        gathered = (sum(slices) + extra) * model.itemsize
    else:
        gathered = _in_flight(model, slices) * model.itemsize if gathers else 0
    copies = restore is Restore.copy
    center = {"center": sum(held) * 4 if copies else sum(held) // SAMPLE * model.itemsize}
    heads = -(-model.key_value_heads // layout.tensor)
    shapes = [shape for lengths in work.of_rank(layout) for shape in work.batches(lengths)]
    tokens = max(rows * (width + work.max_new_tokens) for rows, width in shapes)
    largest = max(temporaries(model, layout.tensor, rows, width) for rows, width in shapes)
    computing = {
        "gathered weights": gathered,
        "key-value cache": 2 * model.layers * heads * model.head_size * tokens * model.itemsize,
        "largest temporaries": largest,
    }
    if gpu_memory is None:
        holes = min(live["live shard"], HOLES + min(largest, MAPPED))
        if gathers and layout.gather is Gather.member:  # gloo gathers in a copy
            computing["largest temporaries"] = max(largest, max(slices) * model.itemsize)
        shared = 0
        if model.engine is Engine.deepspeed and layout.tensor > 1 and layout.shard == 1:
            state = max(rows * width for rows, width in shapes) * model.hidden * model.itemsize
            shared = 2 * layout.tensor * min(state, SUMS)  # two buffers of each rank
        more = {"held free by malloc": holes, "sums through shared memory": shared, "libraries": PROCESS}
        return Memory({}, live | center | computing | more)
    reserve = {"reserve": int(RESERVE * gpu_memory)}
    host = {"libraries": PROCESS} | (live if offload else {}) | (center if copies else {})
    return Memory(({} if offload else live) | ({} if copies else center) | computing | reserve, host)


def temporaries(model: Model, tensor: int, rows: int, width: int) -> int:
    """The most that a forward pass of a batch of prompts has at a time besides weights and cache.

    Of each token: the embedded prompt, a layer's input, its residual and normed state, and either three
    intermediate states, or queries, keys and values with those repeated for every head. Of each row: logits.
    """
    share = -(-model.key_value_heads // tensor) / model.key_value_heads
    queries = model.heads * model.head_size * share
    kept = model.key_value_heads * model.head_size * share
    dense = 3 * model.intermediate / tensor
    if model.experts:
        dense = model.experts_per_token * (2 * model.hidden + 3 * model.expert_intermediate / tensor)
    widest = max(4 * model.hidden + dense, 3 * model.hidden + 5 * queries + 2 * kept)
    state = rows * width * (widest + 2 * model.head_size)
    return int(max(state, rows * (width * model.hidden + model.vocabulary / tensor)) * model.itemsize)


def _layers(model: Model, slices: Sequence[int]) -> tuple[int, int]:
    """The elements of the largest decoder layer, and of the largest parameter that is in none."""
    layers: dict[str, int] = {}
    outside = 0
    for parameter, numel in zip(model.parameters, slices, strict=True):
        before, found, after = parameter.name.partition(".layers.")
        if found:
            number = before + after.partition(".")[0]
            layers[number] = layers.get(number, 0) + numel
        else:
            outside = max(outside, numel)
    return max(layers.values(), default=0), outside


def _in_flight(model: Model, slices: Sequence[int]) -> int:
    """The elements that gather=layer has gathered at a time."""
    layer, outside = _layers(model, slices)
    if model.engine is Engine.fsdp:  # this layer, the next, and the root's group, which stays
        return 2 * layer + outside
    return max(layer, outside) + PREFETCH


def layouts(config: Config, module: PreTrainedModel, machine: Machine) -> list[Layout]:
    """What the model and its engine allow on a machine, the preferred ones first.

    Tensor parallel stays within a node. Nothing gathered comes before gather=member, and that before layer; then
    small replicas, and among equals small shard axes.
    """
    found = []
    for tensor in (t for t in range(1, machine.per_node + 1) if machine.per_node % t == 0):
        try:
            sharding = replace(config.sharding, shard=1, tensor=tensor, offload=Offload.none)
            check_model(replace(config, sharding=sharding), module)
        except ConfigError:
            continue
        for shard in (s for s in range(1, machine.ranks // tensor + 1) if machine.ranks % (tensor * s) == 0):
            for gather in Gather if shard > 1 else [Gather.member]:
                found.append(Layout(machine.ranks // (tensor * shard), shard, tensor, gather))
    return sorted(found, key=preference)


def layer_passes_gather(layout: Layout) -> bool:
    """Whether every forward pass gathers the weights anew."""
    return layout.shard > 1 and layout.gather is Gather.layer


def preference(layout: Layout) -> tuple[int, int, int]:
    gathers = 0 if layout.shard == 1 else 1 if layout.gather is Gather.member else 2
    return gathers, layout.shard * layout.tensor, layout.shard
