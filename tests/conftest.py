"""Small models that many tests share."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from shardes.distributed import environment
from zygote import Zygote

environment.prepare()  # before a test module imports torch
settings.register_profile("loaded", deadline=None)  # other processes may take the cores
settings.load_profile("loaded")


def pytest_addoption(parser) -> None:
    parser.addoption("--kills", type=int, default=30, help="of tests/faults/test_kills.py, in all")
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="of tests/gpu; cpu: rehearse them without a GPU (default: %(default)s)",
    )


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what tests have measured (`record_property`); docs/scaling.md quotes it."""
    for report in terminalreporter.getreports("passed"):
        for label, figure in report.user_properties:
            terminalreporter.write_line(f"{label}: {figure:.1f} ({report.nodeid})")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts runs without the time that the launcher and imports take."""
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="session")
def uneven_llama(tmp_path_factory) -> Path:
    """See `models.uneven_llama`."""
    return _saved("uneven_llama", tmp_path_factory)


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory) -> Path:
    """See `models.tied_llama`."""
    return _saved("tied_llama", tmp_path_factory)


@pytest.fixture(scope="session")
def judging_llama(tmp_path_factory) -> Path:
    """See `models.judging_llama`."""
    return _saved("judging_llama", tmp_path_factory)


@pytest.fixture
def judge(monkeypatch):
    """A running `judge.Judge`, which the environment names."""
    from judge import KEY, Judge

    with Judge() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", server.url)
        monkeypatch.setenv("JUDGE_MODEL", "small-judge")
        monkeypatch.setenv("JUDGE_API_KEY", KEY)
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def biased_qwen(tmp_path_factory) -> Path:
    """See `models.biased_qwen`."""
    return _saved("biased_qwen", tmp_path_factory)


@pytest.fixture(scope="session")
def moe_qwen(tmp_path_factory) -> Path:
    """See `models.moe_qwen`."""
    return _saved("moe_qwen", tmp_path_factory)


def _saved(name: str, tmp_path_factory) -> Path:
    import models  # imports torch

    return getattr(models, name)(tmp_path_factory.mktemp(name))
