"""FSDP2 × tensor parallel, through transformers' `DistributedConfig`.

transformers shards the model while it has no storage (on the meta device); then each rank allocates
its own shards. Their values are not set: `sharding.weight_files.load` or a center fills them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import DistributedConfig, PreTrainedModel
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from shardes.config.schema import Gather, Offload, ShardingConfig
from shardes.distributed.world import World
from shardes.engines import linear
from shardes.engines.vocabulary import VocabularySlice
from shardes.sharding.regions import ParameterShard, Region, box_regions, cut


class FSDPEngine:
    """A causal language model under FSDP2 × tensor parallel: implements `engines.Engine`.

    Args:
        module: the unsharded model on the meta device (buffers real), in its dtype.
        world: this rank's replica.
        sharding: when weights are gathered, and whether shards are offloaded to the host. With
            `shard` = 1 nothing is gathered.
    """

    def __init__(self, module: PreTrainedModel, world: World, sharding: ShardingConfig):
        shards, tensors = world.mesh.shape
        shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
        module.requires_grad_(False).eval()
        buffers = {name: buffer.to(world.device) for name, buffer in module.named_buffers()}
        # On a CPU the shards are on the host anyway, and FSDP's policy would pin their memory.
        offload = sharding.offload is Offload.cpu and world.device.type != "cpu"
        vocab_parallel = False
        linear.use_own_forward(module)  # not later: tensor parallelism wraps these passes
        if shards * tensors > 1:
            vocab_parallel = distribute(
                module,
                DistributedConfig(tp_size=tensors, fsdp_size=shards, fsdp_cpu_offload=offload),
            )
        module.to_empty(device="cpu" if offload else world.device)
        _tie(module)
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name]

        self.device = world.device
        self.vocabulary = None
        if vocab_parallel:
            first, _ = _chunk(module.config.get_text_config().vocab_size, *_axis(world, "tensor"))
            self.vocabulary = VocabularySlice(first, world.mesh.get_group("tensor"))
        self._module = module
        self.shards = [
            _shard(name, shapes[name], param, world) for name, param in module.named_parameters()
        ]
        assert [shard.name for shard in self.shards] == list(shapes)
        self.sync_forwards = shards > 1 and sharding.gather is Gather.layer
        self._groups = [child for child in module.modules() if isinstance(child, FSDPModule)]
        if shards > 1 and sharding.gather is Gather.member:
            assert isinstance(module, FSDPModule)
            module.set_reshard_after_forward(False)

    @contextmanager
    def gathered(self) -> Iterator[PreTrainedModel]:
        """The module, with the weights that the shards have on entry."""
        if not self.sync_forwards:
            for group in self._groups:
                group.unshard()
        try:
            yield self._module
        finally:
            # Without this the root's parameters would stay gathered, in either mode.
            for group in self._groups:
                group.reshard()


def distribute(module: PreTrainedModel, distributed: DistributedConfig) -> bool:
    """Shard the module as `from_pretrained(distributed_config=...)` does, tied embeddings included.

    Tensor parallelism needs tied parameters to be separate tensors, and FSDP cannot share one
    between groups. So they are untied for tensor parallelism, tied again, and left to FSDP's root
    group. transformers would gather the logits of a head that is sharded along the vocabulary; here
    each rank keeps its slice of them. Returns whether the head is sharded so.
    """
    _, _, mesh = module.prepare_distribute_model(distributed)
    assert mesh is not None
    tensors, shards = distributed.tp_size or 1, distributed.fsdp_size or 1
    module.config.distributed_config = distributed
    tied = {
        name.rpartition(".")[0] for pair in module.all_tied_weights_keys.items() for name in pair
    }
    untied_plan = {name: style for name, style in module.fsdp_plan.items() if name not in tied}
    module._fsdp_plan = untied_plan
    # Up to transformers 5.17 a module's plans are what they are applied as.
    resolve = getattr(module, "_resolve_parallel_plans", None)
    tp_plan, ep_plan, fsdp_plan = (
        resolve(distributed) if resolve else (dict(module.tp_plan), {}, untied_plan)
    )
    vocab_parallel = tensors > 1 and tp_plan.get("lm_head") == "colwise_gather_output"
    if vocab_parallel:
        tp_plan = tp_plan | {"lm_head": "colwise"}
    if not resolve:  # its mesh has one axis, without a name
        kind, axis_names = mesh.device_type, ("fsdp", "tp")  # type: ignore[attr-defined]
        axes = init_device_mesh(kind, (shards, tensors), mesh_dim_names=axis_names)
    if tensors > 1:
        for target in module.all_tied_weights_keys:
            owner, _, key = target.rpartition(".")
            weights = module.get_submodule(owner)._parameters
            weights[key] = nn.Parameter(
                torch.empty_like(module.get_parameter(target)), requires_grad=False
            )
        if resolve:
            apply_tensor_parallelism(module, mesh.get_mesh("tp"), tp_plan)
        else:
            module._tp_plan = tp_plan
            apply_tensor_parallelism(module, axes["tp"])  # type: ignore[call-arg]
        _tie(module)
    if shards > 1:
        if resolve:
            apply_fully_sharded_data_parallelism(module, mesh, fsdp_plan, ep_plan)
        else:
            apply_fully_sharded_data_parallelism(module, axes["fsdp"])  # type: ignore[call-arg, arg-type]
    return vocab_parallel


def _tie(module: PreTrainedModel) -> None:
    for target, source in module.all_tied_weights_keys.items():
        owner, _, key = target.rpartition(".")
        module.get_submodule(owner)._parameters[key] = module.get_parameter(source)


def _shard(name: str, shape: tuple[int, ...], param: nn.Parameter, world: World) -> ParameterShard:
    """This rank's shard of a parameter."""
    tensor = param.detach()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    by_tensor, by_shard = placements(param)
    axes = _axis(world, "tensor"), _axis(world, "shard")
    regions, counted = regions_of(shape, by_tensor, by_shard, *axes)
    tensor_regions, _ = regions_of(shape, by_tensor, Replicate(), *axes)
    shard = ParameterShard(name, shape, local.view(-1), regions, tensor_regions, counted)
    assert shard.numel == local.numel(), name
    return shard


