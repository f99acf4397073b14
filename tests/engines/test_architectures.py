"""Models of many architectures: on every layout one center and transformers' answers, or one line
that refuses it. docs/models.md has the table.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from architectures import ARCHITECTURES, make_model, table, tiny_config
from launch import ROOT
from models import paper_coefficients
from reference import Reference
from shardes.config.schema import Config, EngineName, ModelConfig, ShardingConfig
from shardes.engines import check_model, empty_model
from shardes.errors import ConfigError
from shardes.es.population import member_seeds
from shardes.inference.limits import check_decoding
from workers.architectures import ALPHA, MEMBER, NEW_TOKENS, PROMPTS, RESPONSES, REWARDS

pytestmark = pytest.mark.architectures

LAYOUTS = {  # engine, shard, tensor
    "1 rank": ("deepspeed", 1, 1),
    "ZeRO 2": ("deepspeed", 2, 1),
    "TP 2": ("deepspeed", 1, 2),
    "FSDP, 1 rank": ("fsdp", 1, 1),
    "FSDP 2": ("fsdp", 2, 1),
    "FSDP, TP 2": ("fsdp", 1, 2),
}
# AutoTP has most to go wrong: norms of heads, scaled embeddings, one key-value head, no heads.
FEW = ["qwen3", "exaone4", "gemma2", "gpt2", "falcon", "persimmon", "mamba"]


class References:
    """Tiny models, and what every layout must give for them; each is made when first needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._results: dict[str, dict] = {}

    def __getitem__(self, name: str) -> dict:
        if name not in self._results:
            directory = make_model(name, self.folder / "base" / name)
            refused = ARCHITECTURES[name].refused
            self._results[name] = {} if refused else expected_results(directory)
        return self._results[name]


def expected_results(directory: Path) -> dict:
    """See tests/workers/architectures.py."""
    reference, ends = Reference(directory), [256]
    results = {
        "base": reference.digest(),
        "tokens": reference.generate(PROMPTS, NEW_TOKENS, ends),
        "log_probs": list(map(reference.log_probs, PROMPTS, RESPONSES)),
    }
    reference.perturb(MEMBER.seed, MEMBER.sigma)
    results["member tokens"] = reference.generate(PROMPTS, NEW_TOKENS, ends)
    seeds = member_seeds(5, 0, len(REWARDS))
    reference.update(seeds, paper_coefficients(REWARDS, ALPHA))
    return results | {"digest": reference.digest()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only slow tiny models down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> References:
    return References(tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        pytest.param("1 rank", ["mamba"], id="mamba"),
        pytest.param("TP 2", FEW, id="few"),
        *(
            pytest.param(layout, list(ARCHITECTURES), id=layout, marks=pytest.mark.slow)
            for layout in LAYOUTS
        ),
    ],
)
def test_every_architecture_is_right_or_refused(zygote, references, tmp_path, layout, names):
    engine, shard, tensor = LAYOUTS[layout]
    expected = {name: references[name] for name in names}
    folder, ranks = references.folder, shard * tensor
    arguments = [engine, str(shard), str(tensor), str(folder), str(tmp_path), *names]
    run = zygote.start(*arguments, ranks=ranks, log=tmp_path / "log", tool="architectures")
    assert run.wait(60 + 20 * len(names)) == [0] * ranks, run.text()
    problems: dict[str, list[str]] = {}
    for rank in range(ranks):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for name in names:
            refusal = ARCHITECTURES[name].refusal(engine, tensor)
            if wrong := differences(results[name], expected[name], refusal):
                problems[f"{name}, rank {rank}"] = wrong
    for name in names:
        if not ARCHITECTURES[name].refusal(engine, tensor) and f"{name}, rank 0" not in problems:
            base, export = folder / "base" / name, tmp_path / "export" / name
            if wrong := export_differences(base, export, expected[name]["digest"]):
                problems[f"{name}, export"] = wrong
    assert problems == {}


def test_refusals_come_before_anything_heavy(tmp_path):
    wrong = {}
    for name, architecture in ARCHITECTURES.items():
        directory = tmp_path / name
        tiny_config(name).save_pretrained(directory)
        module = empty_model(directory, torch.float32)
        for engine, tensor in product((EngineName.deepspeed, EngineName.fsdp), (1, 2)):
            config = Config(
                engine=engine,
                model=ModelConfig(path=str(directory)),
                sharding=ShardingConfig(tensor=tensor),
            )
            refusal, message = architecture.refusal(engine.value, tensor), ""
            try:
                check_model(config, module)
                check_decoding(str(directory), module)
            except ConfigError as error:
                message = str(error)
            if refusal not in message or bool(refusal) != bool(message) or "\n" in message:
                wrong[name, engine.value, tensor] = message
    assert not wrong, "\n".join(f"{case}: {message}" for case, message in wrong.items())


def differences(result: dict, expected: dict, refusal: str) -> list[str]:
    """What is wrong with a rank's result; `refusal` is a part of the message that is due."""
    if refusal or not result.keys() >= expected.keys():
        message = result.get("refused", "")
        is_due = bool(refusal) and refusal in message and "\n" not in message
        return [] if is_due else [str(result)[:300]]
    wrong = [key for key, value in expected.items() if key != "log_probs" and result[key] != value]
    rows = zip(result["log_probs"], expected["log_probs"], strict=True)
    same = all(row == pytest.approx(other, abs=1e-3) for row, other in rows)
    return wrong if same else [*wrong, "log_probs"]


def export_differences(base: Path, export: Path, center: str) -> list[str]:
    """What transformers loads otherwise from an export than it should."""
    loaded = Reference(export)
    _, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    wrong = [f"{key}: {sorted(info[key])}" for key in ("missing_keys", "unexpected_keys")]
    wrong = [text for text in wrong if not text.endswith("[]")]
    if tensor_names(export) != tensor_names(base):
        wrong.append(f"tensors {sorted(tensor_names(export) ^ tensor_names(base))}")
    if loaded.digest() != center:
        wrong.append("digest")
    buffers = dict(AutoModelForCausalLM.from_pretrained(base).named_buffers())
    for name, buffer in loaded.model.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            wrong.append(name)
    return wrong


def tensor_names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_the_page_has_the_table():
    """If this fails: PYTHONPATH=tests:. python -c "import architectures as a; print(a.table())"."""
    assert table() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
