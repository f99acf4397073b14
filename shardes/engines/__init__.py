"""Who holds the model. Engines know nothing of evolution strategies."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shardes.config import Config, ConfigError, DType, Offload
from shardes.config import Engine as EngineName
from shardes.engines.vocabulary import VocabularyPart
from shardes.shards import Shard
from shardes.weights import WeightFiles
from shardes.world import World


class Engine(Protocol):
    """One replica's model, spread over its ranks.

    `shards` are this rank's parts of every parameter, in the order of the unsharded model's
    `named_parameters()`; writing to their tensors changes the model that the next `ready()` shows.
    `lockstep` says that every forward pass is collective over the shard axis, so that its ranks must make
    the same number of them. `vocabulary` says which part of the vocabulary this rank's logits cover; None: all.
    """

    shards: list[Shard]
    device: torch.device
    lockstep: bool
    vocabulary: VocabularyPart | None

    def ready(self) -> AbstractContextManager[PreTrainedModel]:
        """A context in which the module computes with the weights that the shards hold at its start."""
        ...


def empty_model(directory: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model that config.json describes: parameters on the meta device, buffers real.

    `trust_remote_code` lets Python code in the directory run, where transformers does not know the architecture.

    Raises:
        ConfigError: config.json is missing, unreadable, or of an architecture that transformers does not know.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        module.tie_weights()  # moving to the meta device untied them
        return module
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={directory}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why transformers would not load something, in one line."""
    if "trust_remote_code" in str(error):
        return (
            "it comes with Python code of its own, which is not run; if you have read that code and trust it, "
            "set model.trust_remote_code=true"
        )
    return str(error).strip().splitlines()[0]


def open_model(
    directory: Path, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[WeightFiles, PreTrainedModel]:
    """A model directory's weight files, checked against its `empty_model`, and that."""
    files, module = WeightFiles(directory), empty_model(directory, dtype, trust_remote_code)
    files.stack(module)
    files.check({name: param.shape for name, param in module.named_parameters()})
    return files, module


def check_model(config: Config, module: PreTrainedModel) -> None:
    """Raise ConfigError where the engine cannot take the model, or its layout, or its dtype."""
    path, tensor, shard = config.model.path, config.sharding.tensor, config.sharding.shard
    if config.model.dtype is DType.bfloat16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"model.dtype=bfloat16: {torch.cuda.get_device_name()} lacks it; use float16 or float32")
    heads = getattr(module.config, "num_key_value_heads", None) or module.config.num_attention_heads
    if tensor > heads:
        raise ConfigError(
            f"sharding.tensor={tensor}: {path} has {heads} key-value heads, and a tensor rank needs one at least"
        )
    if config.engine is EngineName.fsdp:
        if shard == 1 and config.sharding.offload is Offload.cpu:
            raise ConfigError("sharding.offload=cpu: engine=fsdp offloads what sharding.shard spreads; set it above 1")
        for degree, key, plan in ((shard, "shard", module.fsdp_plan), (tensor, "tensor", module.tp_plan)):
            if degree > 1 and not plan:
                raise ConfigError(f"sharding.{key}={degree}: transformers has no plan to cut {type(module).__name__}")
        if heads % tensor:
            raise ConfigError(
                f"sharding.tensor={tensor}: does not divide the {heads} key-value heads of {path}, "
                "as engine=fsdp needs; engine=deepspeed cuts heads unevenly"
            )
    elif tensor > 1:
        from deepspeed.module_inject.tp_plan_converter import TPPlanConverter

        try:
            TPPlanConverter.convert(module.tp_plan)
        except ValueError as error:
            reason = str(error).split(". ")[0]
            raise ConfigError(
                f"sharding.tensor={tensor}: AutoTP cannot cut {path} ({reason}); "
                "use engine=fsdp, or sharding.shard instead"
            ) from None


def build(config: Config, module: PreTrainedModel, world: World) -> Engine:
    """The engine that `config` names, around an `empty_model`. The shards' values are left unset."""
    if config.engine is EngineName.fsdp:
        from shardes.engines.fsdp import FSDPEngine

        return FSDPEngine(module, world, config.sharding)
    from shardes.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, world, config.sharding)
