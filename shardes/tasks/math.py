"""Mathematics with boxed answers, as in the MATH data set: right or wrong, as math-verify decides.

Needs the package's extra `math`. Rows have `problem` or `question`, and `answer`: one, a list of
accepted ones, or a text that ends in "#### 72", as in GSM8K. Without an answer, it is the last box
of `solution`.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from shardes.errors import ConfigError
from shardes.tasks.rows import load_rows

# Seconds for parsing a response, and for comparing it with the answer. Beyond, it scores 0.
TIMEOUT = 2
MAX_ANSWER = 1000  # characters; a longer answer scores 0
MAX_BOXES = 10  # that are one answer together
TOLERANCE = 1e-12  # of exact numbers, relative to their size
BOX = "\\boxed{"
# \boxed{2}, \fbox{2}, \boxed {2}; without braces a number, or all up to the formula's end, a $.
BOXES = re.compile(
    r"\\(?:boxed|fbox)(?![a-zA-Z])\s*"
    r"(?:\{|(?P<bare>-?\d(?:[\d.,]*\d)?(?![\w^])(?!\s*[-+*/=^])|[^\s{$][^\n$]{0,98}(?=\$)))"
)
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are characters of the content
BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&]|\\[,;()\[\]]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b){0,40}"
)
STYLED = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}")
BRACKETED = re.compile(r"\((-?\d+(?:\.\d*)?)\)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d*)?")
INSTRUCTION = "\nReason step by step, and put the final answer within \\boxed{}."


@dataclass
class Problem:
    """A problem with the answers that are accepted."""

    problem: str
    answers: list[str]


@dataclass
class Box:
    """The content of a box, and where the box begins and ends in the text."""

    content: str
    begin: int
    end: int


def boxed(text: str) -> str | None:
    """The content of the last box in a text; None if there is no box, or it is not closed."""
    box = next(_boxes_from_the_last(text), None)
    return box.content if box else None


def _boxes_from_the_last(text: str) -> Iterator[Box]:
    """The boxes of a text, the last first; ends at one that is not closed."""
    for match in reversed(list(BOXES.finditer(text))):
        if match["bare"] is not None:
            yield Box(match["bare"].strip(), match.start(), match.end())
            continue
        depth = 1
        for brace in BRACES.finditer(text, match.end()):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                yield Box(text[match.end() : brace.start()], match.start(), brace.end())
                break
        else:
            return


def reward(response: str, answers: str | Sequence[str]) -> float:
    """1 if the response's last box is mathematically equal to one of the answers; otherwise 0.

    The last boxes are also one answer, a set, if only commas, "and" or "or" stand between them.
    """
    accepted = [answers] if isinstance(answers, str) else answers
    texts = [text for text in _boxed_answers(response) if text and len(text) <= MAX_ANSWER]
    return float(any(_equal(answer, text) for text in texts for answer in accepted))


def _boxed_answers(response: str) -> list[str]:
    """The content of the last box and, if there are several together, the set of their contents."""
    boxes: list[Box] = []
    for box in islice(_boxes_from_the_last(response), MAX_BOXES):
        if boxes and not BETWEEN_BOXES.fullmatch(response, box.end, boxes[-1].begin):
            break
        boxes.append(box)
    contents = [box.content for box in boxes]
    if len(contents) < 2:
        return contents
    return [contents[0], rf"\{{{', '.join(reversed(contents))}\}}"]


def _equal(answer: str, text: str) -> bool:
    """Whether a text equals the answer: as text, or as math-verify reads both."""
    if answer == text:
        return True
    answer_forms, text_forms = (dict.fromkeys([form, _plain(form)]) for form in (answer, text))
    return any(_verified(*forms) for forms in product(answer_forms, text_forms))


def _plain(text: str) -> str:
    """A number without the typeface, brackets and full stop that solutions give it."""
    styled = STYLED.fullmatch(text.strip())
    content = (styled[1] if styled else text).strip()
    bracketed = BRACKETED.fullmatch(content)
    number = NUMBER.fullmatch(bracketed[1] if bracketed else content)
    return number[0].rstrip(".") if number else text


def _verified(answer: str, text: str) -> bool:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    try:
        gold, prediction = (
            parse(f"{BOX}{form}}}", parsing_timeout=TIMEOUT) for form in (answer, text)
        )
        if not verify(gold, prediction, timeout_seconds=TIMEOUT):
            return False
        return not timeout(TIMEOUT)(_are_other_numbers)(gold[0], prediction[0])
    except (Exception, TimeoutException):  # a response that breaks the grader is not right
        return False


def _are_other_numbers(gold: Any, prediction: Any) -> bool:
    """Whether two exact numbers differ; math-verify takes differences below 1e-15 for none."""
    from sympy import Expr, Float, UnevaluatedExpr

    for value in (gold, prediction):
        # Decimals are rounded, and math-verify lets 5% be written for 5.
        if not isinstance(value, Expr) or not value.is_number or value.has(Float, UnevaluatedExpr):
            return False
    size = max(abs(gold.evalf()), abs(prediction.evalf()))
    return bool(abs((gold - prediction).evalf()) > TOLERANCE * size)


def load_problems(source: str) -> list[Problem]:
    """The problems of a source.

    Args:
        source: as for `load_rows`.

    Raises:
        ConfigError: the source cannot be read, or a row lacks a field or has an answer that no
            response could equal.
    """
    problems = []
    for row_position, row in load_rows(source):
        position = f"{source}: {row_position}"
        problem = row.get("problem", row.get("question"))
        if not isinstance(problem, str):
            raise ConfigError(f"{position} has no problem, nor a question")
        problems.append(Problem(problem, _answers(position, row)))
    return problems


def _answers(position: str, row: Mapping[str, Any]) -> list[str]:
    answer, solution = row.get("answer"), row.get("solution")
    if answer in (None, "") and isinstance(solution, str):
        answer = boxed(solution) or answer
    if answer is None:
        raise ConfigError(f"{position} has no answer, nor a solution with a box")
    answers = [_final(value) for value in _listed(answer)]
    if not answers or not all(map(_is_readable, answers)):
        text = repr(answer)
        text = text if len(text) < 100 else f"{text[:80]}... ({len(text)} characters)"
        raise ConfigError(
            f"{position}: answer is {text}; it must be a number, or LaTeX of at most {MAX_ANSWER} "
            'characters with closed braces, or a list of these, or end in "#### 72"'
        )
    return answers


def _listed(answer: Any) -> Sequence[Any]:
    """The accepted answers: those of a list, or of a text that writes a list of texts."""
    if isinstance(answer, str) and answer.strip().startswith(("['", '["')):
        try:
            written = ast.literal_eval(answer.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [answer]
        return written if all(isinstance(item, str) for item in written) else [answer]
    return answer if isinstance(answer, list | tuple) else [answer]


def _final(value: Any) -> str:
    """What a response must equal: of "... #### 72", "... \\boxed{72}" and "$72$", 72."""
    text = str(value) if isinstance(value, str | int | float) else ""
    if "####" in text:
        text = text.rpartition("####")[2]
    text = (boxed(text) or text).strip()
    is_formula = len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2
    return text[1:-1].strip() if is_formula else text


def _is_readable(answer: str) -> bool:
    return (
        answer not in ("", "nan")
        and len(answer) <= MAX_ANSWER
        and boxed(f"{BOX}{answer}}}") == answer
    )


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
            reward(response, problem.answers)
            for problem, response in zip(problems, responses, strict=True)
        ]

    def correct(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[bool]:
        """Whether each response's answer is right; the mean over a split is pass@1."""
        return [score == 1 for score in self.score(split, responses, which)]
