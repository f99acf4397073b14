"""The update of the center in one iteration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shardes.errors import ConfigError
from shardes.noise import LowRank, add_noise

if TYPE_CHECKING:  # journals are read without torch
    import torch

    from shardes.es.rule import Rule
    from shardes.sharding.regions import Region
    from shardes.sharding.weight_files import WeightFiles


@dataclass
class Update:
    """θ ← θ − λ·(θ − anchor) + Σ c_n·ε(s_n); a user's rule can take the place of adding the sum.

    Attributes:
        weight_decay: λ.
        decay_to: the anchor: "zero" for 0, "base" for the base model (arXiv 2605.30148).
        evolve: a regular expression: only parameters with a match in their names change. None: all.
        rank: r of noise of low rank, with which vectors do not change; 0: full noise.
        rule: the name of the user's rule; "": none.
        alpha: α, which only such a rule is given.
    """

    seeds: Sequence[int]
    coefficients: Sequence[float]
    weight_decay: float = 0.0
    decay_to: str = "zero"
    evolve: str | None = None
    rank: int = 0
    rule: str = ""
    alpha: float = 0.0

    def apply(
        self,
        theta: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        regions: Sequence[Region],
        base: WeightFiles,
        out: torch.Tensor | None = None,
        rule: Rule | None = None,
        kept: Sequence[torch.Tensor] = (),
    ) -> None:
        """Write to `out` the update of `theta`, the flat elements of `regions` of a parameter.

        λ·(θ − anchor) is rounded to float32, and so is θ minus that; `add_noise` does the rest. A
        parameter that does not change is not written to `out`. With weight decay, `theta` may be
        overwritten.

        Args:
            shape: of the full parameter.
            base: the base model.
            out: None: `theta`.
            rule: the user's, with which `theta` is float32 and `out` is None.
            kept: the values that the rule keeps for these elements; they change.

        Raises:
            ConfigError: `rule` is not that of the update.
        """
        self._check_rule(rule)
        if not evolves(self.evolve, self.rank, name, shape):
            return
        import torch

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
        low_rank = noise_kind(self.rank, shape)
        if rule is None:
            add_noise(theta, name, regions, self.seeds, self.coefficients, out, low_rank)
            return
        assert out is theta and theta.dtype == torch.float32
        step = torch.zeros_like(theta)
        add_noise(step, name, regions, self.seeds, self.coefficients, step, low_rank)
        rule.update(theta, step, self.alpha, kept)

    def _check_rule(self, rule: Rule | None) -> None:
        name = rule.name if rule else ""
        if name != self.rule:
            raise ConfigError(
                f"the run's es.update is {self.rule or 'not set'}, and the code given is "
                f"{name or 'none'}; pass the file that the run had as --update FILE:Class, or "
                "nothing if it had none"
            )


def evolves(pattern: str | None, rank: int, name: str, shape: tuple[int, ...]) -> bool:
    """Whether training changes a parameter; see `Update.evolve` and `Update.rank`."""
    has_noise = rank == 0 or LowRank(shape, rank).is_matrix
    return has_noise and (pattern is None or re.search(pattern, name) is not None)


def noise_kind(rank: int, shape: tuple[int, ...]) -> LowRank | None:
    """The kind of noise on a parameter, as `add_noise` takes it; see `Update.rank`."""
    return LowRank(shape, rank) if rank else None
