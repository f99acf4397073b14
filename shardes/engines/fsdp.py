"""FSDP2 × tensor parallel, through transformers' `DistributedConfig`.

transformers cuts the model up while it has no storage (meta tensors); then each rank allocates its own part.
The shards' values are left unset; `weights.load` or a center fills them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor.placement_types import _StridedShard as StridedCut
from transformers import DistributedConfig, PreTrainedModel
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from shardes.config import Gather, Offload, ShardingConfig
from shardes.engines import cpu
from shardes.engines.vocabulary import VocabularyPart
from shardes.shards import Region, Shard, box_regions, cut
from shardes.world import World


class FSDPEngine:
    """A causal language model under FSDP2 × tensor parallel: implements `engines.Engine`.

    Args:
        module: the unsharded model on the meta device (buffers real), in its dtype.
        world: this rank's replica.
        sharding: says when weights are gathered, and whether shards wait on the host. Without a shard axis nothing
            is gathered at all.
    """

    def __init__(self, module: PreTrainedModel, world: World, sharding: ShardingConfig):
        shards, tensors = world.mesh.shape
        shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
        module.requires_grad_(False).eval()
        buffers = {name: buffer.to(world.device) for name, buffer in module.named_buffers()}
        # On a CPU the shards are on the host as it is, and FSDP's policy would want to pin them.
        offload = sharding.offload is Offload.cpu and world.device.type != "cpu"
        in_parts = False
        if shards * tensors > 1:
            in_parts = distribute(
                module, DistributedConfig(tp_size=tensors, fsdp_size=shards, fsdp_cpu_offload=offload)
            )
        module.to_empty(device="cpu" if offload else world.device)
        _tie(module)
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name]

        if world.device.type == "cpu":
            cpu.speed_up(module)

        self.device = world.device
        self.vocabulary = None
        if in_parts:
            first, _ = _chunk(module.config.vocab_size, *_axis(world, "tensor"))
            self.vocabulary = VocabularyPart(first, world.mesh.get_group("tensor"))
        self._module = module
        self.shards = [_shard(name, shapes[name], param, world) for name, param in module.named_parameters()]
        assert [shard.name for shard in self.shards] == list(shapes)
        self.lockstep = shards > 1 and sharding.gather is Gather.layer
        self._groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
        if shards > 1 and sharding.gather is Gather.member:
            assert isinstance(module, FSDPModule)
            module.set_reshard_after_forward(False)

    @contextmanager
    def ready(self) -> Iterator[PreTrainedModel]:
        """The module, ready to generate with the shards' present weights."""
        if not self.lockstep:
            for group in self._groups:
                group.unshard()
        try:
            yield self._module
        finally:
            for group in self._groups:  # the root's stays gathered after a pass, in either mode
                group.reshard()


def distribute(module: PreTrainedModel, distributed: DistributedConfig) -> bool:
    """What `from_pretrained(distributed_config=...)` does before it loads, for tied embeddings too.

    Tensor parallel wants tied parameters apart, and FSDP cannot share one between groups: so they are untied, tied
    again in between, and left to the root's group. Where transformers would gather the logits of a head that is cut
    along the vocabulary, each rank keeps its own part of them: returns whether that is so.
    """
    _, _, mesh = module.prepare_distribute_model(distributed)
    assert mesh is not None
    tensors, shards = distributed.tp_size or 1, distributed.fsdp_size or 1
    module.config.distributed_config = distributed
    tied = {name.rpartition(".")[0] for pair in module.all_tied_weights_keys.items() for name in pair}
    kept = {name: style for name, style in module.fsdp_plan.items() if name not in tied}
    module.fsdp_plan = kept  # type: ignore[misc]  # it has a setter, apart from its getter
    tp_plan, ep_plan, fsdp_plan = module._resolve_parallel_plans(distributed)
    in_parts = tensors > 1 and tp_plan.get("lm_head") == "colwise_gather_output"
    if in_parts:
        tp_plan = tp_plan | {"lm_head": "colwise"}
    if tensors > 1:
        for target in module.all_tied_weights_keys:
            owner, _, key = target.rpartition(".")
            weights = module.get_submodule(owner)._parameters
            weights[key] = nn.Parameter(torch.empty_like(module.get_parameter(target)), requires_grad=False)
        apply_tensor_parallelism(module, mesh.get_mesh("tp"), tp_plan)
        _tie(module)
    if shards > 1:
        apply_fully_sharded_data_parallelism(module, mesh, fsdp_plan, ep_plan)
    return in_parts


def _tie(module: PreTrainedModel) -> None:
    for target, source in module.all_tied_weights_keys.items():
        owner, _, key = target.rpartition(".")
        module.get_submodule(owner)._parameters[key] = module.get_parameter(source)


def _shard(name: str, shape: tuple[int, ...], param: nn.Parameter, world: World) -> Shard:
    """This rank's part of a parameter."""
    held = param.detach()
    local = held.to_local() if isinstance(held, DTensor) else held
    regions, owned = regions_of(shape, *placements(param), _axis(world, "tensor"), _axis(world, "shard"))
    shard = Shard(name, shape, local.view(-1), regions, owned)
    assert shard.numel == local.numel(), name
    return shard


def _axis(world: World, name: str) -> tuple[int, int]:
    """The ranks along an axis of the mesh, and this one's place among them."""
    return world.mesh[name].size(), world.mesh[name].get_local_rank()


def placements(param: nn.Parameter) -> tuple[Placement, Placement]:
    """How tensor parallel and FSDP cut a parameter."""
    found: dict[str, Placement] = {}
    if isinstance(param, DTensor):
        found = dict(zip(param.device_mesh.mesh_dim_names or (), param.placements, strict=True))
    return found.get("tp", Replicate()), found.get("fsdp", Replicate())


def regions_of(
    shape: tuple[int, ...],
    by_tensor: Placement,
    by_shard: Placement,
    tensor: tuple[int, int],
    shard: tuple[int, int],
) -> tuple[tuple[Region, ...], bool]:
    """The regions of a parameter that one rank holds, and whether the rank counts them in sums.

    Tensor parallel cuts a slice, FSDP cuts rows of what that leaves. `tensor` and `shard` are (ranks, rank) of
    the two axes.
    """
    sizes, owned = list(shape), True
    regions = box_regions(shape, [0] * len(shape), shape)
    if by_tensor.is_replicate():
        owned = tensor[1] == 0
    else:
        assert isinstance(by_tensor, Cut | StridedCut)
        dim = by_tensor.dim % len(shape)
        parts = getattr(by_tensor, "split_factor", 1)  # a packed projection: each of its parts is cut
        first, count = _chunk(shape[dim] // parts, *tensor)
        sizes[dim] = parts * count
        packed = (*shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :])
        lows, counts = [0] * len(packed), list(packed)
        lows[dim + 1], counts[dim + 1] = first, count
        regions = box_regions(packed, lows, counts)
    if by_shard.is_replicate():
        owned = owned and shard[1] == 0
    else:
        assert isinstance(by_shard, Cut | StridedCut) and by_shard.dim == 0
        row_size = prod(sizes[1:])
        first, rows = _chunk(sizes[0], *shard)
        regions = cut(regions, first * row_size, (first + rows) * row_size)
    return regions, owned


def _chunk(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Where a rank's part of a dimension begins, and its size, as torch.chunk cuts."""
    step = -(-size // ranks)
    first = min(step * rank, size)
    return first, min(step, size - first)
