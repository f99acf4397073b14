"""Helpers for torch's key-value stores."""

import time
from collections.abc import Callable

import torch.distributed as dist

from shardes.errors import RunError


def no_poll() -> None:
    """What a wait calls meanwhile by default."""


def wait_for_keys(
    store: dist.Store,
    keys: list[str],
    timeout: float,
    what: str,
    poll: Callable[[], None] = no_poll,
) -> None:
    """Wait until all keys are set, calling `poll` meanwhile.

    `store.wait` would keep every other thread of the process from using the store.

    Args:
        what: names what is waited for, in the error.

    Raises:
        RunError: keys were missing after `timeout` seconds; names them.
    """
    since = time.monotonic()
    while not store.check(keys):
        poll()
        if time.monotonic() - since > timeout:
            missing = ", ".join(key for key in keys if not store.check([key]))
            raise RunError(f"{what}: after {timeout:.0f} s still missing: {missing}")
        backoff_sleep(since)


def backoff_sleep(since: float) -> None:
    """Sleep before the next request of a wait that began at `since`: longer, the longer it has
    lasted.

    Ten thousand waiting replicas must not keep the store's host busy.
    """
    time.sleep(min(max((time.monotonic() - since) / 10, 0.02), 1.0))


def tcp_store(store: dist.Store) -> dist.TCPStore:
    """The TCPStore beneath prefixes."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)
    return store


def clone_store(store: dist.Store) -> dist.Store:
    """Another connection to the same store, for another thread."""
    return store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
