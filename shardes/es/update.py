"""The update of the center in one iteration."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardes.noise import add_noise
from shardes.sharding.regions import Region
from shardes.sharding.weight_files import WeightFiles


@dataclass
class Update:
    """θ ← θ − λ·(θ − anchor) + Σ c_n·ε(s_n).

    Attributes:
        weight_decay: λ.
        decay_to: the anchor: "zero" for 0, "base" for the base model (arXiv 2605.30148).
        evolve: a regular expression: only parameters with a match in their names change. None: all.
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
        """Write to `out` the update of `theta`, the flat elements of `regions` of a parameter.

        λ·(θ − anchor) is rounded to float32, and so is θ minus that; `add_noise` does the rest. A
        parameter that does not change is not written to `out`. With weight decay, `theta` may be
        overwritten.

        Args:
            base: the base model.
            out: None: `theta`.
        """
        if not self.touches(name):
            return
        out = theta if out is None else out
        if self.weight_decay:
            theta = theta.float() if theta.dtype != torch.float32 else theta
            decay = theta.clone()
            if self.decay_to == "base":
                anchor = torch.empty(theta.shape)
                base.read(name, regions, anchor)
                decay -= anchor.to(theta.device)
            decay *= float(np.float32(self.weight_decay))
            theta -= decay
        add_noise(theta, name, regions, self.seeds, self.coefficients, out)


def evolves(pattern: str | None, name: str) -> bool:
    """Whether training changes the parameter `name`; see `Update.evolve`."""
    return pattern is None or re.search(pattern, name) is not None
