"""The token of a run is whole, or it is none."""

import os
import resource

import pytest

from shardes.errors import ConfigError, RunError
from shardes.replicas.token import SHORTEST, TOKEN, run_token


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)


def test_the_token_is_the_users_or_made_for_the_owner_alone(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=TOKEN):
        run_token(tmp_path)
    made = run_token(tmp_path, create=True)
    assert len(made) > 40 and run_token(tmp_path) == run_token(tmp_path, create=True) == made
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["token"]
    monkeypatch.setenv(TOKEN, "one that the user chose")
    assert run_token(tmp_path, create=True) == "one that the user chose"


@pytest.mark.parametrize("content", [b"", b"\n", b" " * 100, b"x" * (SHORTEST - 1)])
@pytest.mark.parametrize("create", [True, False], ids=["primary", "client"])
@pytest.mark.parametrize("place", ["file", "environment"])
def test_an_empty_or_short_token_is_refused(tmp_path, monkeypatch, content, create, place):
    if place == "file":
        (tmp_path / "token").write_bytes(content)
    else:
        monkeypatch.setenv(TOKEN, content.decode())
    with pytest.raises(ConfigError, match=f"at least {SHORTEST} characters"):
        run_token(tmp_path, create)


def test_a_token_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "token").write_bytes(b"\xff" * 40)
    with pytest.raises(ConfigError, match="no token"):
        run_token(tmp_path, create=True)


def test_a_full_disk_leaves_no_token(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*token"):
            run_token(tmp_path, create=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []
    assert len(run_token(tmp_path, create=True)) > 40
