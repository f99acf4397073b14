"""Tasks from JSON lines: prompts, templates, reward functions, and error messages."""

import json
import sys

import pytest

from shardes.errors import ConfigError
from shardes.tasks import load_task
from shardes.tasks.jsonl import Template
from shardes.tasks.user_code import load_reward_function

ROWS = [
    {"id": "a", "prompt": "Where is Rome?", "answer": "Italy", "n": 3},
    {"id": "b", "prompt": "Was ist 1 + 1?", "answer": "2", "n": [1, 2]},
]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a task from rows, or from a file's text; my_reward.py is in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("HALF = 0.5\n")
    (tmp_path / "my_reward.py").write_text(
        "import helper\n\ndef judge(response, example):\n    return helper.HALF\n"
    )

    def load(rows=ROWS, **keys):
        text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)) + "\n\n"
        (tmp_path / "data.jsonl").write_text(text)
        keys = {"train": "data.jsonl", "test": "data.jsonl", "reward": "my_reward:judge"} | keys
        return load_task("jsonl", None, **keys)

    yield load
    for name in ("helper", "my_reward"):
        sys.modules.pop(name, None)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = [SYSTEM, *user("Hello")]


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, [user("Where is Rome?"), user("Was ist 1 + 1?")]),
        ({"chat": False}, ["Where is Rome?", "Was ist 1 + 1?"]),
        (
            {"chat": False, "template": "Q: {prompt}\nA:"},
            ["Q: Where is Rome?\nA:", "Q: Was ist 1 + 1?\nA:"],
        ),
        (
            {"system": "Be brief."},
            [[SYSTEM, *user("Where is Rome?")], [SYSTEM, *user("Was ist 1 + 1?")]],
        ),
        (
            {"system": "Be brief.", "template": "{n}"},
            [[SYSTEM, *user("3")], [SYSTEM, *user("[1, 2]")]],
        ),
        ({"prompt_field": "answer"}, [user("Italy"), user("2")]),
        ({"prompt_field": "answer", "chat": False}, ["Italy", "2"]),
        ({"template": "{n} {{{answer}}} {n}"}, [user("3 {Italy} 3"), user("[1, 2] {2} [1, 2]")]),
    ],
)
def test_prompts_contain_the_fields(load, keys, expected):
    task = load(**keys)
    assert task.prompts("train") == task.prompts("test") == expected
    assert task.example("train", 1) == ROWS[1]
    with pytest.raises(KeyError):
        task.prompts("other")


def test_messages_are_used_unchanged(load):
    assert load([{"prompt": MESSAGES}]).prompts("test") == [MESSAGES]
    rows = [{"prompt": 3, "a {b}": MESSAGES}, {"a {b}": "Hi"}]
    assert load(rows, prompt_field="a {b}").prompts("test") == [MESSAGES, user("Hi")]


def test_a_system_message_goes_before_messages(load):
    rows = [{"chat": user("Hello")}, {"chat": [*user("a"), *user("b")]}]
    expected = [[SYSTEM, *row["chat"]] for row in rows]
    assert load(rows, prompt_field="chat", system="Be brief.").prompts("train") == expected


def test_a_beginning_of_the_response_is_marked(load):
    messages = [*MESSAGES, {"role": "assistant", "content": "It", "prefix": True}]
    assert load([{"prompt": messages}]).prompts("test") == [messages]


def test_further_named_test_sets(load, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"prompt": "one\u2028line"}')
    assert load(tests={"more": "more.jsonl"}).prompts("more") == [user("one\u2028line")]
    with pytest.raises(ConfigError, match=r"task.tests: train is the set of task.train; choose"):
        load_task("jsonl", None, "a.jsonl", "b.jsonl", {"train": "more.jsonl"})


def test_a_template_only_looks_up_fields():
    example = {"a": "text", "a.__class__": "looked up by name", "b[0]": "and so is this"}
    assert Template("{a.__class__}, {b[0]}").fill(example) == "looked up by name, and so is this"
    with pytest.raises(KeyError):
        Template("{a.upper}").fill(example)
    # A value is not filled in turn.
    assert Template("{a}").fill({"a": "{b} {{ {0.__class__}"}) == "{b} {{ {0.__class__}"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{", "write {{ or }} for a brace in the text"),
        ("}", "write {{ or }} for a brace in the text"),
        ("{}", "a field's name and nothing else"),
        ("{prompt!r}", "a field's name and nothing else"),
        ("{prompt:>9}", "a field's name and nothing else"),
        ("{prompt.upper}", r"data.jsonl: line 1 \(id a\) has no prompt.upper"),
        ("{missing}", r"data.jsonl: line 1 \(id a\) has no missing"),
    ],
)
def test_templates_that_cannot_be_filled(load, template, message):
    with pytest.raises(ConfigError, match=message):
        load(template=template)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("", "data.jsonl: holds no rows"),
        ("[1]", "data.jsonl: line 1 is not an object"),
        ('{"prompt": "x"}\n\n{"prompt"', "data.jsonl: line 3 is not JSON"),
        ([ROWS[0], {"id": 7, "prompts": "x"}], r"data.jsonl: line 2 \(id 7\) has no prompt"),
        ([{"prompt": None}], r"data.jsonl: line 1 \(id none\) has no prompt"),
        ([{"prompt": []}], r"line 1 \(id none\): prompt is \[\]; it must be a text, or messages"),
        (
            [{"prompt": [*user("Hi"), {"role": "assistant", "content": "Ho"}]}],
            r"line 1 .*: prompt ends with a message of role assistant, as if it still held the "
            r'answer; leave that message out or, .*"prefix": true',
        ),
        (
            [{"messages": [*user("Hi"), {"role": "assistant", "content": "Ho"}]}],
            r"line 1 .* has no prompt but messages: set task.prompt_field=messages, and leave out "
            "the last one, of role assistant, which is the answer",
        ),
        ([{"messages": user("Hi")}], "has no prompt but messages: set task.prompt_field=messages$"),
        ([{"prompt": 5}], r"line 1 \(id none\): prompt is 5; it must be a text, or messages"),
        (
            [{"prompt": [{"role": "user"}]}],
            r"line 1 .*: prompt is \[.*it must be a text, or messages",
        ),
    ],
)
def test_malformed_lines_are_named(load, rows, message):
    with pytest.raises(ConfigError, match=message):
        load(rows)


