"""Mathematics with a boxed answer, as in MATH: right or wrong, by the judgement of math-verify.

Needs the package's extra `math`. Problems are JSON lines or a data set of the `datasets` library, with fields
`problem` and `answer`, or `solution`, whose last box is the answer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardes.config import ConfigError

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
    kind, _, rest = source.partition(":")
    rows = _data_set(source, rest) if kind == "datasets" else _json_lines(Path(source))
    problems = []
    for where, row in rows:
        problem, answer, solution = (row.get(key) for key in ("problem", "answer", "solution"))
        if answer is None and isinstance(solution, str):
            answer = boxed(solution)
        if not isinstance(problem, str) or not isinstance(answer, str | int | float):
            field = "problem" if not isinstance(problem, str) else "answer, nor a solution with a box"
            raise ConfigError(f"{source}: {where} (id {row.get('id', 'none')}) has no {field}")
        problems.append(Problem(problem, str(answer)))
    if not problems:
        raise ConfigError(f"{source}: holds no problems")
    return problems


def _json_lines(path: Path) -> Iterable[tuple[str, Mapping]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no readable file of problems: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}: line {number} is no object with fields")
            yield f"line {number}", row


def _data_set(source: str, rest: str) -> Iterable[tuple[str, Mapping]]:
    name, _, split = rest.rpartition(":")
    if not name:
        raise ConfigError(f"{source}: must be written datasets:NAME:SPLIT or datasets:NAME,CONFIG:SPLIT")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"{source}: needs the datasets package: pip install 'shardes[math]'") from None
    try:
        rows = load_dataset(*name.split(","), split=split)
    except Exception as error:  # of many kinds: no such name, split or network
        raise ConfigError(f"{source}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows):
        yield f"row {number}", row


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
