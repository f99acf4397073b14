"""A config file for the planner."""

import pytest
import yaml


@pytest.fixture
def config(tmp_path):
    """Writes a config of the Countdown task for a model directory; returns its path."""

    def write(model, **sharding) -> str:
        file = tmp_path / "config.yaml"
        settings = {
            "model": {"path": str(model)},
            "task": {"name": "countdown"},
            "run": {"dir": str(tmp_path / "run")},
        }
        file.write_text(yaml.safe_dump(settings | {"sharding": sharding}))
        return str(file)

    return write
