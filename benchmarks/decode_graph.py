"""Decode tokens per second: eager steps against CUDA graphs of the step.

python -m benchmarks.decode_graph cuda
"""

import sys
from collections.abc import Iterator
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.measure import seconds
from shardes.clock import Clock
from shardes.config.schema import Decode
from shardes.engines.linear import use_own_forward
from shardes.es.population import Member
from shardes.es.side_by_side import SideBySide
from shardes.inference.generation import Decoder
from shardes.sharding.regions import ParameterShard, Region

ROWS = (1, 8, 32, 128)
MEMBERS, PROMPTS_EACH = 16, 2  # of the batch side by side
NEW_TOKENS, REPEATS = 64, 3
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SIZES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
}
TOY = {"toy": (32, 64, 2, 4, 2, 256, True)}


def random_model(device: torch.device, dtype: torch.dtype, *size) -> PreTrainedModel:
    """A Llama with random weights: a step's time depends on its sizes alone."""
    hidden, intermediate, layers, heads, key_value_heads, vocabulary, tied = size
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    use_own_forward(model.eval())
    return model.requires_grad_(False)


def prompts(rows: int, vocabulary: int) -> list[list[int]]:
    """Prompts of 24 to 40 tokens."""
    return [[(31 * row + 7 * i) % vocabulary for i in range(24 + row % 17)] for row in range(rows)]


class Modes:
    """An eager decoder and one with graphs, of which every response has `NEW_TOKENS` tokens."""

    def __init__(self, device: torch.device, model: PreTrainedModel):
        self._device, self._model = device, model
        self._decoders = {
            mode: Decoder(None, NEW_TOKENS, frozenset(), (), 1 << 20, decode=mode)  # type: ignore[arg-type]
            for mode in Decode
        }

    def rates(self, rows: list[list[int]], **options) -> dict[str, float]:
        """Tokens per second of each mode, in turns; the seconds of the first call with graphs."""
        first = {mode: self._seconds(mode, rows, options) for mode in Decode}
        times: dict[Decode, list[float]] = {mode: [] for mode in Decode}
        for _ in range(REPEATS):
            for mode in Decode:
                times[mode].append(self._seconds(mode, rows, options))
        tokens = len(rows) * NEW_TOKENS
        rates = {mode.value: tokens / median(times[mode]) for mode in Decode}
        return rates | {"first": first[Decode.graph]}

    def _seconds(self, mode: Decode, rows: list[list[int]], options: dict) -> float:
        return seconds(lambda: self._decode(mode, rows, options))

    def _decode(self, mode: Decode, rows: list[list[int]], options: dict) -> None:
        self._decoders[mode](self._model, rows, **options)
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure(device: torch.device, sizes: dict[str, tuple]) -> Iterator[dict]:
    """One object per model and batch: model, rows, side_by_side, and see `Modes.rates`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, size in sizes.items():
        model = random_model(device, dtype, *size)
        modes, vocabulary = Modes(device, model), size[5]
        for rows in ROWS:
            rates = modes.rates(prompts(rows, vocabulary))
            yield {"model": name, "rows": rows, "side_by_side": False} | rates
        yield {
            "model": name,
            "rows": MEMBERS * PROMPTS_EACH,
            "side_by_side": True,
        } | _side_by_side(device, model, modes, prompts(PROMPTS_EACH, vocabulary))
        del model, modes
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _side_by_side(device: torch.device, model, modes: Modes, rows: list) -> dict[str, float]:
    shards = []
    for name, param in model.named_parameters():
        whole = (Region.contiguous(0, param.numel()),)
        shards.append(ParameterShard(name, tuple(param.shape), param.view(-1), whole, whole))
    side_by_side = SideBySide(model, shards, device, 1)
    numbers = [member for member in range(MEMBERS) for _ in rows]
    with side_by_side.members([Member(seed, 0.001) for seed in range(MEMBERS)], Clock()):
        return modes.rates(rows * MEMBERS, members=numbers, set_members=side_by_side.set_rows)


def main(device: str | torch.device = "cuda") -> int:
    """Measure on a device and print a table; on a CPU with a model that shows only that it runs."""
    device = torch.device(device)
    print("| model | rows | eager, tokens/s | graph, tokens/s | ratio | first call with graphs |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in measure(device, SIZES if device.type == "cuda" else TOY):
        members = f" of {MEMBERS} members" if row["side_by_side"] else ""
        print(
            f"| {row['model']} | {row['rows']}{members} | {row['eager']:,.0f} "
            f"| {row['graph']:,.0f} | {row['graph'] / row['eager']:.2f} | {row['first']:.1f} s |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
