"""The warning of iterations that teach nothing: its cause, and that it is given once."""

import pytest

from shardes.config.schema import Config
from shardes.reporting.learning import LearningWatch
from shardes.storage.journal import Record

WHOLE, CUT, EMPTY = (["whole"] * 2, ["unended"] * 2, ["empty"] * 2)
SAME, OTHER = ["a", "b"], ["a", "c"]


def record(rewards: list[float], iteration: int = 0, alpha: float = 0.1, **failures) -> Record:
    weights = [0.0 if max(rewards) == min(rewards) else reward for reward in rewards]
    return Record(iteration, [1, 2], rewards, weights, 0.01, alpha, "0" * 16, failures=failures)


@pytest.mark.parametrize(
    "members, rewards, failures, cause",
    [
        ([(SAME, WHOLE), (SAME, WHOLE)], [1.0, 1.0], {}, "es.sigma=0.001 may be too small"),
        ([(SAME, CUT), (SAME, CUT)], [1.0, 1.0], {}, "generation.max_new_tokens=1024 too small"),
        ([(SAME, CUT), (OTHER, CUT)], [1.0, 1.0], {}, "no answer ends within"),
        ([(["", ""], EMPTY)] * 2, [1.0, 1.0], {}, "es.sigma=0.001 may be too large"),
        ([(SAME, WHOLE), (OTHER, WHOLE)], [1.0, 1.0], {}, "the reward does not tell them apart"),
        ([(SAME, WHOLE)] * 2, [1.0, 1.0], {"scoring_failures": 4}, "4 responses could not"),
        ([(SAME, WHOLE)] * 2, [1.0, 2.0], {}, "what is learned from their rewards is chance"),
        ([], [1.0, 1.0], {}, "all 2 rewards are 1.0"),
        ([(SAME, WHOLE), (OTHER, WHOLE)], [1.0, 2.0], {}, None),
        ([(SAME, CUT), (OTHER, CUT)], [1.0, 2.0], {}, None),
        ([(SAME, WHOLE)], [1.0, 2.0], {}, None),
    ],
)
def test_the_cause_is_named(members, rewards, failures, cause):
    watch = LearningWatch(Config())
    for texts, kinds in members:
        watch.answered(texts, kinds)
    warning = watch.finish(record(rewards, **failures))
    assert cause is None if warning is None else cause in warning, warning


def test_each_cause_is_named_once():
    watch = LearningWatch(Config())
    found = []
    for iteration, texts in enumerate((SAME, SAME, OTHER, OTHER, SAME)):
        watch.answered(SAME, WHOLE)
        watch.answered(texts, WHOLE)
        found.append(watch.finish(record([1.0, 1.0], iteration)))
    assert [warning is not None for warning in found] == [True, False, True, False, False]


def test_a_run_that_does_not_learn_on_purpose_is_not_warned_of():
    assert LearningWatch(Config()).finish(record([1.0, 1.0], alpha=0.0)) is None


def test_rewards_that_cancel_out_are_not_called_equal():
    """Antithetic pairs whose members have equal rewards."""
    watch, rewards = LearningWatch(Config()), [1.0, 1.0, 2.0, 2.0]
    for texts in (SAME, SAME, OTHER, OTHER):
        watch.answered(texts, WHOLE)
    warning = watch.finish(Record(0, [1, 2], rewards, [0.0, 0.0], 0.01, 0.1, "0" * 16))
    assert warning is not None
    assert "4 rewards cancel out" in warning and "rewards are 1.0" not in warning
