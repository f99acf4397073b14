"""Base and tuned model side by side."""

import pytest

from shardes.es.statistics import interval
from shardes.reporting.evaluation import differences, figures, print_comparison


def rows(*rewards: float, correct: tuple[bool, ...] | None = None) -> list[dict]:
    """Greedy responses with these rewards."""
    return [
        dict(prompt=number, sample=0, reward=reward, tokens=4)
        | ({"correct": correct[number]} if correct else {})
        for number, reward in enumerate(rewards)
    ]


def test_the_difference_is_paired_by_prompt():
    base, tuned = rows(0.0, 10.0, 20.0), rows(1.0, 11.0, 21.5)
    found = differences(tuned, base)
    assert found["reward"] == pytest.approx(3.5 / 3)
    assert found["reward_interval"] == pytest.approx(interval([1.0, 1.0, 1.5]))
    assert figures(tuned)["reward_interval"][0] < 0 < found["reward_interval"][0]
    with_accuracy = differences(rows(0, 0, correct=(True, True)), rows(0, 0, correct=(False, True)))
    assert with_accuracy["accuracy"] == 0.5


def test_samples_of_a_prompt_are_one_value():
    base = [dict(prompt=0, reward=0.0), dict(prompt=0, reward=2.0), dict(prompt=1, reward=5.0)]
    tuned = [dict(prompt=0, reward=3.0), dict(prompt=1, reward=6.0), dict(prompt=1, reward=8.0)]
    assert differences(tuned, base)["reward_interval"] == pytest.approx(interval([2.0, 2.0]))


@pytest.mark.parametrize("count", [1, 2])
def test_figures_are_printed_side_by_side(capsys, count):
    base, tuned = (
        rows(*values[:count], correct=(right, True)[:count])
        for values, right in (((-1.0, -2.0), False), ((0.5, 1.5), True))
    )
    report = {
        "greedy": figures(tuned),
        "base": {"greedy": figures(base)},
        "difference": {"greedy": differences(tuned, base)},
    }
    print_comparison({"test": report})
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["responses", "base", "tuned", "difference"]
    reward, accuracy = lines
    if count == 1:
        assert reward.split() == ["test,", "1", "greedy", "reward", "-1", "0.5", "+1.5"]
        assert accuracy.split()[4:6] == ["0", "%"] and accuracy.rstrip().endswith("+100 %")
    else:
        assert "-1.5 [-2.48, -0.52]" in reward and "+2.5 [+0.54, +4.46]" in reward
        assert "50 % [9.453, 90.55]" in accuracy and "+50 % [" in accuracy
