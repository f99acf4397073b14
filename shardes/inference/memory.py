"""How much memory of a device generation takes, beside the live weights."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from shardes.config.schema import Config, EngineName, Gather
from shardes.inference.log_probs import MAX_LOGITS

LOGITS = 4 * MAX_LOGITS  # bytes: they are float32


def generation_bytes(
    config: Config, model: PreTrainedConfig, itemsize: int, slices: Sequence[int]
) -> int:
    """An upper estimate, for a rank, of what generation will allocate.

    That is the key-value cache of `generation.batch_tokens`, the states of as many tokens in one
    layer, logits, and the gathered weights, except for those that engine=deepspeed has already
    allocated; engine=vllm has allocated all but the logits. What a config does not tell is taken
    from its largest size.

    Args:
        itemsize: bytes of a live weight.
        slices: the bytes of each parameter's tensor-parallel slice.
    """
    if config.engine is EngineName.vllm:
        return LOGITS
    text, tensor = model.get_text_config(), config.sharding.tensor
    hidden = _size(text, "hidden_size") or 8192
    heads = _size(text, "num_attention_heads") or 1
    kv_heads = _size(text, "num_key_value_heads") or heads
    head = _size(text, "head_dim") or -(-hidden // heads)
    layers = _size(text, "num_hidden_layers") or 1
    wide = _size(text, "intermediate_size") or 4 * hidden
    cached = 2 * layers * -(-kv_heads // tensor) * head
    states = 4 * hidden + 3 * -(-wide // tensor) + 5 * -(-heads // tensor) * head
    per_token = (cached + states) * itemsize
    return (
        config.generation.batch_tokens * per_token
        + LOGITS
        + _gathered_bytes(config, layers, slices)
    )


def _gathered_bytes(config: Config, layers: int, slices: Sequence[int]) -> int:
    if config.sharding.shard == 1:
        return 0
    if config.sharding.gather is Gather.layer:
        return 3 * (sum(slices) // layers + max(slices))
    return sum(slices) if config.engine is EngineName.fsdp else 0


def _size(text: PreTrainedConfig, name: str) -> int:
    """A size that a config has; the largest if layers differ in it, 0 if there is none."""
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # layers differ in it
        value = text.to_dict().get(name)
    values = value if isinstance(value, list) else [value]
    return max((value for value in values if isinstance(value, int)), default=0)
