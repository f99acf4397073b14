"""A user's rule in place of θ ← θ + Σ c_n·ε(s_n): `es.update: my_update.py:Class`.

A rule says how one element of θ moves, given that element's part of the sum and numbers that the
rule has kept for it. So any rank computes it for what it holds, and every layout gives the same
center. What it keeps is not stored anywhere: it follows from the journal's records, as the center
does, by replaying all of them on the base model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from shardes.errors import ConfigError, described
from shardes.tasks.user_code import code_files, user_class

ELEMENTS = 1003  # of the check; no vector unit divides it
CUTS = [0, 1, 8, 107, 622, ELEMENTS]


@dataclass(frozen=True)
class Rule:
    """A user's rule.

    Attributes:
        name: as the journal has it: the class's name and the beginning of its code's SHA-256.
        buffers: the number of float32 values that it keeps for each element.
        code: an object of the user's class.
    """

    name: str
    buffers: int
    code: Any

    def update(
        self, theta: torch.Tensor, step: torch.Tensor, alpha: float, kept: Sequence[torch.Tensor]
    ) -> None:
        """Change `theta` and `kept` in place.

        All are flat float32 tensors of the same elements, any part of a parameter.

        Args:
            step: Σ c_n·ε(s_n), c_n = (α/N)·z_n.
            alpha: α of the iteration.
            kept: the rule's buffers, 0 before the first iteration.
        """
        self.code.update(theta, step, alpha, *kept)


def load_rule(reference: str | None) -> Rule | None:
    """The rule that a setting names, file.py:Class; None for None.

    Raises:
        ConfigError: the file or class cannot be used, or `update` is not a function of an element.
    """
    if reference is None:
        return None
    key = "es.update"
    with user_class(key, reference) as rule_class:
        try:
            code = rule_class()
            buffers = getattr(code, "buffers", 0)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, too
            raise ConfigError(
                f"{key}={reference}: {rule_class.__name__}() raised {described(error)}"
            ) from error
    if not callable(getattr(code, "update", None)):
        raise ConfigError(
            f"{key}={reference}: {rule_class.__name__} has no update(theta, step, alpha, ...)"
        )
    if type(buffers) is not int or buffers < 0:
        raise ConfigError(f"{key}={reference}: buffers is {buffers!r}, not a number of buffers")
    sha = hashlib.sha256()
    for file in code_files(reference):
        sha.update(hashlib.sha256(file.read_bytes()).digest())
    rule = Rule(f"{rule_class.__name__} {sha.hexdigest()[:16]}", buffers, code)
    _check(f"{key}={reference}", rule)
    return rule


def _check(subject: str, rule: Rule) -> None:
    """Raise ConfigError if an element's result depends on anything but that element's values."""
    random = torch.Generator().manual_seed(0)
    thetas = torch.randn(ELEMENTS, generator=random)
    steps = [1e-3 * torch.randn(ELEMENTS, generator=random) for _ in range(3)]
    whole = _after(subject, rule, thetas, steps)
    parts = [
        _after(subject, rule, thetas[begin:end], [step[begin:end] for step in steps])
        for begin, end in pairwise(CUTS)
    ]
    if torch.equal(whole[0], thetas):
        raise ConfigError(f"{subject}: update must change theta in place, and it did not")
    for number, found in enumerate(whole):
        if found.shape != thetas.shape or not found.isfinite().all():
            raise ConfigError(
                f"{subject}: update must leave theta and the buffers finite and of their sizes"
            )
        if not torch.equal(found, torch.cat([part[number] for part in parts])):
            raise ConfigError(
                f"{subject}: update gives an element other bits where theta is cut into other "
                "parts, as another layout cuts it; use operations on single elements, one at a "
                "time: docs/variants.md"
            )


def _after(
    subject: str, rule: Rule, theta: torch.Tensor, steps: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Theta and the buffers after these steps."""
    theta = theta.clone()
    kept = [torch.zeros_like(theta) for _ in range(rule.buffers)]
    for step in steps:
        try:
            rule.update(theta, step.clone(), 1e-3, kept)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ConfigError(f"{subject}: update raised {described(error)}") from error
    return [theta, *kept]
