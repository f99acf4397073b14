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

# A longer expression, or one with more nested signs and brackets, scores 0.
MAX_LENGTH = 500  # characters
MAX_DEPTH = 50
TOLERANCE = Fraction(1, 100_000)
TOKENS = re.compile(r" *([0-9]+|[-+*/()])")
Value = Fraction
OPERATORS: dict[str, tuple[int, Callable[[Value, Value], Value]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
}


def reward(response: str, numbers: list[int], target: int) -> float:
    """The reward of a response: 0.1 × format + answer, from 0 to 1.1.

    Args:
        response: the text after the prompt, which ends in "<think>".
        numbers: the numbers to use, each exactly once.
        target: the value that the expression must have.
    """
    text = "<think>" + response
    return 0.1 * format_score(text) + answer_score(text, numbers, target)


def format_score(text: str) -> float:
    """1 for a think section, a newline, an answer section, and nothing else.

    Otherwise the sum of 0.1 for a think section and 0.5 for an answer section.
    """
    end_of_thought = text.find("</think>")
    begin = text.find("<answer>")
    end = text.find("</answer>", begin + len("<answer>")) if begin >= 0 else -1
    tail = text[end_of_thought:] if end_of_thought >= 0 else ""
    ends_with_answer = tail.find("</answer>") == len(tail) - len("</answer>")
    if tail.startswith("</think>\n<answer>") and ends_with_answer:
        return 1.0
    return 0.1 * (end_of_thought >= 0) + 0.5 * (end >= 0)


def answer_score(text: str, numbers: list[int], target: int) -> float:
    """1 if the last answer section is an expression of all the numbers that equals the target."""
    begin = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if begin < 0:
        return 0.0
    begin += len("<answer>")
    end = text.find("</answer>", begin)
    if end - begin > MAX_LENGTH:
        return 0.0
    try:
        value = evaluate(text[begin:end], numbers)
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(abs(value - target) < TOLERANCE)


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
    target: int


def prompt(numbers: list[int], target: int) -> str:
    """The prompt of a problem, for a model that continues text."""
    return (
        "A user asks a question and an assistant answers it, after thinking it through.\n"
        f"User: Using the numbers {numbers}, make an expression that equals {target}. Use each "
        "number exactly once, with +, -, *, / and brackets. Think between <think> and </think>; "
        "then give the expression alone between <answer> and </answer>, "
        "as in <answer>(1 + 2) / 3</answer>.\n"
        "Assistant: <think>"
    )


def load_problems(path: Path) -> list[Problem]:
    """The problems of a JSON file: a list of {id, context, numbers, target, solution}.

    `context` is the prompt, in the published data. If it is missing or does not end in "<think>",
    `prompt` makes one.

    Raises:
        ConfigError: the file cannot be read, or an entry has a wrong field.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a readable JSON file of Countdown problems: {error}"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: must hold a list of problems")
    problems = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: entry {number} is not an object with numbers and target")
        position = f"{path}: entry {number} (id {entry.get('id', 'none')})"
        numbers = _field(position, entry, "numbers", _integers)
        target = _field(position, entry, "target", int)
        context = _field(position, entry, "context", str.rstrip, "")
        if not context.endswith("<think>"):
            context = prompt(numbers, target)
        problems.append(Problem(context, numbers, target))
    return problems


def _integers(values: Any) -> list[int]:
    return list(map(int, values))


def _field(
    position: str, entry: dict, name: str, convert: Callable[[Any], Any], default: Any = None
) -> Any:
    try:
        return convert(entry.get(name, default))
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"{position}: {name} is {entry.get(name)!r}; an entry has numbers (a list of integers) "
            "and target (an integer)"
        ) from None


class Countdown:
    """Problems, put as raw text; `train` and `test` are JSON files, by default the package's."""

    def __init__(self, train: str | None = None, test: str | None = None):
        data = Path(__file__).parent / "data"
        self._problems = {
            "train": load_problems(Path(train or data / "countdown_train.json")),
            "test": load_problems(Path(test or data / "countdown_test.json")),
        }

    def prompts(self, split: str) -> list[str]:
        return [problem.prompt for problem in self._problems[split]]

    def score(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[float]:
        problems = self._problems[split]
        if which is not None:
            problems = [problems[number] for number in which]
        return [
            reward(response, problem.numbers, problem.target)
            for problem, response in zip(problems, responses, strict=True)
        ]

    def correct(self, split: str, responses: list[str]) -> list[bool]:
        """Whether each response's answer is right; the mean over a split is the accuracy."""
        return [
            answer_score("<think>" + response, problem.numbers, problem.target) == 1
            for problem, response in zip(self._problems[split], responses, strict=True)
        ]
