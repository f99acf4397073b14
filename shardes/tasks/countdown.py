"""Countdown: make an arithmetic expression of given numbers that equals a target (section 4.1 of the paper).

The reward is 0.1 × format + answer. Expressions are parsed, never evaluated as code, in exact arithmetic.
"""

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from shardes.config import ConfigError

LONGEST = 500  # characters of an expression; beyond, and beyond DEEPEST nested signs and brackets, it scores 0
DEEPEST = 50
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
    """What a response to a problem is worth: 0.1 × format + answer, from 0 to 1.1.

    Args:
        response: what follows the prompt, which ends in "<think>".
        numbers: the numbers to be used, each exactly once.
        target: what the expression is to equal.
    """
    text = "<think>" + response
    return 0.1 * format_score(text) + answer_score(text, numbers, target)


def format_score(text: str) -> float:
    """1 for a think part, one newline, an answer part, and nothing else; else 0.1 and 0.5 for parts that occur."""
    thought = text.find("</think>")
    begin = text.find("<answer>")
    end = text.find("</answer>", begin + len("<answer>")) if begin >= 0 else -1
    tail = text[thought:] if thought >= 0 else ""
    if tail.startswith("</think>\n<answer>") and tail.find("</answer>") == len(tail) - len("</answer>"):
        return 1.0
    return 0.1 * (thought >= 0) + 0.5 * (end >= 0)


def answer_score(text: str, numbers: list[int], target: int) -> float:
    """1 where the last answer part is an expression of exactly the numbers that equals the target; else 0."""
    begin = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if begin < 0:
        return 0.0
    begin += len("<answer>")
    end = text.find("</answer>", begin)
    if end - begin > LONGEST:
        return 0.0
    try:
        value = evaluate(text[begin:end], numbers)
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(abs(value - target) < TOLERANCE)


def evaluate(expression: str, numbers: list[int]) -> Fraction:
    """The value of an expression of Python's grammar over digits, + - * / and brackets.

    Raises:
        ValueError: it is none, or does not use each of the numbers exactly once.
        ZeroDivisionError: it divides by zero.
    """
    tokens = tokenize(expression)
    used = [token for token in tokens if token.isdigit()]
    if sorted(map(int, used)) != sorted(numbers) or any(len(n) > 1 and n[0] == "0" and int(n) for n in used):
        raise ValueError("other numbers")
    value, at = _sum(tokens, 0, 1, 0)
    if at != len(tokens):
        raise ValueError(f"unexpected {tokens[at]}")
    return value


def tokenize(expression: str) -> list[str]:
    """Numbers, operators and brackets, spaces left out."""
    tokens, at = [], 0
    expression = expression.rstrip(" ")
    while at < len(expression):
        match = TOKENS.match(expression, at)
        if match is None:
            raise ValueError(f"unexpected {expression[at]!r}")
        tokens.append(match[1])
        at = match.end()
    return tokens


def _sum(tokens: list[str], at: int, weakest: int, depth: int) -> tuple[Fraction, int]:
    """The value of operands joined by operators of at least that strength, from `at` on, and where it ends."""
    value, at = _operand(tokens, at, depth)
    while at < len(tokens) and tokens[at] in OPERATORS and OPERATORS[tokens[at]][0] >= weakest:
        strength, apply = OPERATORS[tokens[at]]
        right, at = _sum(tokens, at + 1, strength + 1, depth)
        value = apply(value, right)
    return value, at


def _operand(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if at == len(tokens) or depth > DEEPEST:
        raise ValueError("ends early, or is nested too deep")
    token = tokens[at]
    if token.isdigit():
        return Fraction(int(token)), at + 1
    if token in "+-":
        value, at = _operand(tokens, at + 1, depth + 1)
        return (-value if token == "-" else value), at
    if token != "(":
        raise ValueError(f"unexpected {token}")
    value, at = _sum(tokens, at + 1, 1, depth + 1)
    if at == len(tokens) or tokens[at] != ")":
        raise ValueError("a bracket is not closed")
    return value, at + 1


@dataclass
class Problem:
    """Numbers to be used, each once, and what their expression is to equal; `prompt` ends in "<think>"."""

    prompt: str
    numbers: list[int]
    target: int


def prompt(numbers: list[int], target: int) -> str:
    """A problem, put to a model that continues text."""
    return (
        "A user asks a question and an assistant answers it, after thinking it through.\n"
        f"User: Using the numbers {numbers}, make an expression that equals {target}. Use each number exactly once, "
        "with +, -, *, / and brackets. Think between <think> and </think>; then give the expression alone between "
        "<answer> and </answer>, as in <answer>(1 + 2) / 3</answer>.\n"
        "Assistant: <think>"
    )


def load_problems(path: Path) -> list[Problem]:
    """The problems of a JSON file: a list of {id, context, numbers, target, solution}, as published.

    `context` is the prompt. Where a file lacks it, or it does not end in "<think>", it is this module's.

    Raises:
        ConfigError: the file is missing or not of this form; names the entry, its id and the field.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no readable JSON file of Countdown problems: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: must hold a list of problems")
    problems = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: entry {number} is no object with numbers and target")

        def field(name: str, read: Callable, default=None, entry=entry, number=number):
            try:
                return read(entry.get(name, default))
            except (TypeError, ValueError, AttributeError):
                which = f"entry {number} (id {entry.get('id', 'none')})"
                raise ConfigError(
                    f"{path}: {which}: {name} is {entry.get(name)!r}; an entry has numbers (a list of integers) and "
                    "target (an integer)"
                ) from None

        numbers, target = field("numbers", lambda found: list(map(int, found))), field("target", int)
        context = field("context", str.rstrip, "")
        given = context if context.endswith("<think>") else prompt(numbers, target)
        problems.append(Problem(given, numbers, target))
    return problems


class Countdown:
    """The task: raw prompts, and `reward`. `train` and `test` are files of problems; by default the shipped ones."""

    def __init__(self, train: str | None = None, test: str | None = None):
        shipped = Path(__file__).parent / "data"
        self._problems = {
            "train": load_problems(Path(train or shipped / "countdown_train.json")),
            "test": load_problems(Path(test or shipped / "countdown_test.json")),
        }

    def prompts(self, split: str) -> list[str]:
        return [problem.prompt for problem in self._problems[split]]

    def score(self, split: str, responses: list[str], which: Sequence[int] | None = None) -> list[float]:
        problems = self._problems[split]
        asked = problems if which is None else [problems[number] for number in which]
        pairs = zip(asked, responses, strict=True)
        return [reward(response, problem.numbers, problem.target) for problem, response in pairs]

    def correct(self, split: str, responses: list[str]) -> list[bool]:
        """Whether each response's answer is right; over a split that is the accuracy."""
        pairs = zip(self._problems[split], responses, strict=True)
        return [answer_score("<think>" + response, p.numbers, p.target) == 1 for p, response in pairs]
