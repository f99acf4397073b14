"""Countdown: combine given numbers into an expression that equals a target (paper, section 4.1).

The reward is 0.1 × format + answer. Expressions are parsed and computed in exact arithmetic; no
response is ever run as code.
"""

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from shardes.errors import ConfigError
from shardes.tasks.rows import load_rows

# A longer expression, or one with more nested signs and brackets, scores 0.
MAX_LENGTH = 500  # characters
MAX_DEPTH = 50
TOLERANCE = Fraction(1, 100_000)
BEGIN, END = "<answer>", "</answer>"
JOINT = f"</think>\n{BEGIN}"
TOKENS = re.compile(r" *([0-9]+|[-+*/()])")
Value = Fraction
OPERATORS: dict[str, tuple[int, Callable[[Value, Value], Value]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
}


def reward(response: str, numbers: list[int], target: Fraction | int) -> float:
    """The reward of a response: 0.1 × format + answer, from 0 to 1.1.

    Args:
        response: the text after the prompt, which ends in "<think>".
        numbers: the numbers to use, each exactly once.
        target: the value that the expression must have.
    """
    text = "<think>" + response
    return 0.1 * format_score(text) + answer_score(text, numbers, target)


def format_score(text: str) -> float:
    """1 for a think section, a newline, and an answer section that ends the text.

    What is between the first of them and the end may hold further tags, and a newline may follow.
    Otherwise the score is the sum of 0.1 for a think section and 0.5 for an answer section.
    """
    body = text.removesuffix("\n")
    begin = body.find(JOINT)
    if begin >= 0 and body[begin + len(JOINT) :].endswith(END):
        return 1.0
    return 0.1 * ("</think>" in text) + 0.5 * bool(answers(text))


def answer_score(text: str, numbers: list[int], target: Fraction | int) -> float:
    """1 if the last answer section is an expression of all the numbers that equals the target.

    White space around the expression does not count.
    """
    sections = answers(text)
    expression = sections[-1].strip() if sections else ""
    if len(expression) > MAX_LENGTH:
        return 0.0
    try:
        value = evaluate(expression, numbers)
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(abs(value - target) < TOLERANCE)


def answers(text: str) -> list[str]:
    """The contents of the answer sections, each from the first <answer> to the next </answer>."""
    sections, end = [], 0
    while (begin := text.find(BEGIN, end)) >= 0:
        begin += len(BEGIN)
        if (close := text.find(END, begin)) < 0:
            break
        sections.append(text[begin:close])
        end = close + len(END)
    return sections


def evaluate(expression: str, numbers: list[int]) -> Fraction:
    """The value of an expression in Python's grammar, of integers, + - * / and brackets.

    Raises:
        ValueError: it is not an expression, or does not use each of the numbers exactly once.
        ZeroDivisionError: it divides by zero.
    """
    tokens = tokenize(expression)
    used = [token for token in tokens if token.isdigit()]
    if sorted(map(int, used)) != sorted(numbers) or any(
        len(n) > 1 and n[0] == "0" and int(n) for n in used
    ):
        raise ValueError("other numbers")
    value, position = _binary(tokens, 0, 1, 0)
    if position != len(tokens):
        raise ValueError(f"unexpected {tokens[position]}")
    return value


def tokenize(expression: str) -> list[str]:
    """The numbers, operators and brackets of an expression, without spaces."""
    tokens, position = [], 0
    expression = expression.rstrip(" ")
    while position < len(expression):
        match = TOKENS.match(expression, position)
        if match is None:
            raise ValueError(f"unexpected {expression[position]!r}")
        tokens.append(match[1])
        position = match.end()
    return tokens


def _binary(tokens: list[str], position: int, precedence: int, depth: int) -> tuple[Fraction, int]:
    """Operands joined by operators of at least that precedence: the value, and the end position."""
    value, position = _operand(tokens, position, depth)
    while (
        position < len(tokens)
        and tokens[position] in OPERATORS
        and OPERATORS[tokens[position]][0] >= precedence
    ):
        own_precedence, apply = OPERATORS[tokens[position]]
        right, position = _binary(tokens, position + 1, own_precedence + 1, depth)
        value = apply(value, right)
    return value, position


def _operand(tokens: list[str], position: int, depth: int) -> tuple[Fraction, int]:
    """A number, a signed operand, or a bracketed expression: the value, and the end position."""
    if position == len(tokens) or depth > MAX_DEPTH:
        raise ValueError("incomplete, or nested too deeply")
    token = tokens[position]
    if token.isdigit():
        return Fraction(int(token)), position + 1
    if token in "+-":
        value, position = _operand(tokens, position + 1, depth + 1)
        return (-value if token == "-" else value), position
    if token != "(":
        raise ValueError(f"unexpected {token}")
    value, position = _binary(tokens, position + 1, 1, depth + 1)
    if position == len(tokens) or tokens[position] != ")":
        raise ValueError("a bracket is not closed")
    return value, position + 1


@dataclass
class Problem:
    """Numbers to use, each once, and the value their expression must have.

    The prompt ends in "<think>".
    """

    prompt: str
    numbers: list[int]
    target: Fraction


def prompt(numbers: list[int], target: Fraction | int | str) -> str:
    """The prompt of a problem, for a model that continues text."""
    return (
        "A user asks a question and an assistant answers it, after thinking it through.\n"
        f"User: Using the numbers {numbers}, make an expression that equals {target}. Use each "
        "number exactly once, with +, -, *, / and brackets. Think between <think> and </think>; "
        "then give the expression alone between <answer> and </answer>, "
        "as in <answer>(1 + 2) / 3</answer>.\n"
        "Assistant: <think>"
    )


def load_problems(source: str | Path) -> list[Problem]:
    """The problems of a source: rows with numbers (or nums) and target, as published.

    `context` is the prompt, in the published data. If it is missing or does not end in "<think>",
    `prompt` makes one.

    Args:
        source: as for `load_rows`.

    Raises:
        ConfigError: the source cannot be read, or a row has a wrong field.
    """
    problems = []
    for row_position, row in load_rows(str(source)):
        position = f"{source}: {row_position}"
        numbers = _field(position, row, "numbers" if "numbers" in row else "nums", _integers)
        target = _field(position, row, "target", _number)
        context = _field(position, row, "context", lambda text: str.rstrip(text or ""))
        if not context.endswith("<think>"):
            # A fraction is put as the data writes it.
            is_integer = target.denominator == 1
            context = prompt(numbers, target if is_integer else str(row["target"]).strip())
        problems.append(Problem(context, numbers, target))
    return problems


def _number(value: Any) -> Fraction:
    if isinstance(value, bool):
        raise TypeError
    # A float stands for its decimal digits, not for their nearest binary fraction.
    return Fraction(str(value) if isinstance(value, float) else value)


def _integers(values: Any) -> list[int]:
    values = json.loads(values) if isinstance(values, str) else values  # as in .csv
    numbers = [_number(value) for value in values]
    if not numbers or any(number < 0 or number.denominator != 1 for number in numbers):
        raise ValueError
    return [int(number) for number in numbers]


def _field(position: str, row: dict, name: str, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(row.get(name))
    except (TypeError, ValueError, ZeroDivisionError):
        raise ConfigError(
            f"{position}: {name} is {row.get(name)!r}; a problem has numbers or nums (a list of "
            "integers, none negative), target (a number), and perhaps context (a prompt)"
        ) from None


class Countdown:
    """Problems, put as raw text; `train` and `test` are their sources, by default the package's."""

    def __init__(self, train: str | None = None, test: str | None = None):
        data = Path(__file__).parent / "data"
        self._problems = {
            "train": load_problems(train or data / "countdown_train.json"),
            "test": load_problems(test or data / "countdown_test.json"),
        }

    def prompts(self, split: str) -> list[str]:
        return [problem.prompt for problem in self._problems[split]]

    def score(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[float]:
        problems = self._chosen(split, which)
        return [
            reward(response, problem.numbers, problem.target)
            for problem, response in zip(problems, responses, strict=True)
        ]

    def correct(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[bool]:
        """Whether each response's answer is right; the mean over a split is the accuracy."""
        return [
            answer_score("<think>" + response, problem.numbers, problem.target) == 1
            for problem, response in zip(self._chosen(split, which), responses, strict=True)
        ]

    def _chosen(self, split: str, which: Sequence[int] | None) -> list[Problem]:
        problems = self._problems[split]
        return problems if which is None else [problems[number] for number in which]
