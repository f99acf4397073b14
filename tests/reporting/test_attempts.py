"""Each start has a directory of its own, whatever else is there."""

from shardes.config.schema import Config
from shardes.reporting.attempts import Attempt, attempts


def test_other_directories_are_no_attempts(tmp_path):
    for name in ("attempt_1", "attempt_1.bak", "attempt_", "attempt_10", "attempt_x"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    assert [path.name for path in attempts(tmp_path)] == ["attempt_1", "attempt_10"]
    config = Config()
    config.run.dir, config.model.path = str(tmp_path), "m"
    assert Attempt(tmp_path, config, {}).directory.name == "attempt_11"
