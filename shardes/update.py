"""What one iteration does to the center, and all that it takes to do it again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardes.noise import add_noise
from shardes.shards import Region
from shardes.weights import WeightFiles


@dataclass
class Update:
    """θ ← θ − λ·(θ − anchor) + Σ c_n·ε(s_n), on the parameters whose names `evolve` is found in.

    λ is `weight_decay`; the anchor is 0, or with `decay_to="base"` the base model (arXiv 2605.30148). `evolve` is a
    regular expression; None: all parameters.
    """

    seeds: Sequence[int]
    coefficients: Sequence[float]
    weight_decay: float = 0.0
    decay_to: str = "zero"
    evolve: str | None = None

    def touches(self, name: str) -> bool:
        return evolves(self.evolve, name)

    def apply(
        self,
        theta: torch.Tensor,
        name: str,
        regions: Sequence[Region],
        base: WeightFiles,
        out: torch.Tensor | None = None,
    ) -> None:
        """Write to `out` (by default `theta`) what becomes of `theta`, the flat elements of `regions` of a parameter.

        λ·(θ − anchor) is rounded to float32, and so is its difference from θ; the rest is one `add_noise`. What is
        not touched is left alone, `out` included.
        """
        if not self.touches(name):
            return
        out = theta if out is None else out
        if self.weight_decay:
            theta = theta.float() if theta.dtype != torch.float32 else theta
            away = theta.clone()
            if self.decay_to == "base":
                anchor = torch.empty(theta.shape)
                base.read(name, regions, anchor)
                away -= anchor.to(theta.device)
            away *= float(np.float32(self.weight_decay))
            theta -= away
        add_noise(theta, name, regions, self.seeds, self.coefficients, out)


def evolves(pattern: str | None, name: str) -> bool:
    """Whether the parameter `name` is among those that are trained."""
    return pattern is None or re.search(pattern, name) is not None
