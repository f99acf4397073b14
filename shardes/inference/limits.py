"""What a model can take: the token ids of its embedding, its positions, padding, a cache."""

from collections.abc import Sequence
from inspect import signature
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from shardes.errors import ConfigError


def check_decoding(model: str, module: PreTrainedModel) -> None:
    """Check that the model decodes batches with a key-value cache.

    Raises:
        ConfigError: its forward pass takes no cache of transformers, or it has learned positions
            and no way to tell it those of a padded row.
    """
    parameters = signature(module.forward).parameters
    name = type(module).__name__
    if not {"cache", "past_key_values"} & set(parameters):
        raise ConfigError(
            f"model.path={model}: {name} has no key-value cache of transformers' class Cache, "
            "which decoding needs; use another model"
        )
    if "logits_to_keep" not in parameters:
        raise ConfigError(
            f"model.path={model}: {name} takes no logits_to_keep, as transformers' decoder-only "
            "models do; use one of these"
        )
    if _has_position_table(module) and "position_ids" not in parameters:
        raise ConfigError(
            f"model.path={model}: {name} takes no position_ids, so prompts of different lengths "
            "cannot share a batch; use a decoder-only model"
        )


def check_prompts(
    model: str,
    module: PreTrainedModel,
    split: str,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    """Check prompts, given as token ids, against the embedding and the positions of the model.

    Raises:
        ConfigError: a token id has no row in the embedding, or a prompt with the longest response
            has more tokens than the model has positions.
    """
    rows = _token_embedding(module).weight.shape[0]
    positions = learned_positions(module)
    for number, prompt in enumerate(prompts):
        if max(prompt) >= rows or min(prompt) < 0:
            token = next(token for token in prompt if not 0 <= token < rows)
            raise ConfigError(
                f"model.path={model}: prompt {number} of {split} has token id {token}, and the "
                f"model's embedding has {rows} rows; its tokenizer belongs to another model, or "
                "tokens were added to it without resizing the embedding"
            )
        # The last new token is not read again.
        if positions is not None and (length := len(prompt) + max_new_tokens - 1) > positions:
            raise ConfigError(
                f"generation.max_new_tokens={max_new_tokens}: prompt {number} of {split} has "
                f"{len(prompt)} tokens, and {model} has {positions} positions, {length - positions}"
                f" too few; use at most {positions - len(prompt) + 1} new tokens, shorter prompts, "
                "or a model with more positions"
            )


def beyond_context(
    model: str,
    module: PreTrainedModel,
    split: str,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> str | None:
    """A warning about prompts whose longest responses pass the context that the model was made for.

    A model that computes its positions decodes on beyond it, but usually no text of any use. Models
    with a table of positions are refused by `check_prompts`.
    """
    context = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if not isinstance(context, int) or context < 1 or longest + max_new_tokens <= context:
        return None
    beyond = sum(len(prompt) + max_new_tokens > context for prompt in prompts)
    return (
        f"generation.max_new_tokens={max_new_tokens}: with the longest response, {beyond} of "
        f"{len(prompts)} prompts of {split} pass the {context} tokens that {model} was made for "
        f"(max_position_embeddings; the longest prompt has {longest}); use fewer new tokens or "
        "shorter prompts, unless you know that the model goes on beyond"
    )


def learned_positions(module: PreTrainedModel) -> int | None:
    """The number of positions of a model with a table of them; None if it computes them."""
    config = module.config.get_text_config()
    if config.model_type == "mpt":
        return config.max_seq_len  # where its table of ALiBi biases ends
    return config.max_position_embeddings if _has_position_table(module) else None


def _has_position_table(module: PreTrainedModel) -> bool:
    config = module.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "rope_parameters", None):
        return False
    tokens = _token_embedding(module)
    tables = [
        embedding.weight
        for embedding in module.modules()
        if isinstance(embedding, nn.Embedding) and embedding is not tokens
    ]
    # GPT-J, CodeGen and CTRL have a buffer. OPT and BART have two rows more than positions.
    buffers = ("embed_positions", "pos_encoding")
    tables += [buffer for name, buffer in module.named_buffers() if name.endswith(buffers)]
    return any(positions <= table.shape[0] <= positions + 2 for table in tables)


def _token_embedding(module: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, module.get_input_embeddings())
