"""The Countdown reward, compared with Python's own parser, and with hostile responses."""

import ast
import json
import operator
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardes.errors import ConfigError
from shardes.tasks.countdown import (
    MAX_DEPTH,
    Countdown,
    answer_score,
    answers,
    evaluate,
    format_score,
    load_problems,
    prompt,
    reward,
)

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
        (GOOD + "\n", 1.0),
        (GOOD + "\n\n", 0.6),
        (GOOD + " done", 0.6),
        (" </think><answer>1</answer>", 0.6),
        (" </think>\n\n<answer>1</answer>", 0.6),
        (" </think>\n<answer>1</answer>\n<answer>2</answer>", 1.0),
        (" </think>\nagain </think>\n<answer>1</answer>", 1.0),
        (" </think>\n<answer> then </answer> more </answer>", 1.0),
        (" </think>\n<answer>1</answer> more", 0.6),
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
        ("\n(1 + 5) * 4\n", 1),
        ("\t\u00a0(1+5)*4\r\n ", 1),
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
    assert answer("800/3", [800, 3], Fraction("266.6666666666667")) == 1
    assert answer("137/5", [137, 5], Fraction("27.4")) == 1
    assert answer("137/5", [137, 5], 27) == 0


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
    assert answer_score("<answer>5*4<answer>1+5*4</answer>", [1, 5, 4], 21) == 0


@given(st.lists(st.sampled_from(["</think>", "<answer>", "</answer>", "\n", "1", " "])))
def test_sections_are_those_of_the_published_patterns(parts):
    text = "<think>" + "".join(parts)
    sections = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
    if re.match("<think>.*?</think>\n<answer>.*?</answer>$", text, re.DOTALL):
        expected = 1.0
    else:
        expected = 0.1 * ("</think>" in text) + 0.5 * bool(sections)
    assert format_score(text) == expected
    assert answers(text) == sections


BOMBS = {
    "answers": "<answer>" * 125_000,
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


@pytest.mark.parametrize(
    "row, expected",
    [
        # as the paper's authors publish them
        (
            {"id": 204, "context": "Make 27.4. <think>", "numbers": [137, 5], "target": "27.4"}
            | {"solution": None},
            ("Make 27.4. <think>", [137, 5], Fraction(137, 5)),
        ),
        # as Countdown-Tasks-3to4 has them
        ({"target": 98, "nums": [44, 19, 35]}, (prompt([44, 19, 35], 98), [44, 19, 35], 98)),
        (
            {"target": 27.4, "nums": [137, 5]},
            (prompt([137, 5], "27.4"), [137, 5], Fraction("27.4")),
        ),
        ({"target": "5.0", "nums": "[2, 3]", "context": None}, (prompt([2, 3], 5), [2, 3], 5)),
        ({"target": 5.0, "nums": [2.0, "3"]}, (prompt([2, 3], 5), [2, 3], 5)),
    ],
)
def test_published_rows(tmp_path, row, expected):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for name in ("rows.json", "rows.jsonl"):
        (problem,) = load_problems(tmp_path / name)
        assert (problem.prompt, problem.numbers, problem.target) == expected


def test_a_target_that_is_no_integer_is_scored(tmp_path):
    rows = [{"numbers": [800, 3], "target": "266.6666666666667"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = Countdown(str(tmp_path / "rows.json"), str(tmp_path / "rows.json"))
    assert task.score("train", [" so </think>\n<answer>\n800 / 3\n</answer>\n"]) == [1.1]
    assert task.correct("test", ["<answer>3 / 800</answer>"]) == [False]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"nums": [1, 2]}, "target is None"),
        ({"nums": [1, 2], "target": "many"}, "target is 'many'"),
        ({"nums": [1, 2], "target": float("inf")}, "target is inf"),
        ({"nums": [1, 2], "target": True}, "target is True"),
        ({"nums": [1, 2], "target": "1/0"}, "target is '1/0'"),
        ({"nums": [1.5, 2], "target": 3}, r"nums is \[1.5, 2\]"),
        ({"nums": [-1, 2], "target": 3}, r"nums is \[-1, 2\]"),
        ({"numbers": [], "target": 3}, r"numbers is \[\]"),
        ({"numbers": "12", "target": 3}, "numbers is '12'"),
        ({"target": 3}, "nums is None; a problem has numbers or nums"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(tmp_path, row, message):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ConfigError, match=rf"rows.json: entry 0 \(id none\): {message}"):
        load_problems(tmp_path / "rows.json")
