"""Mathematics with a boxed answer, as in MATH: right or wrong, by the judgement of math-verify.

Needs the package's extra `math`. Problems are JSON lines or a data set of the `datasets` library, with fields
`problem` and `answer`, or `solution`, whose last box is the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardes.config import ConfigError
from shardes.tasks.rows import load_rows

SECONDS = 2  # for parsing a response, and for comparing it with the answer; beyond, it scores 0
BOX = "\\boxed{"


@dataclass
class Problem:
    problem: str
    answer: str


def boxed(text: str) -> str | None:
    """What the last box of a text holds."""
    begin = text.rfind(BOX)
    if begin < 0:
        return None
    begin += len(BOX)
    depth = 1
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin:at]
    return None


def reward(response: str, answer: str) -> float:
    """1 where the response's last box equals the answer, as mathematics; else, or if it cannot be read, 0."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    found = boxed(response)
    if found is None or len(found) > 1000:
        return 0.0
    try:
        gold, given = (parse(f"{BOX}{text}}}", parsing_timeout=SECONDS) for text in (answer, found))
        return float(verify(gold, given, timeout_seconds=SECONDS))
    except (Exception, TimeoutException):  # whatever a response makes of the grader, it is no answer
        return 0.0


def load_problems(source: str) -> list[Problem]:
    """The problems of a file of JSON lines, or of a data set, written datasets:NAME[,CONFIG]:SPLIT.

    Raises:
        ConfigError: no such file or data set, or an entry without the fields; names it.
    """
    problems = []
    for where, row in load_rows(source):
        problem, answer, solution = (row.get(key) for key in ("problem", "answer", "solution"))
        if answer is None and isinstance(solution, str):
            answer = boxed(solution)
        if not isinstance(problem, str) or not isinstance(answer, str | int | float):
            field = "problem" if not isinstance(problem, str) else "answer, nor a solution with a box"
            raise ConfigError(f"{source}: {where} has no {field}")
        problems.append(Problem(problem, str(answer)))
    return problems


class Math:
    """The task: problems put as chat. Splits are "train", "test" and the names in `tests`."""

    def __init__(self, train: str | None = None, test: str | None = None, tests: Mapping[str, str] | None = None):
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise ConfigError("task.name=math: needs the package math-verify: pip install 'shardes[math]'") from None
        shipped = Path(__file__).parent / "data"
        sources = {
            "train": train or str(shipped / "math_train.jsonl"),
            "test": test or str(shipped / "math_test.jsonl"),
        }
        self._problems = {split: load_problems(source) for split, source in (sources | dict(tests or {})).items()}

    def prompts(self, split: str) -> list[list[dict[str, str]]]:
        how = "\nReason step by step, and put the final answer within \\boxed{}."
        return [[{"role": "user", "content": problem.problem + how}] for problem in self._problems[split]]

    def score(self, split: str, responses: list[str], which: Sequence[int] | None = None) -> list[float]:
        problems = self._problems[split]
        asked = problems if which is None else [problems[number] for number in which]
        return [reward(response, problem.answer) for problem, response in zip(asked, responses, strict=True)]

    def correct(self, split: str, responses: list[str]) -> list[bool]:
        """Whether each answer is right; over a split the mean is pass@1."""
        return [found == 1 for found in self.score(split, responses)]
