"""A model card says what a run did, as the hub and a reader of Markdown understand it."""

import json

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from shardes.config.loading import center_settings
from shardes.config.schema import Config, ModelConfig, Noise, RunConfig
from shardes.es.population import schedule
from shardes.storage.journal import JOURNAL, Evaluation, Header, Journal, Record, read
from shardes.storage.model_card import code, model_card, table

TEMPLATE = "a | b \\| c ``x`` `y`\n<script>\u2028**z**"


@pytest.fixture
def history(tmp_path):
    """A run of three iterations, with α's schedule and an evaluation before each and at the end."""
    config = Config(model=ModelConfig("/home/me/models/small_one"), run=RunConfig("run"))
    config.es.noise, config.es.rank, config.es.population_size = Noise.low_rank, 4, 2
    config.es.iterations, config.es.alpha, config.es.alpha_final = 3, 0.1, 0.02
    config.task.name, config.task.train = "jsonl", "/home/me/data/train.jsonl"
    config.task.template = TEMPLATE
    journal = Journal(tmp_path / JOURNAL, None)
    journal.append(Header(config.model.path, {}, center_settings(config)))
    for t in range(4):
        metrics = dict(center_reward=t / 2, held_out_reward=t / 4, held_out_accuracy=t / 8)
        rewards = {"train": [t / 2], "test": [0.0, t / 2]}
        journal.append(Evaluation(t, f"{t:016x}", metrics, rewards))
        if t < 3:
            sigma, alpha = schedule(config.es, t)
            values = ([1, 2], [t, t + 1.0], [0.1, -0.1], sigma, alpha, f"{t:016x}")
            journal.append(Record(t, *values, rank=4))
    journal.close()
    return read(tmp_path / JOURNAL)


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: rows of cells, as a reader sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level > 3:
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def test_what_the_run_did(history, tmp_path):
    card = ModelCard(model_card(history, 3, tmp_path, None))
    results, iterations, settings = tables(card.text)
    assert results == [
        ["", "before training", "after 3 iterations"],
        ["mean reward, held-out prompts", "0", "0.75"],
        ["accuracy, held-out prompts", "0", "0.375"],
        ["mean reward, training prompts", "0", "1.5"],
    ]
    assert [row[0:3] for row in iterations[1:]] == [
        ["0", "0.001", "0.1"], ["1", "0.001", "0.06"], ["2", "0.001", "0.02"]
    ]  # fmt: skip
    assert "low-rank noise (rank 4 on each matrix)" in card.text
    assert "2 held-out prompts" in card.text
    assert "α is 0.1 at first and 0.02 in the last of these iterations; it changes linearly." in (
        card.text
    )
    values = {key: json.loads(value) for key, value in settings[1:]}
    assert values.pop("task.train") == "train.jsonl"
    assert values == {k: v for k, v in history.settings.items() if k != "task.train"}


@pytest.mark.parametrize(
    "name, path, shown",
    [
        ("math", None, "`math`"),
        (None, "/home/me/own.py:Task", "`own.py`"),
        (None, None, "an object in Python"),
    ],
)
def test_the_task_is_named(history, tmp_path, name, path, shown):
    history.settings.update({"task.name": name, "task.path": path})
    assert f"Task: {shown}." in model_card(history, 3, tmp_path, None)


def test_an_earlier_center_has_its_own_figures(history, tmp_path):
    text = ModelCard(model_card(history, 1, tmp_path, None)).text
    assert tables(text)[0][:2] == [
        ["", "before training", "after 1 iteration"],
        ["mean reward, held-out prompts", "0", "0.25"],
    ]
    assert len(tables(text)[1]) == 2 and "α is 0.1; it changes linearly." in text
    assert tables(model_card(history, 0, tmp_path, None))[0][0] == ["", "before training"]


def test_a_directorys_path_is_not_published(history, tmp_path):
    text = model_card(history, 3, tmp_path, None)
    data = ModelCard(text).data
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["evolution-strategies", "shardes"],
    }
    assert "/home/me" not in text and "`small_one`" in text


def test_a_hub_model_is_the_base_model(history, tmp_path):
    data = ModelCard(model_card(history, 3, tmp_path, "owner/name")).data
    assert (data.base_model, data.base_model_relation) == ("owner/name", "finetune")
    assert (data.license, data.license_link) == ("other", "https://huggingface.co/owner/name")
    assert data.get("language") is None


@pytest.mark.parametrize(
    "card, known",
    [
        ("---\nlicense: mit\nlanguage: en\ntags: [x]\n---\n", dict(license="mit", language="en")),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("# no header", {}),
    ],
)  # fmt: skip
def test_licence_and_languages_are_the_base_models(history, tmp_path, card, known):
    (tmp_path / "README.md").write_text(card)
    data = ModelCard(model_card(history, 3, tmp_path, None)).data
    assert {key: data.get(key) for key in ("license", "language") if data.get(key)} == known


@pytest.mark.parametrize(
    "text", ["a|b", "\\|", "`", "``a`", " x ", "a\\", "<b>&amp;</b>", "[a](b) *c* _d_ ~~e~~", "|"]
)
def test_cells_are_shown_as_they_are(text):
    (rows,) = tables(table(["a", "b"], [[code(text), code("last")]]))
    assert rows == [["a", "b"], [text, "last"]]
