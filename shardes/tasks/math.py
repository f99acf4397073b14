"""Mathematics with boxed answers, as in the MATH data set: right or wrong, as math-verify decides.

Needs the package's extra `math`. Problems are JSON lines or a data set of the `datasets` library,
with fields `problem` and `answer`, or with `solution`, whose last box holds the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardes.errors import ConfigError
from shardes.tasks.rows import load_rows

# Seconds for parsing a response, and for comparing it with the answer. Beyond, it scores 0.
TIMEOUT = 2
MAX_ANSWER = 1000  # characters; a longer answer scores 0
BOX = "\\boxed{"
INSTRUCTION = "\nReason step by step, and put the final answer within \\boxed{}."


@dataclass
class Problem:
    problem: str
    answer: str


def boxed(text: str) -> str | None:
    """The content of the last box in a text; None if there is no box, or it is not closed."""
    begin = text.rfind(BOX)
    if begin < 0:
        return None
    begin += len(BOX)
    depth = 1
    for end in range(begin, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin:end]
    return None


def reward(response: str, answer: str) -> float:
    """1 if the response's last box is mathematically equal to the answer; otherwise 0."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    boxed_answer = boxed(response)
    if boxed_answer is None or len(boxed_answer) > MAX_ANSWER:
        return 0.0
    try:
        gold, prediction = (
            parse(f"{BOX}{text}}}", parsing_timeout=TIMEOUT) for text in (answer, boxed_answer)
        )
        return float(verify(gold, prediction, timeout_seconds=TIMEOUT))
    except (Exception, TimeoutException):  # a response that breaks the grader is not right
        return 0.0


def load_problems(source: str) -> list[Problem]:
    """The problems of a source.

    Args:
        source: a file of JSON lines, or a data set, written datasets:NAME[,CONFIG]:SPLIT.

    Raises:
        ConfigError: the source cannot be read, or a row lacks a field.
    """
    problems = []
    for position, row in load_rows(source):
        problem, answer, solution = (row.get(key) for key in ("problem", "answer", "solution"))
        if answer is None and isinstance(solution, str):
            answer = boxed(solution)
        if not isinstance(problem, str):
            raise ConfigError(f"{source}: {position} has no problem")
        if not isinstance(answer, str | int | float):
            raise ConfigError(f"{source}: {position} has no answer, nor a solution with a box")
        problems.append(Problem(problem, str(answer)))
    return problems


class Math:
    """Problems, put as chat. The splits are "train", "test" and the names in `tests`."""

    def __init__(
        self,
        train: str | None = None,
        test: str | None = None,
        tests: Mapping[str, str] | None = None,
    ):
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise ConfigError(
                "task.name=math: needs the package math-verify: pip install 'shardes[math]'"
            ) from None
        data = Path(__file__).parent / "data"
        sources = {
            "train": train or str(data / "math_train.jsonl"),
            "test": test or str(data / "math_test.jsonl"),
        }
        self._problems = {
            split: load_problems(source) for split, source in (sources | dict(tests or {})).items()
        }

    def prompts(self, split: str) -> list[list[dict[str, str]]]:
        return [
            [{"role": "user", "content": problem.problem + INSTRUCTION}]
            for problem in self._problems[split]
        ]

    def score(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[float]:
        problems = self._problems[split]
        if which is not None:
            problems = [problems[number] for number in which]
        return [
            reward(response, problem.answer)
            for problem, response in zip(problems, responses, strict=True)
        ]

    def correct(self, split: str, responses: list[str]) -> list[bool]:
        """Whether each response's answer is right; the mean over a split is pass@1."""
        return [score == 1 for score in self.score(split, responses)]
