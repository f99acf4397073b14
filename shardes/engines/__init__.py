"""Engines hold the model, sharded over the ranks of a replica. They know nothing of ES."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shardes.config.schema import Attention, Config, DType, EngineName, Offload
from shardes.distributed import environment
from shardes.distributed.world import World
from shardes.engines.attention import attention_argument, check_used
from shardes.engines.vocabulary import VocabularySlice
from shardes.errors import ConfigError, mistakes_in
from shardes.sharding.model_directory import check_unquantised, reason
from shardes.sharding.regions import ParameterShard
from shardes.sharding.weight_files import WeightFiles, float32_names

# Architectures that align a recurrent or compressed state, or a window, with the padded start
PADDING_CHANGES = ("recurrent_gemma", "deepseek_v4", "moshi")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")


class Engine(Protocol):
    """One replica's model, sharded over its ranks.

    Attributes:
        shards: this rank's shard of every parameter, in the order of the unsharded model's
            `named_parameters()`. What is written to them is what the next prompts are answered
            with.
        device: where the model computes.
    """

    shards: list[ParameterShard]
    device: torch.device


class ModuleEngine(Engine, Protocol):
    """An engine that computes with the module of transformers.

    Attributes:
        sync_forwards: whether every forward pass is collective over the shard axis, so that its
            ranks must make the same number of passes.
        vocabulary: the slice of the vocabulary that this rank's logits cover; None: they cover all.
    """

    sync_forwards: bool
    vocabulary: VocabularySlice | None

    def gathered(self) -> AbstractContextManager[PreTrainedModel]:
        """A context in which the module computes with the weights that the shards have on entry."""
        ...


def build(config: Config, module: PreTrainedModel, world: World) -> ModuleEngine:
    """The configured engine, around an `empty_model`. The values of its shards are not set."""
    if config.engine is EngineName.fsdp:
        from shardes.engines.fsdp import FSDPEngine

        return FSDPEngine(module, world, config.sharding)
    from shardes.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, world, config.sharding)


def release() -> None:
    """Drop what DeepSpeed and vLLM keep after an engine; for a process that outlives a run.

    Call it while the process group is still there, to which vLLM's groups belong.
    """
    from shardes.engines import vllm

    vllm.release()
    if offload := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        offload.FWD_MODULE_STACK.clear()


def open_model(
    directory: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attention: Attention = Attention.auto,
) -> tuple[WeightFiles, PreTrainedModel]:
    """A model directory's weight files and its `empty_model`, checked against each other.

    The module's persistent buffers are loaded, and parameters are tied as the files require.
    """
    with mistakes_in(f"model.path={directory}"):
        files = WeightFiles(directory)
        module = empty_model(directory, dtype, trust_remote_code, attention)
        files.map_names(module)
        files.check({name: param.shape for name, param in module.named_parameters()})
        files.load_buffers(module)
    return files, module


def empty_model(
    directory: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attention: Attention = Attention.auto,
) -> PreTrainedModel:
    """The causal language model of a config.json: parameters on the meta device, buffers real.

    Args:
        trust_remote_code: run Python code of the directory if transformers does not know the
            architecture.
        attention: how the model is to compute it.

    Raises:
        ConfigError: config.json is missing, unreadable, or of an architecture unknown to
            transformers, the model is quantised, or transformers has no such attention for it.
    """
    try:
        check_unquantised(directory)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            module = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                **attention_argument(attention),
            )
        check_used(attention, module)
        _set_precision(module, dtype)
        module.tie_weights()  # moving to the meta device untied them
        return module
    except ConfigError:
        raise
    except Exception as error:  # whatever transformers meets in a file that is not as it expects it
        asked = attention is not Attention.auto and "attention" in str(error)
        key = f"model.attention={attention.value}: " if asked else ""
        raise ConfigError(f"{key}model.path={directory}: {reason(error)}") from error


def _set_precision(module: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let parameters and buffers have the precision that `from_pretrained` gives them.

    Some parameters are float32 in models of other dtypes. Buffers that no file has are computed in
    float32, and not in the model's dtype, which is torch's default while the model is made.
    """
    for part in module.modules():
        part._is_hf_initialized = False  # type: ignore[assignment]
    module.initialize_weights()
    kept = float32_names(module, dtype)
    for name, param in module.named_parameters():
        if kept.search(name):
            param.data = param.data.float()


def check_model(config: Config, module: PreTrainedModel) -> None:
    """Raise ConfigError if the engine does not support the model with this layout and dtype."""
    if (
        config.model.dtype is DType.bfloat16
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported()
    ):
        raise ConfigError(
            f"model.dtype=bfloat16: {torch.cuda.get_device_name()} lacks it; use float16 or float32"
        )
    if module.config.model_type in PADDING_CHANGES:
        raise ConfigError(
            f"model.path={config.model.path}: the state of {type(module).__name__} changes with "
            "the padding of a batch, and so would its responses; use another model"
        )
    tensor, heads = config.sharding.tensor, _key_value_heads(module.config)
    if config.engine is EngineName.vllm:
        _check_vllm(config, module, heads)
        return
    if tensor > 1:
        _check_tensor(config, module, heads)
    if config.engine is EngineName.fsdp:
        _check_fsdp(config, module, heads)
    elif tensor > 1:
        _check_autotp(config, module)


