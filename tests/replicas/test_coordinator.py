"""What the primary rank makes of the members' results."""

import json

import pytest

from shardes.errors import ConfigError
from shardes.replicas.coordinator import mean_parts
from shardes.replicas.protocol import MemberResult


def test_parts_of_rewards_are_averaged_over_the_members_that_have_them():
    assert mean_parts([{"a": 1.0, "b": 3.0}, {}, {"b": 4.0, "a": 2.0}]) == {"a": 1.5, "b": 3.5}
    assert mean_parts([{}, {}]) == {}
    with pytest.raises(ConfigError, match="task: only some members' rewards have a number b"):
        mean_parts([{"a": 1.0}, {"a": 1.0, "b": 2.0}])


@pytest.mark.parametrize(
    "fields, length",
    [((), 4), (([0.5],), 5), (([], {"scoring_failures": 1}), 6), (([], {}, {"a": 0.5}), 7)],
)
def test_a_result_crosses_as_it_is_and_no_longer_than_it_must(fields, length):
    result = MemberResult(0.5, 3, 1, 12.0, *fields)
    assert MemberResult.from_json(result.to_json()) == result
    assert result.to_json().startswith("[0.5,3,1,12.0")
    assert len(json.loads(result.to_json())) == length
