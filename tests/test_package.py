"""The release: a source distribution equal to the checkout, and a wheel that works alone."""

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import shardes
from launch import ROOT, run

pytestmark = pytest.mark.slow

CONFIG = """
model: {{path: {model}, dtype: float32}}
es: {{population_size: 4, sigma: 0.05, alpha: 0.05, iterations: 2}}
generation: {{max_new_tokens: 8}}
task: {{name: conciseness}}
run: {{dir: run, timeout: 60}}
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A directory with the source distribution and, built from that, the wheel."""
    source, out = tmp_path_factory.mktemp("source") / "shardes", tmp_path_factory.mktemp("released")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    done = run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def python(released, tmp_path_factory) -> str:
    """The Python of a new virtual environment that has the wheel, and sees the packages of this
    one.
    """
    home = tmp_path_factory.mktemp("venv")
    venv.create(home)
    python = str(home / "bin" / "python")
    (wheel,) = released.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-index",
        "--no-deps",
        str(wheel),
    ]
    done = run(pip, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_both_are_of_the_one_version_there_is(released):
    assert sorted(file.name for file in released.iterdir()) == [
        f"shardes-{shardes.__version__}-py3-none-any.whl",
        f"shardes-{shardes.__version__}.tar.gz",
    ]


def test_the_source_distribution_is_the_checkout(released):
    (archive,) = released.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {name for name in tracked.split("\0") if name} - held == {".gitignore"}


def test_the_wheel_is_the_package_and_its_data(released):
    (wheel,) = released.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "shardes", "configs", "examples"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert held == {
        name if name.startswith("shardes/") else f"shardes/{name}"
        for name in tracked.stdout.split()
        if not name.endswith("README.md")
    }


def test_the_wheel_trains_without_the_checkout(python, tied_llama, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.format(model=tied_llama))
    done = run(
        [str(Path(python).with_name("shardes")), "train", "config.yaml"],
        cwd=tmp_path,
        PYTHONPATH="",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 2
    shardes_command = str(Path(python).with_name("shardes"))
    done = run([shardes_command, "init", "mine"], cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0 and (tmp_path / "mine" / "reward.py").is_file(), done.stderr
    code = (
        "from shardes import tasks; "
        "print(tasks.__file__, len(tasks.load_task('countdown', None).prompts('test')))"
    )
    file, count = run([python, "-c", code], cwd=tmp_path, PYTHONPATH="").stdout.split()
    assert Path(file).is_relative_to(Path(python).parent.parent) and count == "500"