def _key_value_heads(config: PreTrainedConfig) -> list[int]:
    """The numbers of key-value heads that layers of a model have; empty: it has no attention."""
    text = config.get_text_config()

    def value(name: str) -> Any:
        try:
            return getattr(text, name, None)
        except RuntimeError:  # layers differ in it
            return text.to_dict().get(name)

    if value("multi_query") and not value("new_decoder_architecture"):
        return [1]
    counts = next((count for name in KEY_VALUE_HEADS if (count := value(name))), None)
    by_layer = counts if isinstance(counts, list) else [counts]
    numbers = {*by_layer, value("num_global_key_value_heads")}
    return sorted(number for number in numbers if number)


def _check_tensor(config: Config, module: PreTrainedModel, heads: list[int]) -> None:
    tensor, path = config.sharding.tensor, config.model.path
    if not heads:
        raise ConfigError(
            f"sharding.tensor={tensor}: {path} has no attention heads to split; "
            "use sharding.shard instead"
        )
    if tensor > heads[0]:
        raise ConfigError(
            f"sharding.tensor={tensor}: {path} has {heads[0]} key-value heads, "
            "and a tensor rank needs at least one"
        )
    if module.config.model_type == "doge":
        raise ConfigError(
            f"sharding.tensor={tensor}: transformers' plan for {type(module).__name__} splits its "
            "heads, but not their attention mask; use sharding.shard instead"
        )


def _check_vllm(config: Config, module: PreTrainedModel, heads: list[int]) -> None:
    """vLLM gives every rank equal parts, and several ranks the same key-value head."""
    from shardes.engines.vllm import check_sharding

    check_sharding(config.sharding)
    tensor = config.sharding.tensor
    queries = getattr(module.config.get_text_config(), "num_attention_heads", None) or tensor
    for count, kind, fits in (
        (queries, "attention", queries % tensor == 0),
        *((count, "key-value", not (count % tensor and tensor % count)) for count in heads),
    ):
        if not fits:
            raise ConfigError(
                f"sharding.tensor={tensor}: engine=vllm cannot split the {count} {kind} heads of "
                f"{config.model.path} into equal parts; use another degree, or engine=deepspeed"
            )


def _check_fsdp(config: Config, module: PreTrainedModel, heads: list[int]) -> None:
    shard, tensor = config.sharding.shard, config.sharding.tensor
    if shard == 1 and config.sharding.offload is Offload.cpu:
        raise ConfigError(
            "sharding.offload=cpu: engine=fsdp offloads only with sharding.shard above 1"
        )
    for key, degree, plan in (
        ("shard", shard, module.fsdp_plan),
        ("tensor", tensor, module.tp_plan),
    ):
        if degree > 1 and not plan:
            raise ConfigError(
                f"sharding.{key}={degree}: "
                f"transformers has no plan to shard {type(module).__name__}"
            )
    text = module.config.get_text_config()
    if (
        tensor > 1
        and text is not module.config
        and getattr(text, "hidden_size_per_layer_input", False)
    ):
        raise ConfigError(
            f"sharding.tensor={tensor}: transformers cannot split {type(module).__name__} with its "
            "embeddings per layer; use sharding.shard instead, or the text model alone"
        )
    for count in heads:
        if count % tensor:
            raise ConfigError(
                f"sharding.tensor={tensor}: does not divide the {count} key-value heads of "
                f"{config.model.path}, as engine=fsdp requires; engine=deepspeed splits heads "
                "unevenly"
            )


def _check_autotp(config: Config, module: PreTrainedModel) -> None:
    with environment.quiet():
        from deepspeed.module_inject.tp_plan_converter import TPPlanConverter

    tensor, name = config.sharding.tensor, type(module).__name__
    if not module.tp_plan and not _splits_without_plan(module.config):
        raise ConfigError(
            f"sharding.tensor={tensor}: transformers has no plan to split {name}, and AutoTP's own "
            "is not known to be right; use sharding.shard instead"
        )
    if module.config.model_type == "codegen":
        raise ConfigError(
            f"sharding.tensor={tensor}: AutoTP splits {name} wrongly; use engine=fsdp, or "
            "sharding.shard instead"
        )
    try:
        TPPlanConverter.convert(module.tp_plan)
    except ValueError as error:
        sentence = str(error).split(". ")[0]
        raise ConfigError(
            f"sharding.tensor={tensor}: AutoTP cannot split {config.model.path} "
            f"({sentence}); use engine=fsdp, or sharding.shard instead"
        ) from None


def _splits_without_plan(config: PreTrainedConfig) -> bool:
    """Whether AutoTP's guess from the names of the layers is right; docs/models.md has the tests.

    Of others it is a crash, or another model: Persimmon's answers differ without any error.
    """
    if config.model_type == "falcon":
        return config.new_decoder_architecture and not config.alibi
    return config.model_type in ("biogpt", "gpt_neo", "opt", "stablelm", "xglm")
