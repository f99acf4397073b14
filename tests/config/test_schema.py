"""Each setting is declared once, with its help, and says whether it decides the center."""

import pytest

from shardes.config.loading import center_settings, replica_settings
from shardes.config.schema import (
    CENTER_SETTINGS,
    SETTINGS,
    Config,
    Schedule,
    help_text,
)

DECIDE_THE_CENTER = [
    "model.dtype",
    "es.population_size",
    "es.sigma",
    "es.alpha",
    "es.seed",
    "es.restore",
    "es.noise",
    "es.rank",
    "es.antithetic",
    "es.fitness",
    "es.standardize_prompts",
    "es.sigma_final",
    "es.alpha_final",
    "es.schedule",
    "es.weight_decay",
    "es.decay_to",
    "es.evolve",
    "es.update",
    "generation.max_new_tokens",
    "generation.stop",
    "generation.logits_processors",
    "task.name",
    "task.path",
    "task.train",
    "task.template",
    "task.prompt_field",
    "task.chat",
    "task.system",
    "task.reward",
    "task.on_error",
    "task.prompts_per_iteration",
]


def test_help_lists_every_key_with_its_meaning():
    text = help_text()
    for key, setting in SETTINGS.items():
        assert key in text and setting.help in text


@pytest.mark.parametrize(
    "key", [key for key in SETTINGS if key.startswith(("es.", "generation.", "task."))]
)
def test_settings_say_whether_they_decide_the_center(key):
    assert SETTINGS[key].decides_center is not None, (
        f"{key}: pass decides_center in shardes/config/schema.py; a run that resumes with "
        "another value is refused if it is true"
    )


def test_settings_that_decide_the_center():
    # Journals hold these keys in this order.
    assert CENTER_SETTINGS == DECIDE_THE_CENTER
    config = Config()
    assert list(center_settings(config)) == DECIDE_THE_CENTER
    assert center_settings(config)["model.dtype"] == "bfloat16"
    assert center_settings(config)["generation.stop"] == []


@pytest.mark.parametrize("name", ["sigma_final", "alpha_final"])
def test_iterations_decide_the_center_of_a_run_with_a_schedule(name):
    config = Config()
    config.es.schedule = Schedule.cosine
    assert "es.iterations" not in center_settings(config)
    setattr(config.es, name, 0.0001)
    assert list(center_settings(config)) == [*DECIDE_THE_CENTER, "es.iterations"]


def test_settings_that_all_replicas_share():
    expected = {*DECIDE_THE_CENTER, "es.iterations", "eval.every", "eval.prompts", "task.test"}
    assert set(replica_settings(Config())) == expected
