"""Which tensors of a checkpoint's files the parameters and buffers of a model are loaded from.

transformers renames tensors and stacks experts while it loads them. Here its own rules are applied
to the names alone.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from shardes.errors import ConfigError

# Conversions that keep every tensor of the files contiguous in the parameter, with their dimensions
STACKS = {(("MergeModulelist", 0),), (("MergeModulelist", 0), ("Concatenate", 1))}
CONCATENATION = (("Concatenate", 0),)


@dataclass
class TensorNames:
    """Names of tensors in the files, by the names that a module's `state_dict` has.

    Attributes:
        parts: of each parameter, the tensors that form it, in order. Tied parameters are one.
        copies: of a tied parameter, tensors that hold its values once more.
        buffers: of each persistent buffer, its tensor.
        missing: persistent buffers that no tensor holds.
        unused: tensors that the module has no place for, though it computes without them.
        warnings: what the user should know.
    """

    parts: dict[str, list[str]] = field(default_factory=dict)
    copies: dict[str, list[str]] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def tensor_names(
    module: PreTrainedModel,
    tensors: Iterable[str],
    equal: Callable[[str, str], bool] = lambda one, other: True,
) -> TensorNames:
    """The tensors of a checkpoint that each parameter and persistent buffer is loaded from.

    As transformers does, tied parameters whose tensors are both there and differ are kept apart:
    the module is changed.

    Args:
        tensors: the names of the checkpoint's tensors.
        equal: whether two of them have the same values.

    Raises:
        ConfigError: transformers converts a tensor in a way that is not supported, or the module
            would compute without a tensor that belongs to one of its layers.
    """
    sources, unused = _sources(module, tensors)
    names = TensorNames()
    _untie(module, sources, equal, names)
    groups = _tied_groups(module)
    state = module.state_dict()
    for name, _ in module.named_parameters():
        tied = [key for key in groups.get(name, [name]) if key in sources]
        if tied:
            names.parts[name] = sources[tied[0]]
            names.copies[name] = [tensor for key in tied[1:] for tensor in sources[key]]
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    ignored = _pattern(module._keys_to_ignore_on_load_missing)
    for name in state.keys() - parameters:
        if name in sources:
            names.buffers[name] = sources[name][0]
        elif not ignored.search(name) and isinstance(state[name], torch.Tensor):
            names.missing.append(name)
    names.missing.sort()
    _check_unused(module, unused, names)
    return names


def _sources(
    module: PreTrainedModel, tensors: Iterable[str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The tensors by the key of the `state_dict` that they belong to, and the keys of the others.

    Tied parameters have a key each.
    """
    transforms = get_model_conversion_mapping(module)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    prefix, state = module.base_model_prefix, module.state_dict()
    sources: dict[str, list[str]] = {}
    collected: dict[str, dict[str, list[str]]] = {}
    unused: dict[str, str] = {}
    for name in sorted(tensors, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key not in state:
            unused[name] = key
        elif pattern is not None:
            collected.setdefault(key, {}).setdefault(pattern, []).append(name)
        elif key in sources:
            raise ConfigError(f"the files have both {sources[key][0]} and {name}, which are one")
        else:
            sources[key] = [name]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    for key, by_source in collected.items():
        if key not in sources:
            sources[key] = _stacked(key, by_pattern[next(iter(by_source))], by_source)
    return sources, unused


def _stacked(key: str, converter: WeightConverter, by_source: Mapping[str, list[str]]) -> list[str]:
    """The tensors that transformers stacks or concatenates to one parameter, in order."""
    lists = [by_source.get(pattern, []) for pattern in converter.source_patterns]
    steps = tuple(
        (type(operation).__name__, getattr(operation, "dim", None))
        for operation in converter.operations
    )
    whole = len({len(names) for names in lists}) == 1 and len(converter.target_patterns) == 1
    if whole and steps in STACKS:
        return [name for expert in zip(*lists, strict=True) for name in expert]
    if whole and steps == CONCATENATION and len(lists[0]) == 1:
        return [name for names in lists for name in names]
    example = next(iter(by_source.values()))[0]
    operations = ", ".join(name for name, _ in steps)
    raise ConfigError(
        f"transformers makes {key} from {example} and others ({operations}), which is not "
        "supported here; pass a copy that transformers has saved with "
        "save_pretrained(COPY, save_original_format=False)"
    )


def _untie(
    module: PreTrainedModel,
    sources: Mapping[str, Sequence[str]],
    equal: Callable[[str, str], bool],
    names: TensorNames,
) -> None:
    """Keep tied parameters apart whose tensors are both in the files and differ."""
    for target, source in list(module.all_tied_weights_keys.items()):
        if target not in sources or source not in sources:
            continue
        if equal(sources[target][0], sources[source][0]):
            continue
        owner, _, key = target.rpartition(".")
        tied = module.get_parameter(target)
        module.get_submodule(owner)._parameters[key] = nn.Parameter(
            torch.empty_like(tied), requires_grad=tied.requires_grad
        )
        del module.all_tied_weights_keys[target]
        names.warnings.append(
            f"config.json ties {target} to {source}, but the files hold different values: they are "
            "kept apart, as transformers does; set tie_word_embeddings to false in config.json"
        )


def _tied_groups(module: PreTrainedModel) -> dict[str, list[str]]:
    """All names of every tied parameter, by the one that `named_parameters` has."""
    first = {id(param): name for name, param in module.named_parameters()}
    groups: dict[str, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        groups.setdefault(first[id(param)], []).append(name)
    return groups


def _pattern(patterns: Iterable[str] | None) -> re.Pattern[str]:
    return re.compile("|".join(f"({pattern})" for pattern in patterns or ()) or r"(?!)")


def _check_unused(module: PreTrainedModel, unused: Mapping[str, str], names: TensorNames) -> None:
    """Sort the tensors that nothing takes: ignored by transformers, harmless, or to be refused."""
    buffers = {name for name, _ in module.named_buffers()}
    ignored = _pattern(
        {*(module._keys_to_ignore_on_load_unexpected or ()), r"inv_freq$", r"(^|\.)position_ids$"}
    )
    modules = dict(module.named_modules())
    named: list[str] = []
    for name, key in unused.items():
        names.unused.append(name)
        if ignored.search(key) or key in buffers:
            continue
        if _within_layer(modules, key):
            raise ConfigError(
                f"the files have a tensor {name}, which {type(module).__name__} does not use: "
                "config.json is not this model's, or it was quantised or adapted; if it may be "
                "left out, pass a copy that transformers has loaded and saved"
            )
        named.append(name)
    if named:
        others = f" and {len(named) - 1} others" if len(named) > 1 else ""
        names.warnings.append(f"nothing uses the tensor {named[0]}{others} of the files")


def _within_layer(modules: Mapping[str, nn.Module], key: str) -> bool:
    """Whether a tensor belongs to a layer of the module, not to a part that the module lacks."""
    owner = key
    while owner:
        owner = owner.rpartition(".")[0]
        if owner in modules:
            return not isinstance(modules[owner], PreTrainedModel | nn.ModuleList)
    return False
