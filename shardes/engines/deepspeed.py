"""DeepSpeed's ZeRO-3 × AutoTP, without an optimizer.

No rank ever holds the whole model. It is built without storage (on the meta device), AutoTP
replaces its layers by their tensor-parallel slices, still without storage, and then ZeRO-3
partitions one parameter at a time. The values of the shards are not set:
`sharding.weight_files.load` or a center fills them.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from io import StringIO
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist

from shardes.distributed import environment

with environment.quiet():
    import deepspeed

from deepspeed.module_inject import set_autotp_mode
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, VocabParallelLinear
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import logger
from torch import nn
from transformers import PreTrainedModel

from shardes.config.schema import Gather, Offload, ShardingConfig
from shardes.distributed.world import World, all_gather
from shardes.engines import cpu, linear
from shardes.engines.vocabulary import VocabularySlice
from shardes.errors import ConfigError
from shardes.sharding.regions import ParameterShard, Region, cut, strided_regions

logger.setLevel(logging.WARNING)


class _EmptyModelEngine(deepspeed.DeepSpeedEngine):
    """DeepSpeed's own engine, for a model without values."""

    def _broadcast_model(self) -> None:
        # DeepSpeed calls this between AutoTP and ZeRO-3. There are no values to broadcast, but
        # ZeRO-3 partitions only parameters with storage. Pages of an empty CPU tensor that nobody
        # touches take no memory.
        allocated: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
        for module in self.module.modules():
            for key, param in module._parameters.items():
                if param is not None and param not in allocated:
                    allocated[param] = nn.Parameter(
                        torch.empty(param.shape, dtype=param.dtype), requires_grad=False
                    )
                    allocated[param].__dict__.update(param.__dict__)  # how AutoTP split it
                module._parameters[key] = allocated.get(param)


class ZeroParameter(nn.Parameter):
    """A parameter with the attributes that ZeRO-3 adds.

    `ds_tensor` is this rank's partition, flat and padded. `ds_numel` and `ds_shape` describe the
    tensor-parallel slice.
    """

    ds_tensor: torch.Tensor
    ds_numel: int
    ds_shape: torch.Size
    ds_status: ZeroParamStatus


class DeepSpeedEngine:
    """A causal language model under ZeRO-3 × AutoTP: implements `engines.Engine`.

    Args:
        module: the unsharded model on the meta device (buffers real), in its dtype.
        world: this rank's replica.
        sharding: when weights are gathered, and whether shards are offloaded to the host. With
            `shard` = 1 and no offloading, nothing is gathered.
    """

    def __init__(self, module: PreTrainedModel, world: World, sharding: ShardingConfig):
        shards = world.mesh.shape[0]
        shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
        module.eval()
        self._runtime, shm_all_reduce = _initialize(module, world, sharding)
        # Not earlier: AutoTP registers gradient hooks where a plan asks for them (Qwen3's norms).
        module.requires_grad_(False)
        _use_own_forward(module, shm_all_reduce or dist.all_reduce)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(world.device)

        self.device = world.device
        self.vocabulary = None
        head = getattr(module, "lm_head", None)
        if isinstance(head, VocabParallelLinear):
            group = world.mesh.get_group("tensor")
            self.vocabulary = VocabularySlice(head.vocab_start_index, group)
        self._module = module
        self._params = {
            name: cast(ZeroParameter, param) for name, param in module.named_parameters()
        }
        if list(self._params) != list(shapes):
            raise ConfigError(
                f"sharding.tensor: AutoTP changes the parameters of {type(module).__name__}; use "
                "engine=fsdp, or sharding.shard instead"
            )
        self.shards = [
            _shard(name, shapes[name], param, world) for name, param in self._params.items()
        ]
        self._group = world.mesh.get_group("shard")
        self._buffers: dict[str, torch.Tensor] = {}
        self._gather = sharding.gather if shards > 1 or sharding.offload is Offload.cpu else None
        self.sync_forwards = self._gather is Gather.layer
        if not self.sync_forwards:
            self._runtime.optimizer.destroy()  # removes the hooks that gather layer by layer
        if self._gather is None:
            for param in self._params.values():
                _set_available(param, param.ds_tensor)
        elif self._gather is Gather.member:
            self._buffers = {
                name: torch.empty(
                    param.ds_tensor.numel() * shards, dtype=param.dtype, device=self.device
                )
                for name, param in self._params.items()
            }

    @contextmanager
    def gathered(self) -> Iterator[PreTrainedModel]:
        """The module, with the weights that the shards have on entry."""
        if self._gather is not Gather.member:
            yield self._module
            return
        for name, param in self._params.items():
            all_gather(self._buffers[name], param.ds_tensor.to(self.device), group=self._group)
            _set_available(param, self._buffers[name])
        try:
            yield self._module
        finally:
            for param in self._params.values():
                param.data = torch.empty(0, dtype=param.dtype, device=self.device)
                param.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _initialize(
    module: PreTrainedModel, world: World, sharding: ShardingConfig
) -> tuple[_EmptyModelEngine, Callable[..., object] | None]:
    """DeepSpeed's engine around the module, and its all-reduce through shared memory.

    The latter is None where it cannot serve the tensor axis: on GPUs and across hosts, and beside a
    shard axis, because it sums over all ranks of the replica.
    """
    shards, tensors = world.mesh.shape
    on_cpu = world.device.type == "cpu"
    shared_memory = cpu.shared_memory(world.replica) if on_cpu else nullcontext(False)
    # Every rank prints what it builds for the CPU.
    with redirect_stdout(StringIO()), shared_memory as has_shared_memory:
        deepspeed.init_distributed(dist_init_required=False)
    set_autotp_mode(training=True)
    runtime = _EmptyModelEngine(
        args=None,
        model=module,
        config_class=DeepSpeedConfig(
            _deepspeed_config(module, tensors, sharding.offload, world.device)
        ),
        dont_change_device=True,
    )
    if tensors > 1:
        # Removes DeepSpeed's check that all ranks have the same first batch: it broadcasts the
        # pickled inputs, key-value caches included.
        runtime.first_dataloader_check.remove()
    usable = has_shared_memory and shards == 1
    return runtime, deepspeed.comm.inference_all_reduce if usable else None


