"""What a result of a replica that joined must look like, before anybody acts on it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardes.config.limits import MOST_PARTS, is_part_name, is_reward
from shardes.config.schema import Config
from shardes.rewards.scoring import FAILURES

MEMBER_BYTES = 1024 + 72 * MOST_PARTS  # at most, beside the scores
NUMBER_BYTES = 32  # a number of JSON and a comma, at most


class Malformed(Exception):
    """A result is not what this run asked for; says what is wrong, in words of our own."""


@dataclass(frozen=True)
class ResultLimits:
    """What the results of one run can be.

    Args:
        members: of an iteration.
        prompts: that a member answers.
        scores: whether results have the rewards by prompt.
        new_tokens: of a response, at most.
        vocabulary: token ids are below this.
        evaluation: the number of prompts in each piece of an evaluation of the center.
    """

    members: int
    prompts: int
    scores: bool
    new_tokens: int
    vocabulary: int
    evaluation: tuple[int, ...]

    @classmethod
    def of_run(
        cls, config: Config, prompts: dict[str, int], vocabulary: int, replicas: int
    ) -> "ResultLimits":
        """The limits that follow from the config.

        Args:
            prompts: their number by split.
            replicas: of the primary job.
        """
        chosen = config.task.prompts_per_iteration or prompts["train"]
        return cls(
            config.es.population_size,
            chosen,
            config.es.standardize_prompts,
            config.generation.max_new_tokens,
            vocabulary,
            (*shares(chosen, replicas), *shares(prompts["test"], replicas)),
        )

    @property
    def bytes(self) -> int:
        """The length of the longest result."""
        responses = max(self.evaluation, default=0) * (self.new_tokens + 1)
        return MEMBER_BYTES + NUMBER_BYTES * max(self.prompts if self.scores else 0, responses)

    def pieces(self, kind: str) -> int:
        """The number of pieces of a queue `iteration T` or `evaluation T`."""
        return self.members if kind == "iteration" else len(self.evaluation)

    def check(self, kind: str, piece: int, replica: int, text: str) -> None:
        """Check a result that `replica` posts of a piece.

        Raises:
            Malformed: types, ranges or lengths are not those of this run.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise Malformed("it is not JSON") from None
        if kind == "iteration":
            self._check_member(value, replica)
        else:
            self._check_responses(value, self.evaluation[piece])

    def _check_member(self, value: Any, replica: int) -> None:
        if type(value) is not list or not 4 <= len(value) <= 7:
            raise Malformed("it is not a list of four to seven values")
        value = value + [[], {}, {}][len(value) - 4 :]
        reward, tokens, poster, finished, scores, failures, parts = value
        if not is_reward(reward):
            raise Malformed("its reward is not a finite number")
        if not _is_count(tokens, self.prompts * self.new_tokens):
            raise Malformed("its number of tokens is not possible")
        if type(poster) is not int or poster != replica:
            raise Malformed("it is in the name of another replica")
        if not is_reward(finished):
            raise Malformed("its time is not a finite number")
        if type(scores) is not list or not all(map(is_reward, scores)):
            raise Malformed("its scores are not finite numbers")
        if len(scores) != (self.prompts if self.scores else 0):
            raise Malformed("it has another number of scores than prompts")
        if type(failures) is not dict or not set(failures) <= set(FAILURES):
            raise Malformed("its failures are not known ones")
        if not all(_is_count(count, self.prompts) for count in failures.values()):
            raise Malformed("its failures are not counts of responses")
        if type(parts) is not dict or len(parts) > MOST_PARTS:
            raise Malformed("it has parts that are not a few named numbers")
        if not (all(map(is_part_name, parts)) and all(map(is_reward, parts.values()))):
            raise Malformed("it has a part that is no finite number, or is not named as parts are")

    def _check_responses(self, value: Any, prompts: int) -> None:
        if type(value) is not list or len(value) != prompts:
            raise Malformed("it is not one response per prompt")
        for response in value:
            if type(response) is not list or len(response) > self.new_tokens:
                raise Malformed("a response is not a list of at most max_new_tokens token ids")
            if not all(_is_count(token, self.vocabulary - 1) for token in response):
                raise Malformed("a response has token ids that are not in the vocabulary")


def shares(prompts: int, replicas: int) -> Sequence[int]:
    """The number of prompts in each piece of a split's evaluation, which replicas share out."""
    parts = min(replicas, prompts)
    return [len(range(part, prompts, parts)) for part in range(parts)]


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most
