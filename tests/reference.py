"""A whole model in one piece: transformers' own answers, and centers by the definition."""

from collections.abc import Sequence
from math import prod, sqrt
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from shardes.inference.choosing import gumbel
from shardes.noise import gaussian
from shardes.sharding.digest import digest, format_digest
from shardes.sharding.regions import Region


class Reference:
    """A model that transformers loads and runs, and its center, float32, flat, by parameter."""

    def __init__(self, directory: Path):
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.weights = {
            name: param.detach().clone().view(-1) for name, param in self.model.named_parameters()
        }

    def digest(self) -> str:
        total = sum(
            digest(name, [Region.contiguous(0, weight.numel())], weight)
            for name, weight in self.weights.items()
        )
        return format_digest(total)

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, eos: list[int], **keys: float
    ) -> list[list[int]]:
        responses = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos,
                **keys,
            )
            responses.append(out[0, len(prompt) :].tolist())
        return responses

    def logits(self, prompt: list[int], response: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :]

    def sample(
        self, prompt: list[int], seed: int, max_new_tokens: int, eos: list[int]
    ) -> list[int]:
        response: list[int] = []
        while len(response) < max_new_tokens and (not response or response[-1] not in eos):
            size = self.model.config.vocab_size
            noise = gumbel([seed], len(response), size, self.model.device)
            response.append((self.logits(prompt, response)[-1] + noise[0]).argmax().item())
        return response

    def log_probs(self, prompt: list[int], response: list[int]) -> list[float]:
        values = self.logits(prompt, response)[:-1].log_softmax(-1)
        return [row[token].item() for row, token in zip(values, response, strict=True)]

    def perturb(self, seed: int, sigma: float, rank: int = 0) -> None:
        """Perturb the model, but not `weights`; `rank` is that of the noise, 0 for full noise."""
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param += noise(name, tuple(param.shape), [seed], [sigma], rank)

    def update(self, seeds: list[int], coefficients: list[float], rank: int = 0) -> None:
        """Update `weights`, but not the model."""
        for name, param in self.model.named_parameters():
            total = noise(name, tuple(param.shape), seeds, coefficients, rank)
            self.weights[name] += total.flatten()


def noise(
    name: str, shape: tuple[int, ...], seeds: list[int], coefficients: list[float], rank: int
) -> torch.Tensor:
    """Σ c_n·ε(s_n), or with `rank` Σ c_n·(Σ_k a_k·b_kᵀ)/√r, on a whole parameter."""
    total = torch.zeros(shape)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        if not rank:
            total += gaussian(seed, name, 0, total.numel()).view(shape) * coefficient
        elif len(shape) > 1:
            *stack, rows, cols = shape
            a = gaussian(seed, name + "#rows", 0, prod(stack) * rows * rank)
            b = gaussian(seed, name + "#cols", 0, prod(stack) * cols * rank)
            a, b = a.view(*stack, rows, 1, rank), b.view(*stack, 1, cols, rank)
            for k in range(rank):
                total += a[..., k] * b[..., k] * float(np.float32(coefficient / sqrt(rank)))
    return total
