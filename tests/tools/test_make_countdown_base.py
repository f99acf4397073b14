import random
import sys
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import run, script
from shardes.tasks.countdown import load_problems, reward

base = script("tools/make_countdown_base.py")


@pytest.mark.slow
def test_a_base_is_a_model_directory_with_problems_it_has_not_seen(tmp_path):
    done = run([sys.executable, "tools/make_countdown_base.py", str(tmp_path), "--steps", "2"])
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    problems = [
        problem
        for name in ("train", "test")
        for problem in load_problems(tmp_path / f"{name}.json")
    ]
    assert len(problems) == 700
    text = problems[0].prompt + "3 * 4 = 12, 12 + 1 = 13</think>\n<answer>(3 * 4) + 1</answer>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) < 70
    seen = {
        (tuple(sorted(p["numbers"])), p["target"])
        for p in islice(base.problems(0, base.NUMBERS, base.LARGEST), 700, 8700)
    }
    assert not seen & {
        (tuple(sorted(problem.numbers)), str(problem.target)) for problem in problems
    }


def test_about_half_of_the_worked_answers_are_right_and_all_are_in_form():
    rng = random.Random(0)
    rewards = []
    for problem in islice(base.problems(1, base.NUMBERS, base.LARGEST), 400):
        rewards.append(
            reward(base.worked(rng, problem), problem["numbers"], int(problem["target"]))
        )
    assert min(rewards) == pytest.approx(0.1)
    assert 0.45 < sum(value > 1 for value in rewards) / 400 < 0.65
