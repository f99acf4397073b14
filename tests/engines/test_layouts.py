"""The sharding is a matter of memory and speed alone: every layout arrives at the same center, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import paper_coefficients
from shardes.generation import gumbel
from shardes.noise import gaussian
from shardes.population import member_seeds
from shardes.shards import digest, run
from workers.layout import ENDS, PROMPTS, RESPONSES, REWARDS, SEEDS

LAYOUTS = {  # engine, replicas, shard, tensor
    "1 rank": ("deepspeed", 1, 1, 1),
    "ZeRO 2": ("deepspeed", 1, 2, 1),
    "TP 2": ("deepspeed", 1, 1, 2),
    "ZeRO 2 × TP 2": ("deepspeed", 1, 2, 2),
    "2 replicas × ZeRO 2": ("deepspeed", 2, 2, 1),
    "FSDP, 1 rank": ("fsdp", 1, 1, 1),
    "FSDP 2": ("fsdp", 1, 2, 1),
    "FSDP, TP 2": ("fsdp", 1, 1, 2),
    "FSDP 2 × TP 2": ("fsdp", 1, 2, 2),
}


def models(engine: str, shard: int, tensor: int) -> list[str]:
    """The models that an engine can cut: uneven heads are AutoTP's strength, experts its limit."""
    names = ["biased_qwen"] if shard * tensor == 4 else ["tied_llama", "biased_qwen"]  # four ranks take their time
    if engine == "deepspeed":
        names.append("uneven_llama")
    if engine == "fsdp" or tensor == 1:
        names.append("moe_qwen")
    return names


# What they do is in the others, too; and tests/launchers runs two replicas every time.
SLOW = {"2 replicas × ZeRO 2", "FSDP, 1 rank", "TP 2", "FSDP, TP 2"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def layout(request) -> tuple[str, int, int, int]:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def results(zygote, layout, directories, tmp_path_factory) -> list[dict]:
    engine, replicas, shard, tensor = layout
    ranks, folder = replicas * shard * tensor, tmp_path_factory.mktemp("layout")
    chosen = [str(directories[name]) for name in models(engine, shard, tensor)]
    run = zygote.start(*map(str, layout), *chosen, ranks=ranks, log=folder / "log", tool="layout")
    assert run.wait(240) == [0] * ranks, run.text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def directories(uneven_llama, tied_llama, biased_qwen, moe_qwen) -> dict[str, Path]:
    return {"uneven_llama": uneven_llama, "tied_llama": tied_llama, "biased_qwen": biased_qwen, "moe_qwen": moe_qwen}


@pytest.fixture(scope="module")
def references(directories) -> dict[str, dict]:
    return {name: reference(directory) for name, directory in directories.items()}


def reference(directory: Path) -> dict:
    """What the whole model gives in one piece: transformers' own tokens, and the centers by the definition."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    weights = {name: param.detach().clone().view(-1) for name, param in model.named_parameters()}

    def whole_digest() -> str:
        return f"{sum(digest(n, [run(0, w.numel())], w) for n, w in weights.items()) % 2**64:016x}"

    def generate() -> list[list[int]]:
        responses = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=ENDS
            )
            responses.append(out[0, len(prompt) :].tolist())
        return responses

    def logits(prompt: list[int], response: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :]

    def sample(prompt: list[int], seed: int) -> list[int]:
        response: list[int] = []
        while len(response) < 24 and (not response or response[-1] not in ENDS):
            noise = gumbel([seed], len(response), model.config.vocab_size, model.device)
            response.append((logits(prompt, response)[-1] + noise[0]).argmax().item())
        return response

    def log_probs(prompt: list[int], response: list[int]) -> list[float]:
        found = logits(prompt, response)[:-1].log_softmax(-1)
        return [row[token].item() for row, token in zip(found, response, strict=True)]

    found = {
        "base": whole_digest(),
        "tokens": generate(),
        "sampled": list(map(sample, PROMPTS, SEEDS)),
        "log_probs": list(map(log_probs, PROMPTS, RESPONSES)),
        "numel": sum(w.numel() for w in weights.values()),
    }
    with torch.no_grad():
        for name, param in model.named_parameters():
            param += 0.05 * gaussian(7, name, 0, param.numel()).view(param.shape)
    found["member tokens"] = generate()
    found["digests"] = []
    for iteration, rewards in enumerate(REWARDS):
        seeds = member_seeds(5, iteration, len(rewards))
        coefficients = paper_coefficients(rewards, 0.05)
        for name, weight in weights.items():
            total = torch.zeros_like(weight)
            for seed, coefficient in zip(seeds, coefficients, strict=True):
                total += gaussian(seed, name, 0, weight.numel()) * coefficient
            weight += total
        found["digests"].append(whole_digest())
    return found


def cases(results: list[dict]):
    """Each rank's findings, one per model, dtype and gather mode."""
    for result in results:
        for key, found in result.items():
            if key != "rank":
                yield result["rank"], key.split()[0], key.split()[1], found


def test_centers_are_the_same_to_the_bit_in_every_dtype(results, references):
    for rank, model, dtype, found in cases(results):
        expected = references[model]
        assert found["base"] == expected["base"], (rank, model, dtype)
        assert found["digests"] == expected["digests"], (rank, model, dtype)


def test_responses_end_at_different_lengths(references):
    """Else the ranks of the shard axis would keep step by themselves."""
    for name, expected in references.items():
        assert len({len(tokens) for tokens in expected["tokens"]}) > 1, name


@pytest.mark.parametrize("which", ["tokens", "member tokens", "sampled"])
def test_tokens_are_those_of_transformers_on_every_rank(results, references, which):
    for rank, model, dtype, found in cases(results):
        if dtype == "float32":
            assert found[which] == references[model][which], (rank, model)


def test_log_probabilities_are_those_of_transformers_on_every_rank(results, references):
    for rank, model, dtype, found in cases(results):
        for mine, whole in zip(found["log_probs"], references[model]["log_probs"], strict=True):
            assert mine == pytest.approx(whole, abs=1e-4 if dtype == "float32" else 0.2), (rank, model, dtype)


def test_the_center_is_whole_again_after_a_failure(results):
    for _, _, _, found in cases(results):
        assert found["after a failure"] == found["base"]
        assert found["live again"]
        assert found["tokens again"] == found["tokens"]


def test_every_element_is_owned_once(results, references, layout):
    replicas = layout[1]
    totals: dict[str, int] = {}
    for result in results:
        for key, found in result.items():
            if key != "rank":
                totals[key] = totals.get(key, 0) + found["numel"]
    for key, total in totals.items():
        assert total == replicas * references[key.split()[0]]["numel"], key


def test_nothing_of_training_is_kept(results):
    for _, _, _, found in cases(results):
        assert found["gradients"] == 0
        assert found.get("optimizer") in (None, ["DeepSpeedZeRoOffload", None])


def test_the_distance_from_the_base_is_that_of_the_update(results):
    distances = [found["distance"] for _, _, _, found in cases(results)]
    assert all(distance["distance"] > 0 for distance in distances)
    by_model: dict[str, list[float]] = {}
    for _, model, _, found in cases(results):
        by_model.setdefault(model, []).append(found["distance"]["distance_relative"])
    for values in by_model.values():
        assert max(values) == pytest.approx(min(values), rel=1e-9)