def _axis(world: World, name: str) -> tuple[int, int]:
    """The number of ranks along an axis of the mesh, and this rank's position."""
    return world.mesh[name].size(), world.mesh[name].get_local_rank()


def placements(param: nn.Parameter) -> tuple[Placement, Placement]:
    """How tensor parallelism and FSDP shard a parameter."""
    by_axis: dict[str, Placement] = {}
    if isinstance(param, DTensor):
        by_axis = dict(zip(param.device_mesh.mesh_dim_names or (), param.placements, strict=True))
    return by_axis.get("tp", Replicate()), by_axis.get("fsdp", Replicate())


def regions_of(
    shape: tuple[int, ...],
    by_tensor: Placement,
    by_shard: Placement,
    tensor: tuple[int, int],
    shard: tuple[int, int],
) -> tuple[tuple[Region, ...], bool]:
    """The regions of a parameter that one rank holds, and whether the rank counts their elements.

    Tensor parallelism shards one dimension, FSDP the rows of the resulting slice.

    Args:
        tensor, shard: (number of ranks, rank) of the two axes.
    """
    sizes, counted = list(shape), True
    regions = box_regions(shape, [0] * len(shape), shape)
    if by_tensor.is_replicate():
        counted = tensor[1] == 0
    else:
        assert isinstance(by_tensor, Shard | _StridedShard)
        dim = by_tensor.dim % len(shape)
        # A packed projection consists of several parts, and each is sharded.
        parts = getattr(by_tensor, "split_factor", 1)
        first, count = _chunk(shape[dim] // parts, *tensor)
        sizes[dim] = parts * count
        packed = (*shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :])
        lows, counts = [0] * len(packed), list(packed)
        lows[dim + 1], counts[dim + 1] = first, count
        regions = box_regions(packed, lows, counts)
    if by_shard.is_replicate():
        counted = counted and shard[1] == 0
    else:
        assert isinstance(by_shard, Shard | _StridedShard) and by_shard.dim == 0
        row_size = prod(sizes[1:])
        first, rows = _chunk(sizes[0], *shard)
        regions = cut(regions, first * row_size, (first + rows) * row_size)
    return regions, counted


def _chunk(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The start and size of a rank's chunk of a dimension, as `torch.chunk` computes them."""
    step = -(-size // ranks)
    first = min(step * rank, size)
    return first, min(step, size - first)
