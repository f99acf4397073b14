"""Which layers of a model compute with its matrices, and how."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardes.config.schema import ESConfig
from shardes.engines.linear import DOWN, GATE_UP, UP, are_experts
from shardes.errors import ConfigError
from shardes.es.update import evolves

# AutoTP's layers, by name because engine=fsdp does not need DeepSpeed
LINEAR = ("LinearLayer", "LinearAllreduce", "VocabParallelLinear")
ROUTER = ("Router", "Gate", "Gating")  # transformers' layers that choose experts
EMBEDDING = ("VocabParallelEmbedding", "HiddenParallelEmbedding")  # their output is whole


def matrix_layers(
    module: PreTrainedModel, shapes: Mapping[str, Sequence[int]], rank: int, evolve: str | None
) -> list[tuple[nn.Module, str, str]]:
    """The layers that compute with a matrix that members change, the matrix's key in the layer, and
    its name.

    Args:
        shapes: of the unsharded parameters.

    Raises:
        ConfigError: a layer does so in a way that members cannot share.
    """
    names = {id(param): name for name, param in module.named_parameters()}
    layers = []
    for layer in module.modules():
        for key, param in layer._parameters.items():
            if param is None:
                continue
            name = names[id(param)]
            if not evolves(evolve, rank, name, tuple(shapes[name])):
                continue
            if are_experts(layer):
                supported = key in (UP, GATE_UP, DOWN)
            else:  # an expert that is a layer of its own computes with some of the tokens
                known = _is_linear(layer) or is_embedding(layer) or is_router(layer)
                supported = known and key == "weight" and ".experts." not in name
            if not supported:
                raise unsupported(name, type(layer).__name__)
            layers.append((layer, key, name))
    return layers


def check_members_can_share(module: PreTrainedModel, es: ESConfig) -> None:
    """Raise ConfigError if members of the unsharded model cannot answer side by side; see
    `matrix_layers`.
    """
    shapes = {name: param.shape for name, param in module.named_parameters()}
    matrix_layers(module, shapes, es.rank, es.evolve)


def unsupported(name: str, layer: str) -> ConfigError:
    return ConfigError(
        f"es.members_per_batch: members cannot share {name}, which {layer} computes with in its "
        "own way; set es.members_per_batch=1, which perturbs the weights in place"
    )


def _is_linear(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    if kind.__name__ in LINEAR and kind.__module__.startswith("deepspeed"):
        return not getattr(layer, "gather_output", False)
    return kind in (nn.Linear, Conv1D)


def is_router(layer: nn.Module) -> bool:
    return kind_of(layer).__name__.endswith(ROUTER) and "weight" in layer._parameters


def is_embedding(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    if kind.__name__ in EMBEDDING and kind.__module__.startswith("deepspeed"):
        return True
    own_forward = getattr(kind, "forward", None) is not nn.Embedding.forward
    return issubclass(kind, nn.Embedding) and (not own_forward or hasattr(layer, "embed_scale"))


def kind_of(layer: nn.Module) -> type:
    """The layer's class; FSDP makes a class of its own for each that it wraps."""
    return type(layer).__bases__[-1] if isinstance(layer, FSDPModule) else type(layer)