@pytest.mark.parametrize(
    "rows, keys, message",
    [
        (MESSAGES, {"chat": False}, "line 1 .*: prompt is a list of messages; leave out task.chat"),
        (
            MESSAGES,
            {"template": "Say: {prompt}"},
            "line 1 .*: prompt is a list of messages; set task.prompt_field=prompt in place of",
        ),
        (MESSAGES, {"system": "x"}, "line 1 .*: prompt has a system message of its own; leave out"),
        (3, {"prompt_field": "id"}, "line 1 .*: id is 7; it must be a text, or messages with role"),
        ("x", {"prompt_field": "query"}, "line 1 .* has no query; its fields: id, prompt$"),
        ("x", {"prompt_field": "a", "template": "b"}, "task.prompt_field=a: leave it out or leave"),
        ("x", {"system": "a", "chat": False}, "task.system: is a message of a chat; with task.cha"),
    ],
)
def test_prompts_of_another_form_are_refused(load, rows, keys, message):
    with pytest.raises(ConfigError, match=message):
        load([{"id": 7, "prompt": rows}], **keys)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"train": None}, "task.train: is required with task.name=jsonl"),
        (
            {"test": None},
            r"task.test: is required .* move some lines of task.train into a file of their own",
        ),
        ({"train": "nowhere.jsonl"}, "nowhere.jsonl: there is no such data file"),
        (
            {"reward": None},
            "task.reward: is required with task.name=jsonl: "
            "my_module:function or my_reward.py:function",
        ),
    ],
)
def test_missing_settings(load, keys, message):
    with pytest.raises(ConfigError, match=message):
        load(**keys)


@pytest.mark.parametrize(
    "key, value",
    [("template", "{x}"), ("chat", False), ("system", "x"), ("reward", "a:b"), ("train", "x")],
)
def test_settings_of_other_tasks_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"task\.{key}={value}: only for task\.name=.*jsonl"):
        load_task("conciseness", None, **{key: value})


@pytest.mark.parametrize(
    "reference",
    ["my_reward:judge", "my_reward.py:judge", "./my_reward.py:judge", "{cwd}/my_reward.py:judge"],
)
def test_references_to_reward_functions(load, tmp_path, reference):
    path_before = list(sys.path)
    load(reward=(reference := reference.format(cwd=tmp_path)))
    assert load_reward_function(reference)("response", {}) == 0.5
    assert sys.path == path_before


def test_a_reward_function_in_a_package_or_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_rewards").mkdir()
    (tmp_path / "some_rewards" / "lengths.py").write_text(
        "def short(response, example): return -len(response)\n"
    )
    assert load_reward_function("some_rewards.lengths:short")("four", {}) == -4
    assert load_reward_function("operator:eq")("a", {}) is False


OTHER_REWARDS = """
def one(a): pass
def three(a, b, c): pass
def trl(prompts, completions, **kwargs): pass
def columns(completions, answer, **kwargs): pass
def keywords(*, completions, **kwargs): pass
def verl(data_source, solution_str, truth, extra=None): pass
"""


@pytest.mark.parametrize(
    "reference, message",
    [
        ("my_reward", "must be written my_module:function or my_reward.py:function"),
        (":judge", "must be written"),
        ("my_reward.py:", "must be written"),
        ("nowhere.py:judge", "there is no file .*nowhere.py"),
        ("no_such_module:judge", "there is no module no_such_module, neither in .* nor installed"),
        ("no_such.module:judge", "there is no module no_such.module, neither in .* nor installed"),
        ("my_reward:nothing", "no function nothing there; it has judge"),
        ("my_reward:helper", "no function helper there; it has judge"),
        (
            "other:one",
            r"task.reward=other:one must take \(response, example\): too many positional arguments",
        ),
        (
            "other:trl",
            r"task.reward=other:trl takes \(prompts, completions, \*\*kwargs\), as another "
            r"trainer's rewards do; it is called with \(response, example\), so write def trl\(",
        ),
        ("other:columns", r"other:columns takes \(completions, answer, \*\*kwargs\), as another"),
        ("other:keywords", r"takes \(\*, completions, \*\*kwargs\), as another"),
        ("other:verl", r"takes \(data_source, solution_str, truth, extra=None\), as another"),
        ("other:three", r"must take \(response, example\): missing a required argument: 'c'"),
        (
            "fails:judge",
            "importing fails raised ModuleNotFoundError: No module named 'a_missing_package'",
        ),
        ("fails.py:judge", "importing .*fails.py raised ModuleNotFoundError"),
        ("exits:judge", "importing exits raised SystemExit: bye"),
    ],
)
def test_reward_functions_that_cannot_be_used(load, tmp_path, reference, message):
    (tmp_path / "other.py").write_text(OTHER_REWARDS)
    (tmp_path / "fails.py").write_text("import a_missing_package\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit('bye')\n")
    with pytest.raises(ConfigError, match=message):
        load(reward=reference)
