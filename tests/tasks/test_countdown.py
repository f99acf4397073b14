"""The Countdown reward, compared with Python's own parser, and with hostile responses."""

import ast
import operator
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardes.tasks.countdown import MAX_DEPTH, answer_score, evaluate, format_score, reward

GOOD = "so 6 * 4 = 24 </think>\n<answer>(1 + 5) * 4</answer>"


def answer(expression: str, numbers=(1, 5, 4), target=24) -> float:
    return answer_score(f"<think></think>\n<answer>{expression}</answer>", list(numbers), target)


def test_a_right_answer_in_the_right_form():
    assert reward(GOOD, [4, 1, 5], 24) == 1.1
    assert reward(GOOD, [4, 1, 5], 23) == 0.1
    assert reward("no idea", [4, 1, 5], 24) == 0


@pytest.mark.parametrize(
    "response, score",
    [
        (GOOD, 1.0),
        ("</think>\n<answer></answer>", 1.0),
        ("two\nlines\n</think>\n<answer>\n1\n</answer>", 1.0),
        (GOOD + "\n", 0.6),
        (GOOD + " done", 0.6),
        (" </think><answer>1</answer>", 0.6),
        (" </think>\n\n<answer>1</answer>", 0.6),
        (" </think>\n<answer>1</answer>\n<answer>2</answer>", 0.6),
        (" </think>\nagain </think>\n<answer>1</answer>", 0.6),
        ("</think>", 0.1),
        ("<answer>1</answer>", 0.5),
        ("<answer>1", 0.0),
        ("</answer><answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, score):
    assert format_score("<think>" + response) == pytest.approx(score)


@pytest.mark.parametrize(
    "expression, score",
    [
        ("(1+5)*4", 1),
        ("4 * (5 + 1)", 1),
        ("-(-(1+5))*4", 1),
        ("4--5*+4", 0),
        ("+1*0+24", 0),
        ("4*5+4*1", 0),
        ("(1+5)*4 = 24", 0),
        ("(1+5)4", 0),
        ("4(1+5)", 0),
        ("((1+5)*4", 0),
        ("(1+5)*4)", 0),
        ("()1+5*4", 0),
        ("(1+5)*4.0", 0),
        ("(1+5)*4,", 0),
        ("(1+5)*04", 0),
        ("(1_+5)*4", 0),
        ("(１+5)*4", 0),  # a digit, but not an ASCII one
        ("(1+5)*٤", 0),
        ("(1 + 5)\u00a0* 4", 0),
        ("(1+5)\n*4", 0),
        ("", 0),
        (" ", 0),
    ],
)
def test_answers(expression, score):
    assert answer(expression) == score


@pytest.mark.parametrize(
    "expression, numbers, target",
    [
        ("9**9**9", [9, 9, 9], 9),
        ("7//2", [7, 2], 3),
        ("7/ /2", [7, 2], 3),
        ("5/(3-3)", [5, 3, 3], 0),
        ("1/0", [1, 0], 0),
    ],
)
def test_expressions_that_score_zero(expression, numbers, target):
    assert answer(expression, numbers, target) == 0


def test_the_tolerance():
    assert answer("1/3*3", [1, 3, 3], 1) == 1
    assert answer("1000000/1000001", [1000000, 1000001], 1) == 1
    assert answer("10000/10001", [10000, 10001], 1) == 0


def test_the_last_answer_counts():
    assert (
        answer_score("<think><answer>1+5</answer></think>\n<answer>5+1*4</answer>", [1, 5, 4], 9)
        == 1
    )
    assert (
        answer_score("<think></think>\n<answer>5+1*4</answer><answer>7</answer>", [1, 5, 4], 9) == 0
    )
    assert answer_score("<think></think>\n<answer>5+1*4</answer><answer>", [1, 5, 4], 9) == 1
    assert answer_score("<think></answer>", [1], 1) == 0


BOMBS = {
    "power": "9**9**9",
    "a megabyte of brackets": "(" * 500_000 + "1" + ")" * 500_000,
    "a megabyte of signs": "-" * 1_000_000 + "1",
    "nested": "(" * 200 + "1" + ")" * 200,
    "signs": "-" * 400 + "1",
    "long number": "9" * 499,
    "spaces": " " * 499 + "1",
    "operators": "1" + "+1" * 249,
    "unicode": "١" * 400,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_score_zero_quickly(bomb):
    text = f"<think></think>\n<answer>{BOMBS[bomb]}</answer>"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert answer_score(text, [1, 9], 24) == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.001


def reference(expression: str) -> Fraction:
    """The value by Python's own parser, in fractions."""
    operators = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
    }
    signs = {ast.UAdd: operator.pos, ast.USub: operator.neg}

    def value(node) -> Fraction:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int() as number):
                return Fraction(number)
            case ast.BinOp(left=left, op=op, right=right):
                return operators[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return signs[type(op)](value(operand))
        raise ValueError(node)

    return value(ast.parse(expression.strip(" "), mode="eval"))


def check_agreement(expression: str) -> None:
    numbers = [
        int(part) for part in "".join(c if c in "0123456789" else " " for c in expression).split()
    ]
    try:
        expected = reference(expression)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        expected = None
    try:
        value = evaluate(expression, numbers)
    except (ValueError, ZeroDivisionError):
        value = None  # in an expression with several errors, either error may come first
    assert value == expected


@given(st.text("0123456789+-*/() ", max_size=16))
def test_any_text_has_the_value_that_python_gives_it(expression):
    check_agreement(expression)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", " * ", "/", " - "]), inner).map("".join),
        inner.map("({})".format),
        st.tuples(st.sampled_from("+-"), inner).map("".join),
    ),
    max_leaves=8,
)


@given(expressions)
def test_expressions_have_the_value_that_python_gives_them(expression):
    check_agreement(expression)


@given(
    st.text("<>/thinkaswer0+(\n", max_size=60),
    st.lists(st.integers(0, 9), max_size=3),
    st.integers(-5, 5),
)
def test_any_response_has_a_reward(response, numbers, target):
    assert 0 <= reward(response, numbers, target) <= 1.1


def test_depth_below_the_limit():
    expression = "(" * (MAX_DEPTH - 5) + "1" + ")" * (MAX_DEPTH - 5)
    assert evaluate(expression, [1]) == 1
