"""The task extraction: its data, and the reward, part by part."""

import json

import pytest

from launch import ROOT, call, script
from shardes.errors import ConfigError
from shardes.tasks import load_task
from shardes.tasks.extraction import Extraction, instruction, score

FACTS = {"name": "Ava Reyes", "age": 31, "job": "nurse", "city": "Lisbon"}
RIGHT = json.dumps(FACTS)
DATA = ROOT / "shardes" / "tasks" / "data"


@pytest.mark.parametrize(
    "response, reward",
    [
        (RIGHT, 1.0),
        (f"\n{json.dumps(FACTS, indent=2)} ", 1.0),
        (f"```json\n{RIGHT}\n```", 0.8),
        (f"{RIGHT}\n{RIGHT}", 0.8),
        (RIGHT.replace("31", '"31"'), 0.85),
        (RIGHT.replace("31", "31.0"), 0.85),
        (RIGHT.replace("nurse", "Nurse"), 0.85),
        ('{"name": "Ava Reyes", "age": 31}', 0.6 * 2 / 4 + 0.2 * 2 / 4 + 0.2),
        (RIGHT.replace("{", '{"pet": null, '), 0.6 + 0.2 * 4 / 5 + 0.2),
        ("{}", 0.2),
        (RIGHT[:-1], 0.0),
        (RIGHT.replace("31", "031"), 0.0),
        (f"[{RIGHT}]", 0.8),
        ("Ava Reyes is a nurse.", 0.0),
        ("31", 0.0),
        ("", 0.0),
        ('{"a": ' * 100_000, 0.0),
    ],
)
def test_the_parts_of_the_reward(response, reward):
    assert score(response, {"facts": FACTS}) == pytest.approx(reward)
    assert 0 <= score(response, {"facts": FACTS}) <= 1


def test_true_is_not_one():
    assert score('{"seats": true}', {"facts": {"seats": 1}}) == pytest.approx(0.4)


def test_only_the_whole_truth_is_correct():
    task = Extraction()
    right = [json.dumps(example["facts"]) for example in map(json.loads, lines("test"))]
    assert task.score("test", right) == [1.0] * 100 and all(task.correct("test", right))
    wrong = [text + "." for text in right]
    assert not any(task.correct("test", wrong))
    assert task.correct("test", [right[7], right[7]], which=[7, 8]) == [True, False]
    assert task.score("test", [right[7]], which=[7]) == [1.0]
    with pytest.raises(ValueError):
        task.score("test", right[:3])


def test_the_prompt_names_the_keys():
    prompt = Extraction().prompts("test")[0]
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert prompt[0]["content"] == "Write name, age, job and city as JSON."
    assert prompt[1]["content"] == json.loads(lines("test")[0])["text"]
    assert instruction(["price"]) == "Write price as JSON."


def lines(split: str) -> list[str]:
    return (DATA / f"extraction_{split}.jsonl").read_text(encoding="utf-8").splitlines()


def test_the_shipped_data_are_what_the_tool_makes(tmp_path):
    done = call(script("tools/make_extraction.py").main, tmp_path)
    assert done.returncode == 0
    for split in ("train", "test"):
        file = f"extraction_{split}.jsonl"
        assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes()


def test_the_facts_are_in_the_sentences_and_the_splits_apart():
    rows = {split: [json.loads(line) for line in lines(split)] for split in ("train", "test")}
    assert {split: len(each) for split, each in rows.items()} == {"train": 200, "test": 100}
    for row in rows["train"] + rows["test"]:
        assert all(str(value) in row["text"] for value in row["facts"].values())
    for key in ("name", "job", "city"):
        train, test = ({row["facts"][key] for row in rows[split]} for split in rows)
        assert not train & test
    assert len({row["facts"]["name"] for row in rows["train"]}) == 200


def test_data_of_ones_own(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "Two pears for 3 euros.", "facts": {"item": "pear", "price": 3}}\n')
    task = load_task("extraction", None, str(file), str(file))
    assert task.prompts("train")[0][0]["content"] == "Write item and price as JSON."
    assert task.score("train", ['{"item": "pear", "price": 3}']) == [1.0]


@pytest.mark.parametrize("row", ['{"text": "A."}', '{"text": "A.", "facts": {}}', '{"facts": {}}'])
def test_a_wrong_row_is_named(tmp_path, row):
    file = tmp_path / "own.jsonl"
    file.write_text(row + "\n")
    with pytest.raises(ConfigError, match=r"own\.jsonl: line 1.*: a row has text"):
        Extraction(str(file))


def test_the_reward_serves_a_json_lines_task(tmp_path):
    task = load_task(
        "jsonl",
        None,
        str(DATA / "extraction_train.jsonl"),
        str(DATA / "extraction_test.jsonl"),
        template="{text} Write name, age, job and city as JSON.",
        reward="shardes.tasks.extraction:score",
    )
    assert "as JSON" in task.prompts("train")[0][0]["content"]
