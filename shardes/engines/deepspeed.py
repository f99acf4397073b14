"""ZeRO-3 × AutoTP, without optimizer.

The way to a model that no rank ever holds whole: build it without storage (meta tensors), let AutoTP replace
its layers by their tensor-parallel slices, still without storage, then let ZeRO-3 partition one parameter at
a time. The shards' values are left unset; `weights.load` or a center fills them.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from io import StringIO
from math import prod
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject import set_autotp_mode
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, VocabParallelLinear
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import logger
from torch import nn
from transformers import PreTrainedModel

from shardes.config import ConfigError, Gather, Offload, ShardingConfig
from shardes.engines import cpu
from shardes.engines.vocabulary import VocabularyPart
from shardes.shards import Region, Shard, cut, run, strided_regions
from shardes.world import World, all_gather

logger.setLevel(logging.WARNING)


class _Engine(Engine):
    """DeepSpeed's engine for a model that has no values yet."""

    def _broadcast_model(self) -> None:
        # Called between AutoTP and ZeRO-3. There are no values to broadcast. ZeRO-3 wants memory to
        # partition: untouched pages of an empty CPU tensor cost none.
        fresh: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
        for module in self.module.modules():
            for key, param in module._parameters.items():
                if param is not None and param not in fresh:
                    fresh[param] = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), requires_grad=False)
                    fresh[param].__dict__.update(param.__dict__)  # AutoTP's notes on its cut
                module._parameters[key] = fresh.get(param)


class ZeroParameter(nn.Parameter):
    """What ZeRO-3 adds to a parameter: this rank's flat part, padded, and size and shape of the whole."""

    ds_tensor: torch.Tensor
    ds_numel: int
    ds_shape: torch.Size
    ds_status: ZeroParamStatus


class DeepSpeedEngine:
    """A causal language model under ZeRO-3 × AutoTP: implements `engines.Engine`.

    Args:
        module: the unsharded model on the meta device (buffers real), in its dtype.
        world: this rank's replica.
        sharding: says when weights are gathered, and whether shards wait on the host. Without a shard axis, and
            not offloaded, nothing is gathered at all.
    """

    def __init__(self, module: PreTrainedModel, world: World, sharding: ShardingConfig):
        shards, tensors = world.mesh.shape
        shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
        module.requires_grad_(False).eval()
        on_cpu = world.device.type == "cpu"
        shared_memory = cpu.shared_memory(world.replica) if on_cpu else nullcontext(False)
        with redirect_stdout(StringIO()), shared_memory as shared:  # every rank prints what it builds for the CPU
            deepspeed.init_distributed(dist_init_required=False)
        set_autotp_mode(training=True)
        engine = _Engine(
            args=None,
            model=module,
            config_class=DeepSpeedConfig(_settings(module, tensors, sharding.offload)),
            dont_change_device=True,
        )
        if tensors > 1:
            # DeepSpeed's check of the first batch across ranks: broadcasts pickled inputs, caches included.
            engine.first_dataloader_check.remove()
        if on_cpu:
            # Shared memory sums over the whole replica, which is the tensor axis where there is no other.
            _speed_up(module, deepspeed.comm.inference_all_reduce if shared and shards == 1 else dist.all_reduce)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(world.device)

        self.device = world.device
        self.vocabulary = None
        head = getattr(module, "lm_head", None)
        if isinstance(head, VocabParallelLinear):
            self.vocabulary = VocabularyPart(head.vocab_start_index, world.mesh.get_group("tensor"))
        self._module = module
        self._params = {name: cast(ZeroParameter, param) for name, param in module.named_parameters()}
        assert list(self._params) == list(shapes)
        self.shards = [_shard(name, shapes[name], param, world) for name, param in self._params.items()]
        self._group = world.mesh.get_group("shard")
        self._buffers: dict[str, torch.Tensor] = {}
        self._gather = sharding.gather if shards > 1 or sharding.offload is Offload.cpu else None
        self.lockstep = self._gather is Gather.layer
        if not self.lockstep:
            engine.optimizer.destroy()  # the per-layer hooks
        if self._gather is None:
            for param in self._params.values():
                _show(param, param.ds_tensor)
        elif self._gather is Gather.member:
            self._buffers = {
                name: torch.empty(param.ds_tensor.numel() * shards, dtype=param.dtype, device=self.device)
                for name, param in self._params.items()
            }
        self._engine = engine

    @contextmanager
    def ready(self) -> Iterator[PreTrainedModel]:
        """The module, ready to generate with the shards' present weights."""
        if self._gather is not Gather.member:
            yield self._module
            return
        for name, param in self._params.items():
            all_gather(self._buffers[name], param.ds_tensor.to(self.device), group=self._group)
            _show(param, self._buffers[name])
        try:
            yield self._module
        finally:
            for param in self._params.values():
                param.data = torch.empty(0, dtype=param.dtype, device=self.device)
                param.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _speed_up(module: nn.Module, all_reduce: Callable[..., object]) -> None:
    """Let linear layers on a CPU, whole or cut by AutoTP, use the faster product and sum."""

    def row(layer: LinearAllreduce, x: torch.Tensor) -> torch.Tensor:
        out = cpu.linear(x, layer.weight)
        all_reduce(out, group=layer.mp_group)
        return out if layer.bias is None else out + layer.bias

    cpu.speed_up(module)
    for part in module.modules():
        if type(part) is LinearAllreduce:
            part.forward = partial(row, part)
        elif type(part) in (LinearLayer, VocabParallelLinear) and not part.gather_output:
            part.forward = partial(cpu.forward, part)


