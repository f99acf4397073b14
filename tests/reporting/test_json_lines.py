"""Files of JSON lines are valid JSON, whatever is measured."""

import json
import math
from datetime import date

import pytest

from shardes.reporting import json_lines

NO_NUMBERS = [math.nan, math.inf, -math.inf]


def strictly(text: str):
    """A value of JSON in the strict sense, which has no NaN."""

    def refuse(constant: str):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_numbers_that_json_lacks_are_not_written(tmp_path, value):
    rows = [
        {"iteration": 0, "distance": value, "reward_mean": 1e100},
        {"prompt": [{"role": "user", "n": value, "on": date(2025, 1, 2)}], "list": (1.0, value)},
    ]
    expected = [
        {"iteration": 0, "reward_mean": 1e100},
        {"prompt": [{"role": "user", "n": None, "on": "2025-01-02"}], "list": [1.0, None]},
    ]
    file = tmp_path / "rows.jsonl"
    with open(file, "w", encoding="utf-8") as opened:
        json_lines.append(opened, rows)
    assert list(map(strictly, file.read_text().splitlines())) == expected
    json_lines.replace(file, rows)
    assert list(map(strictly, file.read_text().splitlines())) == expected


def test_what_an_earlier_version_wrote_becomes_valid(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"iteration": 0, "held_out_reward": NaN}\n{"iteration": 1}\n')
    json_lines.replace(file, json_lines.read(file))
    rows = list(map(strictly, file.read_text().splitlines()))
    assert rows == [{"iteration": 0}, {"iteration": 1}]
