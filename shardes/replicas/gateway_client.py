"""The client's end of the gateway: the run's store, as a replica that joins sees it."""

import hmac
import json
import secrets
import socket
import threading
from typing import Any

import torch.distributed as dist

from shardes.errors import ConfigError, RunError
from shardes.replicas.gateway import LENGTH, PATIENCE, detect_loss, frame
from shardes.replicas.protocol import RunStore
from shardes.replicas.token import TOKEN, proof
from shardes.storage.journal import Record


class GatewayStore:
    """The keys of a run that a client of its gateway may use; see `replicas.access`.

    Threads may share it: no request waits for anything but its answer. After an error the
    connection is closed.

    Args:
        gateway: a connection that the gateway has admitted.

    Raises:
        torch's DistError, by each method: the gateway refused the request, did not answer in time,
        or is gone.
        RunError, by `records`: the run cannot read its journal.
    """

    def __init__(self, gateway: socket.socket):
        self._gateway, self._lock = gateway, threading.Lock()
        self._answers = gateway.makefile("rb")

    def set(self, key: str, value: str, /) -> None:
        self._ask("set", key, value)

    def get(self, key: str, /) -> bytes:
        return self._ask("get", key).encode()

    def add(self, key: str, amount: int, /) -> int:
        return self._ask("add", key, amount)

    def check(self, keys: list[str], /) -> bool:
        return all(self._ask("check", key) for key in keys)

    def compare_set(self, key: str, expected: str, value: str, /) -> bytes:
        return self._ask("compare_set", key, expected, value).encode()

    def delete_key(self, key: str, /) -> bool:
        return self._ask("delete_key", key)

    def records(self, first: int) -> list[str]:
        """The records of finished iterations from `first` on, as JSON: at least that one."""
        return self._ask("records", first)

    def close(self) -> None:
        self._answers.close()
        self._gateway.close()

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            try:
                self._gateway.sendall(frame(request))
                answer = json.loads(self._read(int.from_bytes(self._read(LENGTH), "big")))
            except (OSError, ValueError) as error:
                self.close()
                raise dist.DistNetworkError(f"the primary job is gone ({error})") from error
        if isinstance(answer, dict) and "damaged" in answer:
            raise RunError(f"the run cannot read its own journal: {answer['damaged']}")
        if isinstance(answer, dict):
            raise dist.DistError(f"the run has excluded this replica; it sent {answer['refused']}")
        return answer

    def _read(self, length: int) -> bytes:
        data = self._answers.read(length)
        if len(data) < length:
            raise OSError("the gateway has closed the connection")
        return data


class JoinedStore(RunStore):
    """The run's store, as a replica that joined uses it: the gateway has the records of all
    finished iterations.
    """

    def __init__(self, gateway: GatewayStore):
        super().__init__(gateway)
        self._gateway = gateway
        self._records: dict[int, Record] = {}  # of the latest answer

    def record(self, iteration: int) -> Record:
        if iteration not in self._records:
            records = [Record(**json.loads(text)) for text in self._gateway.records(iteration)]
            self._records = {record.iteration: record for record in records}
        return self._records.pop(iteration)


def connect(address: str, token: str, timeout: float) -> RunStore:
    """A connection to the run's store through the gateway at `address`, written HOST:PORT.

    Later requests raise torch's DistError if the gateway cannot be reached for `timeout` seconds,
    or if an answer takes as long, and at least ten seconds.

    Raises:
        ConfigError: an address of another form, no gateway there, or another token.
    """
    gateway = _authenticate(address, token)
    detect_loss(gateway, timeout)
    gateway.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    gateway.settimeout(max(timeout, PATIENCE))
    return JoinedStore(GatewayStore(gateway))


def _authenticate(address: str, token: str) -> socket.socket:
    """A connection that the gateway has admitted."""
    key = f"replicas.join={address}"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{key}: must be written HOST:PORT, as the run's file meeting has it")
    try:
        gateway = socket.create_connection((host, int(port)), timeout=PATIENCE)
        # The gateway's next bytes are answers, so nothing is left in the buffer of these lines.
        with gateway.makefile("rb") as lines:
            greeting = lines.readline(200).split()
            if len(greeting) != 2 or greeting[0] != b"shardes":
                raise ConfigError(f"{key}: another program than shardes answers there")
            nonce = secrets.token_hex(16).encode()
            gateway.sendall(nonce + b" " + proof(token, "client", greeting[1]) + b"\n")
            answer = lines.readline(200).strip()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{key}: cannot join: {error}; is the run active, with replicas.port set?"
        ) from error
    if not hmac.compare_digest(answer, proof(token, "gateway", nonce)):
        raise ConfigError(
            f"{key}: the token does not match; set {TOKEN} to that run's, or run.dir to its "
            "directory"
        )
    return gateway