def _settings(module: nn.Module, tensors: int, offload: Offload) -> dict:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,  # an autograd function in place of F.linear: nothing to save here
        },
    }
    if offload is Offload.cpu:
        pinned = torch.cuda.is_available()
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    if tensors > 1:
        head = type(getattr(module, "lm_head", None)) is nn.Linear
        settings["tensor_parallel"] = {"autotp_size": tensors, "vocab_parallel_lm_head": head}
    return settings


def _show(param: ZeroParameter, flat: torch.Tensor) -> None:
    """Let the module compute with `flat`, which holds the parameter's tensor-parallel slice and padding."""
    param.data = flat[: param.ds_numel].view(param.ds_shape)
    param.ds_status = ZeroParamStatus.AVAILABLE


def _shard(name: str, shape: tuple[int, ...], param: ZeroParameter, world: World) -> Shard:
    """This rank's ZeRO slice of its tensor-parallel slice of a parameter."""
    shard_rank, tensor_rank = (world.mesh.get_local_rank(axis) for axis in ("shard", "tensor"))
    regions, owned = slice_regions(name, shape, param, tensor_rank)
    assert sum(region.numel for region in regions) == param.ds_numel, name
    part = zero_part(regions, world.mesh.shape[0], shard_rank)
    return Shard(name, shape, param.ds_tensor, part, owned)


def zero_part(regions: tuple[Region, ...], shards: int, rank: int) -> tuple[Region, ...]:
    """What ZeRO-3 gives a rank of a slice: one of `shards` equal flat stretches, the last ones padded."""
    size = -(-sum(region.numel for region in regions) // shards)
    return cut(regions, rank * size, (rank + 1) * size)


def slice_regions(
    name: str, shape: tuple[int, ...], param: ZeroParameter, tensor_rank: int
) -> tuple[tuple[Region, ...], bool]:
    """The regions of a parameter's tensor-parallel slice, and whether this rank counts its elements."""
    meta = getattr(param, "ds_autotp_universal_checkpoint_meta", None)
    if meta is None:
        if tuple(param.ds_shape) != shape:
            raise ConfigError(f"engine=deepspeed: AutoTP cut {name} without saying how; use sharding.tensor=1")
        return (run(0, prod(shape)),), tensor_rank == 0
    layout = meta["conversion"].get("affine_map")
    if layout is None:
        raise ConfigError(f"engine=deepspeed: AutoTP does not say how it cut {name}; use sharding.tensor=1")
    regions: list[Region] = []
    filled = 0
    for piece in sorted(layout["ranks"][tensor_rank]["pieces"], key=lambda piece: piece["dest"][0]):
        (source, source_strides), (dest, dest_strides) = piece["source"], piece["dest"]
        if "scale" in piece or dest != filled or not _dense(piece["shape"], dest_strides):
            raise ConfigError(f"engine=deepspeed: AutoTP's cut of {name} is none of regions; use sharding.tensor=1")
        regions += strided_regions(piece["shape"], source, source_strides)
        filled += prod(piece["shape"])
    owners = {min(piece["locations"]) == tensor_rank for piece in layout["ranks"][tensor_rank]["pieces"]}
    assert len(owners) <= 1, name
    return tuple(regions), owners != {False}


def _dense(shape: list[int], strides: list[int]) -> bool:
    """Whether a view of these strides is contiguous."""
    return all(n == 1 or s == prod(shape[d + 1 :]) for d, (n, s) in enumerate(zip(shape, strides, strict=True)))
