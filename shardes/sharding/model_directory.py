"""The files of a model directory, or of a model on the hub: which are read, which are copied."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from shardes.config.shipped import MADE_BY
from shardes.errors import ConfigError, described, mistakes_in, nearby, one_line

CONFIG, INDEX, SINGLE = "config.json", SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
# The files beside the weights that define a model. Code is copied with the model, but runs only
# with model.trust_remote_code.
COMPANIONS = ["*.json", "*.jinja", "*.py", "tokenizer.model", "LICENSE*"]
# The vocabularies of tokenizers that transformers cannot be asked about: their code is not run.
VOCABULARIES = ["*.model", "*.tiktoken", "*.txt", "*.bpe"]
# How transformers loads models of these quantisation methods in an ordinary dtype.
DEQUANTISED = {
    "fp8": "quantization_config=FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "quantization_config=Mxfp4Config(dequantize=True)",
}
CARD = "README.md"  # says what licence a model has
TEMPLATES = f"{CHAT_TEMPLATE_DIR}/*.jinja"


def model_directory(path: str, said: str = "model.path=") -> Path:
    """The local directory of a model: `path` itself, or a download of the hub's model with that id.

    Args:
        said: what messages have before the path.

    Raises:
        ConfigError: there is no such directory, the download fails, or the model is quantised.
    """
    if Path(path).is_dir():
        return Path(path)
    return _downloaded(path, lambda: _fetch(path), said)


def config_file(path: str) -> Path:
    """config.json of a model directory, or of a hub's model, of which only that file is downloaded.

    Raises:
        ConfigError: as `model_directory`.
    """
    if Path(path).is_dir():
        return Path(path) / CONFIG
    return _downloaded(path, lambda: _fetch_files(path, [CONFIG], [CONFIG])) / CONFIG


def _downloaded(path: str, fetch: Callable[[], Path], said: str = "model.path=") -> Path:
    """What `fetch` returns after it has downloaded files of the model `path`."""
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"{said}{path}: no such directory, and not a hub id (owner/name) either{nearby(path)}"
        )
    if path in MADE_BY:
        raise ConfigError(
            f"{said}{path}: no such directory{nearby(path, f'{MADE_BY[path]} makes it there')}"
        )
    try:
        return fetch()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(str(error).strip().partition("\n")[0] or error)
        raise ConfigError(
            f"{said}{path}: no such directory, and the download from the hub failed: {reason}"
            f"{nearby(path)}"
        ) from error


def _fetch(path: str) -> Path:
    """Download what is read of a model on the hub: its small files first, then its weights."""
    directory = _fetch_files(path, [*COMPANIONS, *VOCABULARIES, CARD], [CONFIG])
    check_unquantised(directory)
    config = read_config(directory)
    single = config.get("transformers_weights") or SINGLE
    # A repository with both is read as transformers reads it: the single file alone is fetched.
    _fetch_files(path, [single, INDEX], [INDEX if (directory / INDEX).exists() else single])
    weights = weights_name(directory, config)
    if weights.endswith(".index.json") and (directory / weights).exists():
        shards = sorted(set(read_index(directory, weights).values()))
        _fetch_files(path, shards, shards)
    _fetch_files(path, [TEMPLATES], [], subfolders=True)
    # It downloads its own files. Its errors are reported where the directory's is loaded.
    with suppress(Exception):
        AutoTokenizer.from_pretrained(path, revision=directory.name, trust_remote_code=False)
    return directory


def _fetch_files(
    path: str, patterns: list[str], needed: Sequence[str], subfolders: bool = False
) -> Path:
    """The cached snapshot of a model on the hub, with the files that match downloaded.

    Without a network, the files `needed` must be in the cache, and the others may be missing.
    """
    try:
        ignored = None if subfolders else ["*/*"]  # `*` matches slashes too
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=ignored))
    except LocalEntryNotFoundError as error:
        directory = getattr(error, "snapshot_path", None)
        if directory is None or not all((Path(directory) / name).exists() for name in needed):
            raise
        return Path(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json; empty if it is missing or unreadable."""
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def weights_name(directory: Path, config: Mapping[str, Any]) -> str:
    """The file that transformers loads weights from: one of safetensors, or an index of several.

    That is `transformers_weights` of config.json, else model.safetensors, even beside an index.
    """
    name = config.get("transformers_weights")
    if isinstance(name, str) and Path(name).name == name:
        return name
    return INDEX if (directory / INDEX).exists() and not (directory / SINGLE).exists() else SINGLE


