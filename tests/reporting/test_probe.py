"""What a probe's report says of results that are given: suggestion, reasons, notes, page."""

import json
from dataclasses import replace

import pytest

from launch import call
from shardes.commands import report as report_command
from shardes.config.schema import Config, ModelConfig, RunConfig
from shardes.es.probing import Answered, CenterAnswers, Plan, default_sigmas
from shardes.reporting.json_lines import to_json
from shardes.reporting.probe import cells, conclusion, notes, print_report, probe_report

SIGMAS = (0.001, 0.01)
CONFIG = Config(model=ModelConfig("models/<small>"), run=RunConfig("run"))
CONFIG.task.name = "conciseness"
PLAN = Plan.derive(CONFIG, SIGMAS, 8, "0" * 16, [[1], [2]])
CENTER = CenterAnswers(Answered([1.0, 1.0], 0, 0, 0, 0, 8), 0.0)
RMS = {"layers.0.up.weight": 0.1, "layers.1.up.weight": 0.2, "bias": 0.0}


def answered(reward: float, **counts: int) -> Answered:
    values = dict(changed=1, empty=0, unended=0, failed=0, tokens=8) | counts
    return Answered([reward, reward + 1], **values)


def results(reward, **counts: int) -> dict[int, Answered]:
    """Of each member, by its σ with sign and the number of its pair."""
    members = enumerate(PLAN.iteration.members)
    return {n: answered(reward(m.sigma, n // 4), **counts) for n, m in members}


def slope(sigma: float, pair: int) -> float:
    """A reward that is linear in σ up to 0.01."""
    return 100 * sigma * (pair - 3.5) - (0.5 if abs(sigma) > 0.005 else 0)


def test_a_linear_reward_gets_a_suggestion_with_steps_in_units_of_weights():
    report = probe_report(CONFIG, PLAN, CENTER, results(slope), RMS)
    found = report["suggestion"]
    assert found["sigma"] in SIGMAS and found["certain"]
    assert found["population_size"] == 30  # the config's is enough
    assert found["parameters"].keys() == {"layers.0.up.weight", "layers.1.up.weight"}
    assert found["parameters"]["layers.0.up.weight"]["step"] == pytest.approx(found["step"] / 0.1)
    assert f"es.alpha={found['alpha']:g}" in found["overrides"]
    assert [row["correlation"] < -0.9 for row in report["sigmas"]] == [True, True]
    assert [row["changed"] for row in report["sigmas"]] == [0.5, 0.5]
    assert not notes(report)


def test_a_schedule_keeps_its_ratios():
    es = replace(CONFIG.es, sigma_final=CONFIG.es.sigma / 10, alpha_final=0.0)
    report = probe_report(replace(CONFIG, es=es), PLAN, CENTER, results(slope), RMS)
    found = report["suggestion"]
    values = dict(pair.split("=") for pair in found["overrides"].split())
    assert float(values["es.sigma_final"]) == pytest.approx(found["sigma"] / 10, rel=0.01)
    assert float(values["es.alpha_final"]) == 0


@pytest.mark.parametrize(
    "reward, counts, reason",
    [
        (lambda sigma, pair: 1.0, dict(changed=0), "no answer changed: σ is too small up to 0.01"),
        (lambda sigma, pair: 1.0, dict(), "the reward needs to be finer"),
        (lambda sigma, pair: 1.0, dict(empty=2), "nearly all answers are broken at every σ"),
        (lambda sigma, pair: float(pair), dict(), "no σ has a gain above its standard error"),
    ],
)
def test_without_a_suggestion_the_reason_is_given(reward, counts, reason):
    report = probe_report(CONFIG, PLAN, CENTER, results(reward, **counts), RMS)
    assert report["suggestion"] is None
    (line,) = conclusion(report)
    assert reason in line


def test_answers_that_are_cut_off_without_noise_too_do_not_hide_the_reason():
    center = replace(CENTER, answered=replace(CENTER.answered, unended=2))
    found = results(lambda sigma, pair: 1.0, unended=2)
    (line,) = conclusion(probe_report(CONFIG, PLAN, center, found, RMS))
    assert "the reward needs to be finer" in line


def test_a_sigma_with_which_training_would_end_is_not_suggested():
    found = results(slope)
    ended = next(n for n, m in enumerate(PLAN.iteration.members) if m.sigma == 0.01)
    found[ended] = Answered([], 2, 0, 0, 2, 0)
    report = probe_report(CONFIG, PLAN, CENTER, found, RMS)
    assert report["suggestion"]["sigma"] == 0.001
    assert any(note.startswith("σ = 0.01: 1 of 16 members") for note in notes(report))


def test_answers_that_are_cut_off_are_noted():
    prompts = len(PLAN.iteration.prompts)
    cut = replace(CENTER, answered=replace(CENTER.answered, unended=prompts))
    (note,) = notes(probe_report(CONFIG, PLAN, cut, results(slope), RMS))
    assert note.startswith("100% of the center's answers are cut off at generation.max_new_tokens")


def test_a_stop_and_a_reward_that_varies_are_noted():
    half = {n: a for n, a in results(slope).items() if n < 6}
    report = probe_report(CONFIG, PLAN, replace(CENTER, rescoring=0.25), half, RMS)
    assert [row["members"] for row in report["sigmas"]] == [4, 2]
    first, second = notes(report)
    assert first.startswith("stopped after 6 of 32 members") and "varies by 0.25" in second
    assert conclusion(report)[0].startswith("too few pairs")
    assert len(cells(report)) == 3


def test_the_terminal_and_a_page_show_it(tmp_path, capsys):
    report = probe_report(CONFIG, PLAN, CENTER, results(slope), RMS)
    print_report(report, "shardes train mine.yaml")
    assert "start: shardes train mine.yaml es.sigma=" in capsys.readouterr().out
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "probe.json").write_text(to_json(report))
    assert call(report_command.main, tmp_path).returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 4 and "models/&lt;small&gt;" in page
    assert "layers.*.up.weight" in page and "0.1 to 0.2" in page
    (tmp_path / "probe" / "probe.json").write_text(json.dumps({"sigmas": 3}))
    done = call(report_command.main, tmp_path)
    assert (
        done.returncode == 2 and "damaged" in done.stderr and "run the probe again" in done.stderr
    )


def test_six_sigmas_lie_around_the_configs():
    assert default_sigmas(0.001) == [3.16e-05, 0.0001, 0.000316, 0.001, 0.00316, 0.01]
