"""The memory of a rank, computed before anything starts.

Sizes are in bytes, of the largest rank. Without GPUs, everything is in host memory. Tests compare
the CPU's figures with measured runs. Those of GPUs were not compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedConfig

from shardes.config.schema import (
    Config,
    EngineName,
    ESConfig,
    Gather,
    Offload,
    Restore,
    VLLMConfig,
)
from shardes.engines.vllm_adapters import Slots
from shardes.es.center import SAMPLE
from shardes.es.staging import MARGIN, lies_on_device, needed_bytes
from shardes.planning.layouts import Layout, Machine
from shardes.planning.shapes import (
    ModelShapes,
    factor_elements,
    held_elements,
    slice_elements,
)
from shardes.planning.workload import Workload

# Freed memory that glibc's malloc does not return to the system, as measured: a constant from
# loading, and as much as the temporaries take at a time. Blocks above 32 MiB, of which a layer has
# about seven at a time, are mapped one by one and are returned.
MALLOC_HOLES, MALLOC_MAPPED = 48 << 20, 7 * 32 << 20
# The most that DeepSpeed's sums through shared memory take at a time
SHARED_SUMS = 32 << 20
# Measured on a CPU: Python, torch, deepspeed, compiled kernels and a tiny model
LIBRARIES = 720_000_000
SCORE = 8  # bytes of an attention score: two float32 numbers, or one and two 16-bit numbers
# Measured on a CPU with a tiny model: what engine=vllm takes beyond engine=fsdp, without its cache
VLLM_LIBRARIES = 240_000_000
# The tokens and the sequences of a step of vLLM at most, where it has the largest GPUs
STEP_TOKENS, STEP_ROWS = 16384, 1024
PREFETCH = 50_000_000  # elements that ZeRO-3 gathers ahead: DeepSpeed's default


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose, of the largest rank: on its GPU, and on the host."""

    gpu: dict[str, int]
    host: dict[str, int]

    def fits(self, machine: Machine) -> bool:
        return self.room(machine) >= 0 and self.host_per_node(machine) <= machine.host_memory

    def room(self, machine: Machine) -> float:
        """The bytes that a rank has left where it computes; below 0: it does not fit."""
        if machine.gpu_memory is not None:
            return machine.gpu_memory - sum(self.gpu.values())
        return (machine.host_memory - self.host_per_node(machine)) / machine.per_node

    def host_per_node(self, machine: Machine) -> int:
        """The host memory of a node's ranks."""
        return machine.per_node * sum(self.host.values())


