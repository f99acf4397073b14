"""The rewards of the examples that ask another model: here a small server and a tiny classifier."""

from contextlib import closing

import pytest
import torch
from transformers import LlamaForSequenceClassification

from judge import KEY
from launch import ROOT
from models import byte_tokenizer
from shardes.config import loading as settings
from shardes.errors import ConfigError
from shardes.rewards.scoring import Scorer
from shardes.tasks import configured_task
from shardes.tasks.user_code import load_reward_function

REPLIES = ["Yes.", "Of course, we open at nine!", "no"]


def mark(reply: str) -> float:
    return sum(map(ord, f"\n{reply}\n")) % 11 / 10


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """Makes the scorer of an example's config."""
    monkeypatch.chdir(ROOT)
    scorers = []

    def make(name: str, *keys: str) -> Scorer:
        config = settings.load(f"examples/{name}/config.yaml", list(keys))
        task = configured_task(config.task)
        scorers.append(Scorer(config.task, task, tmp_path / "failed.json"))
        return scorers[-1]

    yield make
    for made in scorers:
        made.close()


def test_a_judge_that_fails_for_a_while_is_asked_again(judge, scorer):
    judge.failures += [429, 503, "close", 500]
    scores = scorer("judge")
    assert scores("test", REPLIES) == list(map(mark, REPLIES))
    assert len(judge.requests) == 3 + 4 and scores.parts == {"attempts": pytest.approx(7 / 3)}
    assert {path for path, _ in judge.requests} == {"/v1/chat/completions"}
    assert {body["model"] for _, body in judge.requests} == {"small-judge"}
    assert judge.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "failures, requests, problem",
    [
        ([401], 1, "JudgeError: status 401 from http://127.0.0.1:"),
        ([429] * 6, 6, "JudgeError: status 429 from http://127.0.0.1:.*the last of 6 attempts"),
        (["words"], 1, "JudgeError: no mark from 0 to 10 in ' It is good"),
    ],
)
def test_a_judge_that_gives_no_mark_is_an_error_without_the_key(
    judge, scorer, capfd, failures, requests, problem
):
    judge.failures += failures
    scores = scorer("judge")
    with pytest.raises(ConfigError, match=problem) as caught:
        scores("test", ["Yes."], [0])
    assert len(judge.requests) == requests
    printed = capfd.readouterr()
    assert KEY not in str(caught.value) + scores.saved.read_text() + printed.out + printed.err


def test_a_reward_model_is_loaded_once_and_marks_each_response(judging_llama, scorer, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL", str(judging_llama))
    with closing(scorer("reward_model")) as scores:
        rewards = scores("test", REPLIES)
        assert scores("test", REPLIES) == rewards and len({*rewards}) == 3
    threads = torch.get_num_threads()
    try:
        function = load_reward_function("examples/reward_model/reward.py:score_batch")
        for reply, reward in zip(REPLIES, rewards, strict=True):
            assert function([reply], [{}]) == pytest.approx([reward], abs=1e-5)
        assert function.__globals__["load"].cache_info().misses == 1
    finally:
        torch.set_num_threads(threads)
    model = LlamaForSequenceClassification.from_pretrained(judging_llama)
    tokens = torch.tensor([byte_tokenizer()(REPLIES[1])["input_ids"]])
    assert rewards[1] == pytest.approx(model(tokens).logits.item(), abs=1e-5)
