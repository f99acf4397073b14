"""Which files of a model are copied with it, and which are fetched from the hub."""

import base64
import json
import random
import shutil
from io import BytesIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

from shardes.engines import open_model
from shardes.errors import ConfigError
from shardes.sharding.model_directory import model_directory, tokenizer_files
from shardes.storage.checkpoint import Checkpoint, Manifest, verify

LETTERS = "abcdefghijklmnop"


def sentencepiece(directory: Path, name: str, kind: str) -> None:
    trainer = SentencePieceTrainer
    generator, model = random.Random(0), BytesIO()
    sentences = ["".join(generator.choices(LETTERS + " ", k=30)) for _ in range(400)]
    trainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=40,
        model_type=kind,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (directory / name).write_bytes(model.getvalue())


def wordpiece(directory: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + x for x in LETTERS)]
    (directory / "vocab.txt").write_text("\n".join(words))


def bpe(directory: Path) -> None:
    tokens = ["<|endoftext|>", *LETTERS, "ab", "abc"]
    vocab = {token: number for number, token in enumerate(tokens)}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\na b\nab c\n")


TOKENIZERS = {
    "GPT2Tokenizer": (bpe, {"vocab.json", "merges.txt"}),
    "BertTokenizer": (wordpiece, {"vocab.txt"}),
    "T5Tokenizer": (lambda d: sentencepiece(d, "spiece.model", "unigram"), {"spiece.model"}),
    "LlamaTokenizer": (lambda d: sentencepiece(d, "tokenizer.model", "bpe"), {"tokenizer.model"}),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_checkpoint_has_the_tokenizer(kind, tied_llama, tmp_path):
    write, names = TOKENIZERS[kind]
    base = shutil.copytree(tied_llama, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    templates = base / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ messages }}")
    (base / "chat_template.jinja").write_text("{{ messages[0] }}")
    write(base)
    files, module = open_model(base, torch.float32)
    params = [name for name, _ in module.named_parameters()]
    checkpoint = Checkpoint(tmp_path / "out", files, params, torch.float32, "5GB")
    checkpoint.create()
    shas = {file: checkpoint.read_back(file)[0] for file in checkpoint.files}
    checkpoint.publish(Manifest(0, "", shas))
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    assert verify(tmp_path / "out").files.keys() >= names | {
        "additional_chat_templates/tools.jinja"
    }
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert type(before) is type(after) and before.chat_template == after.chat_template
    assert before("abc d").input_ids == after("abc d").input_ids
    assert len(set(before("abc d").input_ids)) > 1


def test_a_tokenizer_with_code_of_its_own(tmp_path):
    """Its class cannot be asked, because its code is not run."""
    config = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.tiktoken").write_bytes(base64.b64encode(b"a") + b" 0")
    assert tokenizer_files(tmp_path) == ["own.tiktoken"]


OTHERS = ["LICENSE", "onnx/config.json", "consolidated.safetensors", "notes.txt", "extra.json"]


@pytest.fixture
def cached(tied_llama, tmp_path, monkeypatch) -> Path:
    """The cached snapshot of the hub's model own/er; there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    model = tmp_path / "models--own--er"
    snapshot = shutil.copytree(tied_llama, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    names = [*(path.name for path in snapshot.iterdir()), *OTHERS]
    (model / "trees").mkdir()
    listing = {"files": {name: {"size": 1, "blob_id": "0"} for name in names}, "format_version": 1}
    (model / "trees" / f"{commit}.json").write_text(json.dumps(listing))
    return snapshot


def test_offline_a_cache_needs_only_what_is_read(cached):
    assert model_directory("own/er") == cached
    (cached / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        model_directory("own/er")


@pytest.mark.parametrize("single", [True, False])
def test_the_hub_is_asked_for_what_is_read(single, biased_qwen, tied_llama, tmp_path, monkeypatch):
    """Of a single file and several with an index, those that transformers would load."""
    hub = shutil.copytree(biased_qwen, tmp_path / "hub")
    shards = {path.name for path in hub.glob("*.safetensors")}
    for name in [*OTHERS, "pytorch_model.bin", "additional_chat_templates/tools.jinja"]:
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_text("{}")
    if single:
        shutil.copy(tied_llama / "model.safetensors", hub)

    def snapshot_download(path, allow_patterns, ignore_patterns):
        names = [file.relative_to(hub).as_posix() for file in hub.rglob("*") if file.is_file()]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("shardes.sharding.model_directory.snapshot_download", snapshot_download)
    directory = model_directory("own/er")
    fetched = {
        file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()
    }
    weights = {name for name in fetched if name.endswith((".safetensors", ".bin"))}
    assert weights == ({"model.safetensors"} if single else shards)
    assert {"LICENSE", "tokenizer.json", "additional_chat_templates/tools.jinja"} <= fetched
    assert "onnx/config.json" not in fetched


def test_an_index_names_only_files_of_its_directory(biased_qwen, tmp_path):
    directory = shutil.copytree(biased_qwen, tmp_path / "model")
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name, shard = next(iter(index["weight_map"].items()))
    shutil.move(directory / shard, tmp_path / shard)
    for place in (f"../{shard}", str(tmp_path / shard), ["x"], 1):
        index["weight_map"][name] = place
        file.write_text(json.dumps(index))
        with pytest.raises(ConfigError, match=r"index\.json puts .*no file of this directory"):
            open_model(directory, torch.float32)