def rank_memory(
    model: ModelShapes,
    layout: Layout,
    workload: Workload,
    es: ESConfig,
    gpu_memory: float | None,
    tensor_rank: int = 0,
    center_on_device: bool = False,
) -> Memory:
    """The peak memory of a rank.

    Args:
        gpu_memory: None on CPUs.
        center_on_device: whether a float32 center lies on the GPU.
    """
    held = held_elements(model, layout.tensor, layout.shard, tensor_rank)
    copies = es.restore is Restore.copy
    live = {"live shard": held * model.itemsize}
    center = {"center": held * 4 if copies else held // SAMPLE * model.itemsize}
    batches = [batch for lengths in workload.of_rank(layout) for batch in workload.batches(lengths)]
    tokens = max(workload.rows(rows) * workload.length(width) for rows, width in batches)
    computing = {
        "gathered weights": _gathered(model, layout, tensor_rank) * model.itemsize,
        "key-value cache": _token_bytes(model, layout.tensor) * tokens,
        "largest temporaries": max(
            temporaries(model, layout.tensor, rows, width) for rows, width in batches
        ),
    }
    factors: Sequence[int] = ()  # elements of a member's, by matrix
    if workload.members > 1:
        factors = factor_elements(model, layout.tensor, es.rank, es.evolve, tensor_rank)
        seeds = -(-workload.members // (2 if es.antithetic else 1))
        computing["low-rank factors"] = seeds * sum(factors) * 4
    if gpu_memory is None:
        more = _only_on_cpu(model, layout, batches, live, computing)
        computing["largest temporaries"] = max(
            computing["largest temporaries"], _gloo_copy(model, layout, tensor_rank)
        )
        return Memory({}, live | center | computing | more)
    # Each row's factors of a matrix: gathered, scaled in float32, and cast
    of_row = max(factors, default=0) * (8 + model.itemsize)
    computing["largest temporaries"] += workload.rows(max(rows for rows, _ in batches)) * of_row
    gpu: dict[str, int] = {}
    host = {"libraries": LIBRARIES}
    (host if layout.offload is Offload.cpu else gpu).update(live)
    (host if copies and not center_on_device else gpu).update(center)
    return Memory(gpu | computing | {"reserve": int(MARGIN * gpu_memory)}, host)


def center_on_device(
    config: Config, model: ModelShapes, sizes: PreTrainedConfig, gpu_memory: float | None
) -> bool:
    """Whether a run keeps a float32 center on its GPU; the rule is the run's own.

    Args:
        sizes: the model's config.
        gpu_memory: None on CPUs.
    """
    if gpu_memory is None or config.es.restore is Restore.subtract:
        return False
    sharding = config.sharding
    layout = Layout(1, sharding.shard, sharding.tensor, sharding.gather, sharding.offload)
    held = held_elements(model, layout.tensor, layout.shard)
    slices = [numel * model.itemsize for numel in slice_elements(model, layout.tensor)]
    allocated = held
    if model.engine is EngineName.deepspeed and layout.gather is Gather.member:
        allocated += _gathered(model, layout, 0)
    free = (1 - MARGIN) * gpu_memory - allocated * model.itemsize
    needed = needed_bytes(config, sizes, held, model.itemsize, slices)
    return lies_on_device(config, lambda: needed <= free)


def _gloo_copy(model: ModelShapes, layout: Layout, tensor_rank: int) -> int:
    """The bytes of the copy of the largest slice that gloo gathers into."""
    if not _gathers(model, layout) or layout.gather is not Gather.member:
        return 0
    return max(slice_elements(model, layout.tensor, tensor_rank)) * model.itemsize


def _token_bytes(model: ModelShapes, tensor: int) -> int:
    """A token's keys and values on a rank."""
    heads = -(-model.num_key_value_heads // tensor)
    return 2 * model.num_hidden_layers * heads * model.head_dim * model.itemsize


def cached_tokens(model: ModelShapes, tensor: int, vllm: VLLMConfig) -> int:
    """The tokens that the key-value cache of engine=vllm holds on a rank, at least."""
    return int(vllm.cache_size * 1e9) // _token_bytes(model, tensor)


def vllm_memory(
    model: ModelShapes,
    layout: Layout,
    workload: Workload,
    es: ESConfig,
    vllm: VLLMConfig,
    gpu_memory: float | None,
    center_on_device: bool = False,
) -> Memory:
    """The peak memory of a rank with engine=vllm; `gpu_memory` is None on CPUs.

    vLLM allocates the key-value cache at the start. Compiled code and graphs come on top.
    """
    held = held_elements(model, layout.tensor, 1)
    lists = workload.of_rank(layout)
    rows = min(max(map(len, lists)), STEP_ROWS)
    tokens = min(max(map(sum, lists)), STEP_TOKENS)
    logits = 3 * 4 * rows * model.vocab_size  # float32, and what choosing a token makes
    step = temporaries(model, layout.tensor, rows, -(-tokens // rows))
    live = {"live shard": held * model.itemsize}
    center = {"center": held * 4}
    computing = {
        "key-value cache": int(vllm.cache_size * 1e9),
        "largest temporaries": max(step, logits),
    }
    if workload.members > 1:  # each has a slot for its adapter, of a rank that vLLM has
        slots = Slots(workload.members, es.rank).arguments()
        factors = sum(factor_elements(model, 1, slots["max_lora_rank"], es.evolve))
        computing["low-rank factors"] = slots["max_loras"] * factors * model.itemsize
    libraries = {"libraries": LIBRARIES + VLLM_LIBRARIES}
    if gpu_memory is None:
        packed = {"packed experts": model.experts_numel // layout.tensor * model.itemsize}
        return Memory({}, live | center | computing | packed | libraries)
    reserve = {"reserve": int(MARGIN * gpu_memory)}
    if center_on_device:
        return Memory(live | center | computing | reserve, libraries)
    return Memory(live | computing | reserve, center | libraries)


def _only_on_cpu(
    model: ModelShapes,
    layout: Layout,
    batches: Sequence[tuple[int, int]],
    live: dict[str, int],
    computing: dict[str, int],
) -> dict[str, int]:
    shared = 0
    if model.engine is EngineName.deepspeed and layout.tensor > 1 and layout.shard == 1:
        tokens = max(rows * width for rows, width in batches)
        state = tokens * model.hidden_size * model.itemsize
        shared = 2 * layout.tensor * min(state, SHARED_SUMS)  # two buffers of each rank
    holes = MALLOC_HOLES + min(computing["largest temporaries"], MALLOC_MAPPED)
    return {
        "held free by malloc": min(live["live shard"], holes),
        "sums through shared memory": shared,
        "libraries": LIBRARIES,
    }


def temporaries(model: ModelShapes, tensor: int, rows: int, width: int) -> int:
    """The peak memory of the forward pass of a batch of prompts, without weights and cache.

    Per token: the embedded prompt, a layer's input, its residual and normalized state, and either
    three intermediate states, or queries, keys and values with those repeated for every head; with
    these, the scores of attention that holds them. Per row: the logits.
    """
    share = -(-model.num_key_value_heads // tensor) / model.num_key_value_heads
    queries = model.num_attention_heads * model.head_dim * share
    keys = model.num_key_value_heads * model.head_dim * share
    hidden = model.hidden_size
    dense = 3 * model.intermediate_size / tensor
    if model.num_experts:
        dense = model.num_experts_per_tok * (2 * hidden + 3 * model.moe_intermediate_size / tensor)
    per_token = model.itemsize * rows * width
    wide = per_token * (4 * hidden + dense + 2 * model.head_dim)
    attention = per_token * (3 * hidden + 5 * queries + 2 * keys + 2 * model.head_dim)
    if model.has_scores:
        attention += rows * model.num_attention_heads * share * width**2 * SCORE
    logits = rows * (width * hidden + model.vocab_size / tensor) * model.itemsize
    return int(max(wide, attention, logits))


def _gathers(model: ModelShapes, layout: Layout) -> bool:
    offloaded = layout.offload is Offload.cpu and model.engine is EngineName.deepspeed
    return layout.shard > 1 or offloaded


def _gathered(model: ModelShapes, layout: Layout, tensor_rank: int) -> int:
    """The elements that are gathered at a time."""
    if not _gathers(model, layout):
        return 0
    layer, outside = _largest(model, layout.tensor, tensor_rank)
    fsdp = model.engine is EngineName.fsdp
    if layout.gather is Gather.member:
        slices = sum(slice_elements(model, layout.tensor, tensor_rank))
        return slices + (layer if fsdp else 0)  # FSDP copies a layer out of the gathered ones
    if fsdp:  # this layer, the next, and the root's group, which stays gathered
        return 2 * layer + outside
    return max(layer, outside) + PREFETCH


@lru_cache(maxsize=256)
def _largest(model: ModelShapes, tensor: int, tensor_rank: int) -> tuple[int, int]:
    """The elements of the largest decoder layer, and of the largest parameter outside of layers."""
    layers: dict[str, int] = {}
    outside = 0
    slices = slice_elements(model, tensor, tensor_rank)
    for parameter, numel in zip(model.parameters, slices, strict=True):
        prefix, in_layer, suffix = parameter.name.partition(".layers.")
        if in_layer:
            layer = prefix + suffix.partition(".")[0]
            layers[layer] = layers.get(layer, 0) + numel
        else:
            outside = max(outside, numel)
    return max(layers.values(), default=0), outside
