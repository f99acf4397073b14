"""The shapes of a model's parameters and how an engine shards them, from config.json alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from math import prod
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from shardes.config.schema import Attention, Config, EngineName
from shardes.engines import empty_model
from shardes.errors import ConfigError, mistakes_in
from shardes.es.update import evolves
from shardes.sharding.model_directory import config_file

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "intermediate_size")


@dataclass(frozen=True)
class Parameter:
    """A parameter, and how tensor parallelism splits it.

    Attributes:
        dim: the dimension that is split; None: every tensor rank holds the whole parameter.
        units: the number of equal pieces along `dim`, such as heads, that are never split.
        looked_up: whether an embedding looks its rows up.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    units: int
    looked_up: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def shape_on(self, tensor: int, rank: int) -> tuple[int, ...]:
        """The shape of a tensor rank's slice."""
        if self.dim is None or tensor == 1:
            return self.shape
        units, remainder = divmod(self.units, tensor)
        size = self.shape[self.dim] // self.units * (units + (rank < remainder))
        return *self.shape[: self.dim], size, *self.shape[self.dim + 1 :]


@dataclass(frozen=True, eq=False)  # two are alike only if they are one, which caches rely on
class ModelShapes:
    """A model's sizes, named as in transformers' configs, and its parameters.

    `num_experts` is 0 for a dense model. `has_scores`: attention holds its scores, of a size that
    is quadratic in the prompt's length.
    """

    engine: EngineName
    itemsize: int
    parameters: tuple[Parameter, ...]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    has_scores: bool = False

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def tied(self) -> bool:
        """Whether the embedding is also the head."""
        return not any(parameter.name == "lm_head.weight" for parameter in self.parameters)

    @property
    def experts_numel(self) -> int:
        return sum(
            parameter.numel for parameter in self.parameters if ".experts." in parameter.name
        )

    def held(self, tensor: int, shard: int, tensor_rank: int, shard_rank: int) -> list[int]:
        """The number of elements of each parameter that a rank holds, without padding."""
        counts = []
        for parameter in self.parameters:
            shape = parameter.shape_on(tensor, tensor_rank)
            # FSDP splits rows; DeepSpeed splits the flattened slice.
            size, row = (
                (shape[0], prod(shape[1:])) if self.engine is EngineName.fsdp else (prod(shape), 1)
            )
            step = -(-size // shard)
            start = min(step * shard_rank, size)
            counts.append(min(step, size - start) * row)
        return counts


@lru_cache(maxsize=256)
def held_elements(model: ModelShapes, tensor: int, shard: int, tensor_rank: int = 0) -> int:
    """The elements that the first rank of the shard axis holds, without padding."""
    return sum(model.held(tensor, shard, tensor_rank, 0))


@lru_cache(maxsize=256)
def slice_elements(model: ModelShapes, tensor: int, tensor_rank: int = 0) -> tuple[int, ...]:
    """The elements of each parameter's tensor-parallel slice."""
    return tuple(prod(p.shape_on(tensor, tensor_rank)) for p in model.parameters)


@lru_cache(maxsize=256)
def factor_elements(
    model: ModelShapes, tensor: int, rank: int, evolve: str | None, tensor_rank: int = 0
) -> tuple[int, ...]:
    """The elements of a member's low-rank factors that a tensor rank holds, by matrix.

    Args:
        rank: of the noise.
        evolve: see `Update.evolve`.
    """
    counts = []
    for parameter in model.parameters:
        if not evolves(evolve, rank, parameter.name, parameter.shape):
            continue
        part = sum(parameter.shape_on(tensor, tensor_rank)[-2:])
        if parameter.looked_up:  # any rank may look up any token
            whole = sum(parameter.shape[-2:])
            # A head that is tied to the embedding has factors of its own slice besides.
            part = whole + (part if model.tied and part != whole else 0)
        counts.append(rank * part)
    return tuple(counts)


def splits_experts(model: ModelShapes, tensor: int) -> bool:
    """Whether tensor parallelism splits experts' matrices."""
    return tensor > 1 and any(
        parameter.dim is not None for parameter in model.parameters if ".experts." in parameter.name
    )


def read_shapes(
    config: Config, module: PreTrainedModel | None = None
) -> tuple[ModelShapes, PreTrainedModel]:
    """The shapes of the configured model, and its module with parameters on the meta device.

    Args:
        module: the module, if it has been made already, such as for another engine.

    Raises:
        ConfigError: config.json is missing, unreadable, lacks a size, or has one that no model has.
    """
    path, file = config.model.path, config_file(config.model.path)
    with mistakes_in(f"model.path={path}: no readable config.json"):
        values = dict(json.loads(file.read_bytes()))
    _check_values(path, values | _section(values, "text_config"))
    dtype = getattr(torch, config.model.dtype.value)
    module = module if module is not None else empty_model(file.parent, dtype)
    text = module.config.get_text_config()
    _check_sizes(path, values | _section(values, "text_config"), text)
    num_heads = text.num_attention_heads
    num_key_value_heads = getattr(text, "num_key_value_heads", None) or num_heads
    num_experts = (
        getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    )
    moe_intermediate_size = (
        (getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
        if num_experts
        else 0
    )
    shapes = ModelShapes(
        engine=config.engine,
        itemsize=dtype.itemsize,
        parameters=_parameters(module, config.engine, num_key_value_heads),
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab_size=text.vocab_size,
        num_experts=num_experts,
        num_experts_per_tok=getattr(text, "num_experts_per_tok", 0) if num_experts else 0,
        moe_intermediate_size=moe_intermediate_size,
        has_scores=Attention.eager.value in (config.model.attention.value, _attention(text)),
    )
    return shapes, module


def _attention(text: PreTrainedConfig) -> str:
    """The attention that transformers has chosen for a model."""
    return getattr(text, "_attn_implementation", None) or ""


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _check_values(path: str, values: Mapping[str, Any]) -> None:
    """Check sizes before a model is made of them, whose errors would not name them."""
    for name in SIZES:
        value = values.get(name)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(type(n) is int and 0 < n < 2**31 for n in numbers):
            raise ConfigError(
                f"model.path={path}: config.json has {name}={value}: must be a whole number from "
                "1 to 2147483647"
            )
    heads, key_value_heads = (
        values.get(name) for name in ("num_attention_heads", "num_key_value_heads")
    )
    if isinstance(heads, int) and isinstance(key_value_heads, int) and heads % key_value_heads:
        raise ConfigError(
            f"model.path={path}: config.json has num_attention_heads={heads}, which is no multiple "
            f"of num_key_value_heads={key_value_heads}"
        )


def _check_sizes(path: str, values: Mapping[str, Any], text: PreTrainedConfig) -> None:
    # transformers fills in defaults, which are another model's sizes.
    for name in REQUIRED:
        if name not in values and text.attribute_map.get(name) not in values:
            raise ConfigError(f"model.path={path}: config.json does not say {name}")


def _parameters(
    module: PreTrainedModel, engine: EngineName, num_key_value_heads: int
) -> tuple[Parameter, ...]:
    styles = dict(module.tp_plan or {})
    tied = "lm_head.weight" not in dict(module.named_parameters())
    # AutoTP splits an embedding only if it is also the head.
    splits_embedding = engine is EngineName.fsdp or tied
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    parameters = []
    for name, parameter in module.named_parameters():
        style, shape = _style(name, styles), tuple(parameter.shape)
        dim = _split_dim(style, shape, splits_embedding)
        units = 1 if dim is None else shape[dim]
        if dim is not None:
            attention = ".layers." in name and ".mlp." not in name
            if engine is EngineName.deepspeed and attention:
                units = num_key_value_heads
            elif engine is EngineName.fsdp and "packed" in style:
                units = shape[dim] // 2
        parameters.append(Parameter(name, shape, dim, units, id(parameter) in embeddings))
    return tuple(parameters)


def _style(name: str, styles: Mapping[str, str]) -> str:
    """A parameter's style in transformers' tensor parallel plan; an empty string if it has none."""
    owner = name.rpartition(".")[0]
    return next(
        (
            style
            for pattern, style in styles.items()
            if fnmatchcase(name, pattern) or fnmatchcase(owner, pattern)
        ),
        "",
    )


def _split_dim(style: str, shape: tuple[int, ...], splits_embedding: bool) -> int | None:
    """The dimension that tensor parallelism splits."""
    if style == "embedding_rowwise":
        return 0 if splits_embedding else None
    if "colwise" in style:
        return max(len(shape) - 2, 0)
    if style == "rowwise" and len(shape) > 1:
        return len(shape) - 1
    return None
