"""Helpers for torch's key-value stores."""

import time
from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist

from shardes.errors import RunError


class KeyValueStore(Protocol):
    """What is used of torch's stores, and of `replicas.gateway_client.GatewayStore`."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...

    def compare_set(self, key: str, expected: str, value: str, /) -> bytes: ...

    def delete_key(self, key: str, /) -> bool: ...


class PrefixStore:
    """The keys of a store that begin with a prefix and a slash; like torch's, of any store."""

    def __init__(self, prefix: str, store: KeyValueStore):
        self._prefix, self._store = prefix, store

    def set(self, key: str, value: str, /) -> None:
        self._store.set(self._full(key), value)

    def get(self, key: str, /) -> bytes:
        return self._store.get(self._full(key))

    def add(self, key: str, amount: int, /) -> int:
        return self._store.add(self._full(key), amount)

    def check(self, keys: list[str], /) -> bool:
        return self._store.check(list(map(self._full, keys)))

    def compare_set(self, key: str, expected: str, value: str, /) -> bytes:
        return self._store.compare_set(self._full(key), expected, value)

    def delete_key(self, key: str, /) -> bool:
        return self._store.delete_key(self._full(key))

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}"


def no_poll() -> None:
    """What a wait calls meanwhile by default."""


def wait_for_keys(
    store: KeyValueStore,
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

    def missing() -> str:
        return ", ".join(key for key in keys if not store.check([key]))

    wait_until(lambda: store.check(keys), timeout, what, missing, poll)


def wait_until(
    done: Callable[[], bool],
    timeout: float,
    what: str,
    missing: Callable[[], str],
    poll: Callable[[], None] = no_poll,
) -> None:
    """Ask the store until `done`, calling `poll` meanwhile.

    Args:
        what: names what is waited for, in the error.
        missing: names what is missing, in the error.

    Raises:
        RunError: not done after `timeout` seconds.
    """
    since = time.monotonic()
    while not done():
        poll()
        if time.monotonic() - since > timeout:
            raise RunError(f"{what}: after {timeout:.0f} s still missing: {missing()}")
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
