"""Watches whether anything can be learned from an iteration, and says what to change if not."""

from collections import Counter
from collections.abc import Sequence

from shardes.config.schema import Config
from shardes.storage.journal import Record

PROBE = "shardes probe shows which es.sigma tells members apart"


class LearningWatch:
    """Warns, once for each cause, of an iteration that teaches nothing.

    It sees all rewards, and the answers of the members that replica 0 evaluates.
    """

    def __init__(self, config: Config):
        self._config = config
        self._answers: set[int] = set()  # hashes, one for each member's
        self._members = 0
        self._kinds: Counter[str] = Counter()
        self._warned: set[str] = set()

    def answered(self, texts: Sequence[str], kinds: Sequence[str]) -> None:
        """Take in a member's answers; for `kinds` see `Sampler.answer_kinds`."""
        self._answers.add(hash(tuple(texts)))
        self._members += 1
        self._kinds.update(kinds)

    def finish(self, record: Record) -> str | None:
        """The warning at an iteration's end; None if it has taught something, or its cause is
        known.
        """
        same = self._members > 1 and len(self._answers) == 1
        kinds, self._kinds, self._members = self._kinds, Counter(), 0
        self._answers.clear()
        alike = not any(record.coefficients)
        if record.alpha == 0 or not (alike or same):
            return None
        advice = self._advice(record, alike, same, kinds)
        if advice in self._warned:
            return None
        self._warned.add(advice)
        what = "all members gave the same answers, so what is learned from their rewards is chance"
        if alike:
            what = f"{_alike(record.rewards)}, so nothing is learned"
        return f"warning: iteration {record.iteration}: {what}; {advice} (said once)"

    def _advice(self, record: Record, alike: bool, same: bool, kinds: Counter[str]) -> str:
        sigma, longest = self._config.es.sigma, self._config.generation.max_new_tokens
        if alike and (failed := record.failures.get("scoring_failures")):
            return f"{failed} responses could not be scored and got task.on_error"
        if kinds and set(kinds) == {"empty"}:
            return (
                f"all answers are empty: es.sigma={sigma:g} may be too large for this model, or "
                f"its prompts are not of the form that it answers; {PROBE}"
            )
        if same:
            short = f", or generation.max_new_tokens={longest} too small to show a difference"
            return (
                f"the answers do not differ: es.sigma={sigma:g} may be too small for this model"
                f"{'' if kinds['whole'] else short}; {PROBE}"
            )
        if kinds and not kinds["whole"]:
            return (
                f"no answer ends within generation.max_new_tokens={longest}: that is too small, or "
                f"es.sigma={sigma:g} too large for this model; {PROBE}"
            )
        return "the answers differ, but the reward does not tell them apart: make it finer"


def _alike(rewards: Sequence[float]) -> str:
    """How rewards have a fitness from which no update follows."""
    if max(rewards) == min(rewards):
        return f"all {len(rewards)} rewards are {rewards[0]}"
    return f"{len(rewards)} rewards cancel out, as those of pairs do where both members' are equal"