def read_index(directory: Path, name: str) -> dict[str, str]:
    """The file of every tensor, by an index.

    Raises:
        ConfigError: the index is unreadable, or names a file outside the directory.
    """
    try:
        file_of = dict(json.loads((directory / name).read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"model.path={directory}: {name} is unreadable ({error!r}); download it again"
        ) from None
    for tensor, file in file_of.items():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise ConfigError(
                f"model.path={directory}: {name} puts {tensor} into {file!r}, which is no file of "
                "this directory; download it again"
            )
    return file_of


def open_tokenizer(directory: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        ConfigError: transformers cannot load it.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever code meets in a file that is not as it expects it
        raise ConfigError(
            f"model.path={directory}: no usable tokenizer: {reason(error)}"
        ) from error


def reason(error: Exception) -> str:
    """One line that says why transformers did not load a model or tokenizer."""
    if "trust_remote_code" in str(error):
        return (
            "it comes with Python code of its own, which is not run; if you have read that code "
            "and trust it, set model.trust_remote_code=true"
        )
    if isinstance(error, OSError | ValueError):  # says what is wrong, and goes on with advice
        text = str(error).strip()
        first = text.partition("\n")[0]
        return one_line((text[:300] if first.rstrip().endswith(":") else first) or error)
    return described(error)


def companions(directory: Path) -> list[str]:
    """The names of the files beside the weights: configs, tokenizer, licence, code."""
    return sorted(
        name
        for name in _matching(directory, COMPANIONS)
        if not name.endswith(".index.json") and name != "manifest.json"
    )


def tokenizer_files(directory: Path) -> list[str]:
    """The names of the files that the tokenizer has, chat templates of a subfolder included."""
    names = _matching(directory, [TEMPLATES])
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception:  # whatever a tokenizer raises; it may also need code that is not run
        return sorted(names | _matching(directory, VOCABULARIES))
    names |= set(type(tokenizer).vocab_files_names.values())
    read = (Path(value) for value in tokenizer.init_kwargs.values() if isinstance(value, str))
    names |= {path.name for path in read if path.parent == directory}
    return sorted(name for name in names if (directory / name).is_file())


def _matching(directory: Path, patterns: list[str]) -> set[str]:
    return {
        path.relative_to(directory).as_posix()
        for pattern in patterns
        for path in directory.glob(pattern)
        if path.is_file()
    }


def check_unquantised(directory: Path) -> None:
    """Raise ConfigError if the config files say that the weights are quantised."""
    config = read_config(directory)
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in nested:
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                settings = part[key] if isinstance(part[key], dict) else {}
                method = settings.get("quant_method") or settings.get("quant_algo") or "unknown"
                evidence = f"config.json has a {key} ({method})"
                raise ConfigError(_quantised(directory, evidence, DEQUANTISED.get(method, "")))
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if (directory / name).exists():
            raise ConfigError(_quantised(directory, f"it has a {name}"))


def _quantised(directory: Path, evidence: str, how: str = "") -> str:
    return (
        f"model.path={directory}: a quantised model, which cannot be trained ({evidence}); "
        "pass the unquantised model that it was made from, or a copy that transformers has "
        f"dequantised and saved in bfloat16{how and f' (from_pretrained(DIR, {how}))'}"
    )


def quantised_tensor(directory: Path, name: str, dtype: str) -> str:
    """The message about a tensor whose dtype is no floating-point type of 16 bits or more."""
    return _quantised(directory, f"{name} is {dtype} in the files")


def missing_weights(directory: Path, name: str) -> str:
    """The message about a directory without weights: says what it holds, and what to do."""
    start = f"model.path={directory}: it has no {name}"
    if name == SINGLE:
        start = f"model.path={directory}: it has neither {SINGLE} nor {INDEX}"
    if (directory / "adapter_config.json").exists():
        with mistakes_in(f"model.path={directory}: adapter_config.json"):
            adapter = json.loads((directory / "adapter_config.json").read_bytes())
            base = adapter.get("base_model_name_or_path") or "its base model"
        return (
            f"model.path={directory}: an adapter for {base}, not a model; merge the two "
            "(peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained"
            "(MERGED)) and pass MERGED"
        )
    save = "save_pretrained(COPY), and pass COPY"
    kinds = {
        "*.bin": "files of PyTorch, which can hold code and are not opened here; if you trust "
        f"them: AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').{save}",
        "*.gguf": "a GGUF file; convert it: AutoModelForCausalLM.from_pretrained(DIR, "
        f"gguf_file=FILE).{save}",
        "shard-*.safetensors": "a distributed checkpoint; convert it: shardes export DIR OUT "
        "--base MODEL, and pass OUT",
        "consolidated*.safetensors": "weights in Mistral's own format; download the files that "
        "are named model*.safetensors",
        "*.safetensors": "safetensors files of other names; rename the one with the model's "
        f"weights to {SINGLE}",
    }
    for pattern, kind in kinds.items():
        if files := _matching(directory, [pattern]):
            return f"{start}, but {min(files)}: {kind}"
    return start