def _use_own_forward(module: nn.Module, all_reduce: Callable[..., object]) -> None:
    """Let linear layers, whole or split by AutoTP, use our forward passes and this all-reduce."""
    linear.use_own_forward(module)
    for layer in module.modules():
        if type(layer) is LinearAllreduce:
            layer.forward = partial(linear.forward_row_parallel, all_reduce, layer)
        elif type(layer) in (LinearLayer, VocabParallelLinear) and not layer.gather_output:
            layer.forward = partial(linear.forward, layer)


def _deepspeed_config(
    module: nn.Module, tensors: int, offload: Offload, device: torch.device
) -> dict:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # It replaces F.linear by an autograd function to save memory in training.
            "memory_efficient_linear": False,
        },
    }
    if offload is Offload.cpu:
        pinned = device.type != "cpu"
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    if tensors > 1:
        config["tensor_parallel"] = {
            "autotp_size": tensors,
            "vocab_parallel_lm_head": _can_slice_head(module),
        }
    return config


def _can_slice_head(module: nn.Module) -> bool:
    """Whether AutoTP can slice the head along the vocabulary.

    It cannot if an embedding that is tied to the head does more than look up rows: Gemma's scales
    them.
    """
    head = getattr(module, "lm_head", None)
    return type(head) is nn.Linear and all(
        type(embedding).forward is nn.Embedding.forward
        for embedding in module.modules()
        if isinstance(embedding, nn.Embedding) and embedding.weight is head.weight
    )


def _set_available(param: ZeroParameter, flat: torch.Tensor) -> None:
    """Let the module compute with `flat`, the parameter's tensor-parallel slice and padding."""
    param.data = flat[: param.ds_numel].view(param.ds_shape)
    param.ds_status = ZeroParamStatus.AVAILABLE


def _shard(name: str, shape: tuple[int, ...], param: ZeroParameter, world: World) -> ParameterShard:
    """This rank's ZeRO partition of its tensor-parallel slice of a parameter."""
    shard_rank, tensor_rank = (world.mesh.get_local_rank(axis) for axis in ("shard", "tensor"))
    regions, counted = slice_regions(name, shape, param, tensor_rank)
    assert sum(region.numel for region in regions) == param.ds_numel, name
    partition = zero_partition(regions, world.mesh.shape[0], shard_rank)
    return ParameterShard(name, shape, param.ds_tensor, partition, regions, counted)


def zero_partition(regions: tuple[Region, ...], shards: int, rank: int) -> tuple[Region, ...]:
    """The regions of a rank's ZeRO-3 partition of a slice: one of `shards` equal, padded pieces."""
    size = -(-sum(region.numel for region in regions) // shards)
    return cut(regions, rank * size, (rank + 1) * size)


def slice_regions(
    name: str, shape: tuple[int, ...], param: ZeroParameter, tensor_rank: int
) -> tuple[tuple[Region, ...], bool]:
    """The regions of a parameter's tensor-parallel slice, and whether this rank counts them."""
    meta = getattr(param, "ds_autotp_universal_checkpoint_meta", None)
    if meta is None:
        if tuple(param.ds_shape) != shape:
            raise ConfigError(
                f"engine=deepspeed: AutoTP does not record how it split {name}; "
                "use sharding.tensor=1"
            )
        return (Region.contiguous(0, prod(shape)),), tensor_rank == 0
    layout = meta["conversion"].get("affine_map")
    if layout is None:
        raise ConfigError(
            f"engine=deepspeed: AutoTP does not record how it split {name}; use sharding.tensor=1"
        )
    regions: list[Region] = []
    filled = 0
    for piece in sorted(layout["ranks"][tensor_rank]["pieces"], key=lambda piece: piece["dest"][0]):
        (source, source_strides), (dest, dest_strides) = piece["source"], piece["dest"]
        if "scale" in piece or dest != filled or not _is_contiguous(piece["shape"], dest_strides):
            raise ConfigError(
                f"engine=deepspeed: AutoTP's split of {name} cannot be described by regions; "
                "use sharding.tensor=1"
            )
        regions += strided_regions(piece["shape"], source, source_strides)
        filled += prod(piece["shape"])
    # Of the ranks that hold a piece, the first counts it.
    counted = {
        min(piece["locations"]) == tensor_rank for piece in layout["ranks"][tensor_rank]["pieces"]
    }
    assert len(counted) <= 1, name
    return tuple(regions), counted != {False}


def _is_contiguous(shape: list[int], strides: list[int]) -> bool:
    """Whether a view with these strides is contiguous."""
    return all(
        size == 1 or stride == prod(shape[d + 1 :])
        for d, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )
