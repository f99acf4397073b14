"""Mistakes of the user end with exit code 2 and one line: what is wrong, where, and what to do."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from architectures import tiny_config
from launch import call, free_port
from models import SIZES, save_model
from shardes.commands import cli
from shardes.config.loading import center_settings, load
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.files import fingerprint
from shardes.storage.journal import JOURNAL, Header, Journal, Record

OWN = """
class Task:
    def prompts(self, split):
        return ["abc", "defg"]
    def score(self, split, responses):
        return [float(len(text)) for text in responses]

class Empty(Task):
    def prompts(self, split):
        return []

class Silent:
    def prompts(self, split):
        return ["abc"]

class Raises(Task):
    def __init__(self):
        raise OSError("no such data")

class Logger:
    def log(self, metrics, step): ...

def reward(response, example):
    return 0.0
"""


@pytest.fixture(autouse=True)
def environ(monkeypatch, tmp_path) -> Iterator[None]:
    """No variables of a launcher; the working directory is the test's."""
    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SHARDES_TOKEN"):
        os.environ.pop(name, None)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


def write_data(folder: Path) -> None:
    rows = ['{"prompt": "a", "answer": "b"}', '{"prompt": "c"', '{"prompt": "d", "answer": "e"}']
    (folder / "cut.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "rows.jsonl").write_text(rows[0] + "\n" + '{"question": "c"}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "numbers.json").write_text('[{"numbers": [1, 2], "target": "many"}]')


@pytest.fixture
def workspace(tmp_path, uneven_llama) -> Path:
    """A directory with config.yaml, own.py, invalid data and models, and two runs."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("class Task:\n  def prompts(self split):\n")
    (tmp_path / "notes.txt").write_text("no Python\n")
    (tmp_path / "list.yaml").write_text("- es.sigma\n")
    (tmp_path / "bad.yaml").write_text("es: {sigma: 1\n")
    write_data(tmp_path)
    llama = json.dumps({"model_type": "llama", **SIZES})
    for name, files in {
        "nothing": {},
        "no_weights": {"config.json": llama},
        "no_config": {"config.json": "{"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    save_model(tmp_path / "mamba", AutoModelForCausalLM.from_config(tiny_config("mamba")))
    (tmp_path / "taken.partial").mkdir()
    (tmp_path / "taken.partial" / "notes.txt").write_text("mine")
    settings = {
        "model": {"path": str(uneven_llama), "dtype": "float32"},
        "es": {"population_size": 4, "iterations": 3},
        "generation": {"max_new_tokens": 4},
        "task": {"path": "own.py:Task"},
        "run": {"dir": "run", "timeout": 60},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = load("config.yaml", [])
    files = fingerprint(WeightFiles(uneven_llama))
    for name in ("old", "damaged"):
        (tmp_path / name).mkdir()
        journal = Journal(tmp_path / name / JOURNAL, None)
        journal.append(Header(str(uneven_llama), files, center_settings(config)))
        for iteration in range(2):
            journal.append(
                Record(
                    iteration,
                    [1, 2, 3, 4],
                    [0.0, 1.0, 2.0, 3.0],
                    [0.1] * 4,
                    0.001,
                    0.0005,
                    "0" * 16,
                )
            )
        journal.close()
    damaged = tmp_path / "damaged" / JOURNAL
    damaged.write_text(damaged.read_text().replace('"rewards": [0.0', '"rewards": [9.0', 1))
    return tmp_path


JSONL = (
    "task.path=null task.name=jsonl task.train=rows.jsonl task.test=rows.jsonl "
    "task.reward=own.py:reward"
)
COUNTDOWN = "task.path=null task.name=countdown"
PLAN = "plan config.yaml --gpus 8 --gpu H100"

# Command lines, and the message that each must print. "train ..." is `train config.yaml ...`,
# "layout ..." a dry run of it on four ranks, "token ..." the same as train with SHARDES_TOKEN set;
# PORT is a free port.
MISTAKES = {
    # keys and values
    "train es.sigam=1": r"es\.sigam: no such key; did you mean es\.sigma\?",
    "train xyzzy=1": r"xyzzy: no such key; see --help for every key",
    "train es.sigma": r"es\.sigma: overrides are written key=value",
    "train es.iterations=many": (
        r"es\.iterations: .*'many'.*; the key's meaning: total number of iterations"
    ),
    "train model.dtype=fp16": (
        r"model\.dtype: .*'fp16', expected one of \[float32, bfloat16, float16\]"
    ),
    "train model.attention=flash": r"model\.attention: .*'flash', expected one of \[auto, sdpa,",
    "train model.attention=flash_attention_2": (
        r"model\.attention=flash_attention_2: (the package flash-attn is not|there is no|computes)"
    ),
    "train center.device=device sharding.offload=cpu": (
        r"center\.device=device: .* sharding\.offload=cpu, and so is the center; use auto or host"
    ),
    "train es.seed=": r"es\.seed: .*'None'.*the key's meaning: run seed",
    "train es.sigma=0": r"es\.sigma=0\.0: must be positive",
    "train es.population_size=1": r"es\.population_size=1: must be at least 2",
    "train es.antithetic=true es.population_size=5": (
        r"es\.population_size=5: must be even with es\.antithetic=true"
    ),
    "train es.evolve=(": r"es\.evolve=\(: must be a regular expression, or null",
    "train checkpoint.shard_size=5": (
        r"checkpoint\.shard_size=5: must be a size such as 5GB or 500MB"
    ),
    "train es.evolve=*.mlp": r"es\.evolve=\*\.mlp: not readable as YAML: .*; quote the",
    "train generation.stop=[a": r"generation\.stop=\[a: not readable as YAML: .*quote",
    "train es.sigma=inf": r"es\.sigma=inf: must be a finite number, at most 2147483647",
    "train es.iterations=9999999999": r"es\.iterations=9999999999: must be a finite number, at",
    "train run.dir=''": r"run\.dir=: is required: where the run is written",
    "train es.evolve=mpl": (
        r"es\.evolve=mpl: matches none of the \d+ parameters of .*, such as model\.embed_tokens"
    ),
    "layout es.evolve=mpl": r"es\.evolve=mpl: matches none of the \d+ parameters",
    "train generation.stop=[a,'']": r"generation\.stop=.*: must not hold an empty string",
    "train tracking.loggers=wandb": (
        r"tracking\.loggers: must be a list, written tracking\.loggers=\[first,second\]"
    ),
    "train tracking.loggers=[wanb]": (
        r"tracking\.loggers=wanb: no such logger; did you mean wandb\?"
    ),
    "train tracking.loggers=[own.py:Logger]": (
        r"own\.py:Logger: Logger has no close\(\); see shardes\.reporting\.loggers\.Logger"
    ),
    "train replicas.port=0 es.restore=subtract": (
        r"es\.restore=subtract: .* none can join .*; use copy"
    ),
    "train es.noise=low_rank es.restore=subtract": (
        r"es\.restore=subtract: is for es\.noise=full; use copy with es\.noise=low_rank"
    ),
    "train es.noise=low_rank es.rank=0": r"es\.rank=0: must be at least 1",
    "train es.members_per_batch=4": (
        r"es\.members_per_batch=4: is for es\.noise=low_rank: with full noise a member changes"
    ),
    "train es.noise=low_rank model.path=mamba": (
        r"es\.members_per_batch: members cannot share backbone\.layers\.0\.mixer\.A_log, which "
        r"MambaMixer computes with in its own way; set es\.members_per_batch=1"
    ),
    "train es.noise=low_rank es.rank=1000": (
        r"es\.rank=1000: model\.embed_tokens\.weight is \d+ × \d+, so its rank is at most \d+"
    ),
    # config files and arguments
    "cli train": r"arguments are required: CONFIG\.yaml; see shardes train --help",
    "cli train missing.yaml": (
        r"missing\.yaml: no such config file \(looked in /.*\); shardes configs lists"
    ),
    "cli train confg.yaml": r"confg\.yaml: no such config file; did you mean config\.yaml\?",
    "cli train nothing": r"nothing: a directory; name the config file in it",
    "cli train bad.yaml": r"bad\.yaml: not readable as YAML: .*line 2",
    "cli train list.yaml": r"list\.yaml: holds no settings \(key: value lines\); see configs/",
    "train --sigma 3": r"unrecognized arguments: --sigma 3; see shardes train --help",
    "train --gpus many": r"--gpus/--nproc: invalid int value: 'many'; see shardes train --help",
    "cli trian config.yaml": r"trian: no such command; did you mean train\?",
    # layouts
    "layout sharding.shard=3": (
        r"sharding\.shard=3 × .* does not divide the 4 ranks .* a replica takes 3$"
    ),
    "layout sharding.replicas=3": (
        r"sharding\.replicas=3 × .* does not fill the 4 ranks .* they take 3$"
    ),
    "layout sharding.tensor=4": (
        r"sharding\.tensor=4: .* has 3 key-value heads, and a tensor rank needs at least one"
    ),
    "layout replicas.join=127.0.0.1:1": (
        r"replicas\.join=.*: a launch joins as one replica, .*; 4 were started"
    ),
    # models
    "train model.path=nowhere": (
        r"model\.path=nowhere: no such directory, and not a hub id \(owner/name\) either"
    ),
    "train model.path=models/SmolLM2-135M-Instruct": (
        r"model\.path=models/SmolLM2-135M-Instruct: no such directory \(looked in /.*\); "
        r"shardes get-smollm2 makes it there"
    ),
    "cli evaluate config.yaml --model nowhere": r"--model nowhere: no such directory, and not",
    "train model.path=nothing": (
        r"model\.path=nothing: it has neither model\.safetensors nor .*index\.json$"
    ),
    "train model.path=null": r"model\.path: .*'None'.*meaning: checkpoint directory",
    # tasks and their data
    "train task.name=countdown": r"task\.name, task\.path: both are given; give one",
    "train task.path=null": r"task\.name, task\.path: neither is given; give one",
    "train task.path=null task.name=cuontdown": (
        r"task\.name=cuontdown: no such task; did you mean countdown"
    ),
    "train task.path=own.py": r"task\.path=own\.py: must be written file\.py:Class",
    "train task.path=gone.py:Task": r"task\.path=gone\.py:Task: there is no file /.*/gone\.py",
    "train task.path=owm.py:Task task.train=rows.jsonl": (
        r"task\.path=owm\.py:Task: there is no file /.*/owm\.py; did you mean own\.py\?"
    ),
    "train task.path=own.py:Tusk": (
        r"task\.path=own\.py:Tusk: no class Tusk there; it has Task, Empty"
    ),
    "train task.path=notes.txt:Task": r"notes\.txt is not a Python file \(\.py\)",
    "train task.path=broken.py:Task": r"importing .*broken\.py raised SyntaxError: .*line 2",
    "train task.path=own.py:Silent": (
        r"Silent has no score\(\) and no reward\(\); see shardes\.tasks\.Task"
    ),
    "train task.path=own.py:Empty": (
        r"list of prompts is empty; prompts\(split\) must return at least one"
    ),
    "train task.path=own.py:Raises": r"Raises\(\) raised OSError: no such data",
    "train task.prompts_per_iteration=1": (
        r"task\.prompts_per_iteration: .* score\(split, responses, which=None\)"
    ),
    "train task.train=rows.jsonl": r"task\.train=rows\.jsonl: only for task\.name=countdown",
    f"train {COUNTDOWN} task.train=gone.json": r"gone\.json: there is no such data file",
    f"train {COUNTDOWN} task.train=numbrs.json": r"numbrs\.json: .*; did you mean numbers\.json\?",
    f"train {COUNTDOWN} task.train=numbers.json": (
        r"numbers\.json: entry 0 .*'many'; .* target \(a number\)"
    ),
    f"train {JSONL} task.train=cut.jsonl": r"cut\.jsonl: line 2 is not JSON: .*column 15",
    f"train {JSONL}": r"rows\.jsonl: line 2 \(id none\) has no prompt",
    f"train {JSONL} task.train=empty.jsonl": r"empty\.jsonl: holds no rows",
    f"train {JSONL} task.reward=own.py:rewrd": (
        r"task\.reward=own\.py:rewrd: no function rewrd there; it has .*reward"
    ),
    f"train {JSONL} task.reward=null": (
        r"task\.reward: is required with task\.name=jsonl: my_module:function"
    ),
    f"train {JSONL} task.template={{question}}": (
        r"task\.template: must be text; .* quote it twice, as in"
    ),
    # run directories and resuming
    "train run.dir=notes.txt": (
        r"run\.dir=notes\.txt: cannot be written: .*File exists.*; choose another directory"
    ),
    "train run.dir=old resume=never": (
        r"run\.dir=old: holds a run already, and resume=never; choose another"
    ),
    "train resume=nowhere": (
        r"resume=nowhere: neither a run directory with a journal nor a snapshot in one"
    ),
    "train run.dir=old es.alpha=0.1": (
        r"es\.alpha=0\.1: the run in old has 0\.0005; use that value, list es\.alpha in"
    ),
    "layout run.dir=old es.alpha=0.1": (
        r"es\.alpha=0\.1: the run in old has 0\.0005; use that value"
    ),
    "train run.dir=old es.iterations=1": (
        r"es\.iterations=1: the run in old has 2 already; shardes export --iteration"
    ),
    "train run.dir=old resume.allow_changes=[es.alfa]": (
        r"resume\.allow_changes: es\.alfa .*; did you mean es\.alpha"
    ),
    "train run.dir=damaged": (
        r"damaged/journal\.jsonl, line 2: damaged .* shardes journal damaged verify"
    ),
    # joining a run
    "train replicas.port=70000": r"replicas\.port=70000: must be from 0 to 65535, or null",
    "train replicas.join=home": (
        r"replicas\.join=home: must be written HOST:PORT, as the run to join prints it"
    ),
    "train replicas.join=127.0.0.1:PORT": (
        r"replicas\.join: no token: set SHARDES_TOKEN, or run\.dir=run to"
    ),
    "token replicas.join=127.0.0.1:PORT": r"replicas\.join=127\.0\.0\.1:\d+: .*(refused|nobody)",
    "train replicas.join=127.0.0.1:1 replicas.port=0": (
        r"replicas\.port=0: is for the run that .* leave it out"
    ),
    # other commands
    f"cli evaluate config.yaml {COUNTDOWN} --split tset": (
        r"--split tset: the task has no .*; there are train, test"
    ),
    "cli evaluate config.yaml --split test es.seed=1": (
        r"--split es\.seed=1: .* write settings .* before --split"
    ),
    "cli evaluate config.yaml --samples -1": r"--samples -1: must not be negative",
    "cli evaluate config.yaml --out gone/found.json": (
        r"--out gone/found\.json: there is no directory gone"
    ),
    "cli export old .": r"OUT_DIR \.: the working directory; name a directory to create",
    "cli export old taken": r"/.*/taken\.partial: already exists, .*; choose another OUT_DIR",
    "cli export nowhere out": r"nowhere: neither a run directory with a journal nor a checkpoint",
    "cli export old own.py": r"own\.py: already exists; choose another OUT_DIR",
    "cli export old out --iteration 7": r"--iteration 7: the run in old has the centers 0 to 2",
    "cli export old out --dtype fp16": (
        r"argument --dtype: invalid choice: 'fp16' .*; see shardes export --help"
    ),
    "cli export old out --base nothing": r"nothing: it has neither model\.safetensors nor",
    "cli journal nowhere": r"nowhere: no journal there; pass a run directory",
    "cli journal old diff": r"diff takes a second run directory.*; see shardes journal --help",
    "cli journal old shwo": r"invalid choice: 'shwo'.*; see shardes journal --help",
    "cli report nowhere": r"nowhere: no run directory: it has no journal\.jsonl",
    "cli report old --out gone/report.html": (
        r"gone/report\.html: cannot be written: .*; choose another place"
    ),
    "cli env please": r"unrecognized arguments: please; see shardes env --help",
    # planning
    "cli plan config.yaml --gpus 8": r"--gpu is missing: the card's name, .* such as 80GB",
    "cli plan config.yaml --gpu H9": r"--gpu H9: not known; there are: H100, .*, cpu",
    "cli plan config.yaml --gpus 8 --gpu-memory 80": (
        r"--gpu-memory 80: must be a size such as 80GB"
    ),
    f"cli {PLAN} sharding.shard=3": (
        r"sharding\.shard=3 × .*: does not divide the 8 GPUs: a replica takes 3"
    ),
    f"cli {PLAN} model.path=nothing": r"model\.path=nothing: no readable config\.json",
}


def test_every_mistake_is_one_line_that_says_what_to_do(workspace):
    assert len(MISTAKES) > 40
    wrong = []
    starts = {"cli": [], "train": ["train", "config.yaml"], "token": ["train", "config.yaml"]}
    starts["layout"] = ["train", "config.yaml", "--dry-run", "--gpus", "4"]
    for line, message in MISTAKES.items():
        kind, *arguments = line.replace("PORT", str(free_port())).split()
        before = dict(os.environ)
        if kind == "token":
            os.environ["SHARDES_TOKEN"] = "0" * 64
        done = call(cli.main, *starts[kind], *arguments)
        os.environ.clear()
        os.environ.update(before)
        (*others, last) = done.stderr.splitlines() or [""]
        if (
            done.returncode != 2
            or others
            or done.stdout
            or not re.match(rf"error: .*{message}", last)
        ):
            wrong.append(
                f"{line}\n  {done.returncode} {done.stdout}{done.stderr}  wanted: {message}"
            )
    assert not wrong, "\n".join(wrong)
