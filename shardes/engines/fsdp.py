"""FSDP2 × tensor parallel, through transformers' `DistributedConfig`.

transformers cuts the model up while it has no storage (meta tensors); then each rank allocates its own part.
The shards' values are left unset; `weights.load` or a center fills them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig, PreTrainedModel
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from shardes.config import Gather, Offload, ShardingConfig
from shardes.shards import Shard, box_regions
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
        if shards * tensors > 1:
            _distribute(module, DistributedConfig(tp_size=tensors, fsdp_size=shards, fsdp_cpu_offload=offload))
        module.to_empty(device="cpu" if offload else world.device)
        _tie(module)
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name]

        self.device = world.device
        self._module = module
        self.shards = [_shard(name, shapes[name], param, world) for name, param in module.named_parameters()]
        assert [shard.name for shard in self.shards] == list(shapes)
        self.lockstep = shards > 1 and sharding.gather is Gather.layer
        self._groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
        if shards > 1 and sharding.gather is Gather.member:
            module.set_reshard_after_forward(False)

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        """The module, ready to generate with the shards' present weights."""
        if not self.lockstep:
            for group in self._groups:
                group.unshard()
        try:
            yield self._module
        finally:
            for group in self._groups:  # the root's stays gathered after a pass, in either mode
                group.reshard()


def _distribute(module: PreTrainedModel, distributed: DistributedConfig) -> None:
    """What `from_pretrained(distributed_config=...)` does before it loads, for tied embeddings too.

    Tensor parallel wants tied parameters apart, and FSDP cannot share one between groups: so they are untied, tied
    again in between, and left to the root's group.
    """
    _, _, mesh = module.prepare_distribute_model(distributed)
    module.config.distributed_config = distributed
    tied = {name.rpartition(".")[0] for pair in module.all_tied_weights_keys.items() for name in pair}
    module.fsdp_plan = {name: style for name, style in module.fsdp_plan.items() if name not in tied}
    tp_plan, ep_plan, fsdp_plan = module._resolve_parallel_plans(distributed)
    if distributed.tp_size > 1:
        for target in module.all_tied_weights_keys:
            owner, _, key = target.rpartition(".")
            weights = module.get_submodule(owner)._parameters
            weights[key] = nn.Parameter(torch.empty_like(weights[key]), requires_grad=False)
        apply_tensor_parallelism(module, mesh.get_mesh("tp"), tp_plan)
        _tie(module)
    if distributed.fsdp_size > 1:
        apply_fully_sharded_data_parallelism(module, mesh, fsdp_plan, ep_plan)


def _tie(module: PreTrainedModel) -> None:
    for target, source in module.all_tied_weights_keys.items():
        owner, _, key = target.rpartition(".")
        module.get_submodule(owner)._parameters[key] = module.get_parameter(source)


def _shard(name: str, shape: tuple[int, ...], param: nn.Parameter, world: World) -> Shard:
    """This rank's part of a parameter, a box of the full tensor: tensor parallel cuts first, FSDP what is left."""
    lows, sizes = [0] * len(shape), list(shape)
    local, owned = param.detach(), True
    placements = {}
    if isinstance(param, DTensor):
        placements = dict(zip(param.device_mesh.mesh_dim_names, param.placements, strict=True))
        local = local.to_local()
    for axis, dimension in (("tensor", "tp"), ("shard", "fsdp")):
        ranks, rank = world.mesh[axis].size(), world.mesh[axis].get_local_rank()
        placement = placements.get(dimension)
        if placement is None or placement.is_replicate():
            owned = owned and rank == 0
        else:
            chunk = -(-sizes[placement.dim] // ranks)  # as torch.chunk cuts
            first = min(chunk * rank, sizes[placement.dim])
            lows[placement.dim] += first
            sizes[placement.dim] = min(chunk, sizes[placement.dim] - first)
    assert tuple(sizes) == tuple(local.shape), (name, sizes, local.shape)
    return Shard(name, shape, local.view(-1), box_regions(shape, lows, sizes), owned)
