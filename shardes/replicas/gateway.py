"""The gateway through which replicas of other jobs reach the run's store.

torch's store answers every connection. So the primary job listens at an address of its own, admits
clients that know the run's token, and relays their connections to the store. Client and gateway
each prove that they know the token by an HMAC over the other's fresh nonce; the token never crosses
the network. What crosses afterwards is not encrypted: use an SSH tunnel or a VPN between sites.
"""

import asyncio
import hashlib
import hmac
import os
import secrets
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from shardes.errors import ConfigError
from shardes.replicas.protocol import RunStore

TOKEN = "SHARDES_TOKEN"  # environment variable
PATIENCE = 10.0  # seconds that either side waits for the other's next line
CONNECTING = 30.0  # seconds for torch's client, which looks up its peer's name: that may take five
CHUNK = 1 << 16


def run_token(run: Path, create: bool = False) -> str:
    """The run's token: from the environment, or from the file `token` in the run directory.

    Args:
        create: write the file if there is none.

    Raises:
        ConfigError: there is no token.
    """
    if os.environ.get(TOKEN):
        return os.environ[TOKEN]
    file = run / "token"
    if create and not file.exists():
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as opened:
            opened.write(secrets.token_urlsafe(32) + "\n")
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"replicas.join: no token: set {TOKEN}, or run.dir={run} to the run's own directory "
            f"({error})"
        ) from error


def _proof(token: str, side: str, nonce: str) -> str:
    message = f"shardes {side} {nonce}".encode()
    return hmac.new(token.encode(), message, hashlib.sha256).hexdigest()


class StoreGateway:
    """Listens in a thread and relays clients to the run's store.

    Args:
        host: the address to listen at; None: all interfaces.
        port: 0: a free one.
        store: its prefix is told to clients.
        timeout: seconds after which a client that cannot be reached is disconnected.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, host: str | None, port: int, token: str, store: RunStore, timeout: float):
        server = store.tcp_store
        self._token, self._prefix, self._timeout = token, store.prefix, timeout
        self._store_address = (server.host, server.port)
        try:
            self._socket = socket.create_server((host or "", port), backlog=1024)
        except OSError as error:
            address = f" on {host}" if host else ""
            raise ConfigError(
                f"replicas.port={port}: cannot listen there{address}: {error.strerror}; "
                "choose another, or 0 for a free one"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Admit no more clients, and disconnect those that are connected."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._handle_client, sock=self._socket)
        )
        self._loop.run_forever()
        server.close()
        clients = asyncio.all_tasks(self._loop)
        for client in clients:
            client.cancel()
        self._loop.run_until_complete(asyncio.gather(*clients, return_exceptions=True))
        self._loop.close()

    async def _handle_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError, ValueError, asyncio.TimeoutError, asyncio.CancelledError):
            try:
                _detect_loss(writer.get_extra_info("socket"), self._timeout)
                if not await self._authenticate(reader, writer):
                    writer.write(b"refused\n")
                    return
                store_reader, store_writer = await asyncio.open_connection(*self._store_address)
                try:
                    await asyncio.gather(_relay(reader, store_writer), _relay(store_reader, writer))
                finally:
                    store_writer.close()
            finally:
                writer.close()

    async def _authenticate(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the client knows the token; if so, send it the gateway's proof and the prefix."""
        nonce = secrets.token_hex(16)
        writer.write(f"shardes {nonce}\n".encode())
        line = await asyncio.wait_for(reader.readline(), PATIENCE)
        client_nonce, proof = line.decode().split()
        if not hmac.compare_digest(proof, _proof(self._token, "client", nonce)):
            return False
        answer = f"{_proof(self._token, 'gateway', client_nonce)} {self._prefix}\n"
        writer.write(answer.encode())
        return True


def _detect_loss(connection: socket.socket, seconds: float) -> None:
    """Let a connection fail whose other end is unreachable for so long; by default TCP waits for
    hours.
    """
    interval = max(int(seconds / 4), 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))


async def _relay(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK):
        target.write(data)
        await target.drain()
    target.close()


def connect(address: str, token: str, timeout: float) -> RunStore:
    """A connection to the run's store through the gateway at `address`, written HOST:PORT.

    Later requests raise torch's DistError if an answer takes longer than `timeout` seconds, or if
    the gateway cannot be reached for so long.

    Raises:
        ConfigError: an address of another form, no gateway there, or another token.
    """
    gateway, prefix = _authenticate(address, token)
    _detect_loss(gateway, timeout)
    # torch's client connects to a port, so a local one leads to the gateway, for one connection.
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:

        def accept() -> None:
            client, _ = listener.accept()
            for source, target in ((client, gateway), (gateway, client)):
                # torch sends a request in pieces: Nagle's algorithm would delay the second by 40
                # ms.
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pump, args=(source, target), daemon=True).start()

        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        port, limit = listener.getsockname()[1], timedelta(seconds=max(timeout, CONNECTING))
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit
        )
        store.set_timeout(timedelta(seconds=timeout))
        acceptor.join()
    return RunStore(store, prefix)


def _authenticate(address: str, token: str) -> tuple[socket.socket, str]:
    """A connection that the gateway has admitted, and the prefix of the run's keys."""
    key = f"replicas.join={address}"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{key}: must be written HOST:PORT, as the run's file meeting has it")
    try:
        gateway = socket.create_connection((host, int(port)), timeout=PATIENCE)
        with gateway.makefile("rb") as lines:
            greeting = lines.readline(200).decode().split()
            if len(greeting) != 2 or greeting[0] != "shardes":
                raise ConfigError(f"{key}: another program than shardes answers there")
            nonce = secrets.token_hex(16)
            gateway.sendall(f"{nonce} {_proof(token, 'client', greeting[1])}\n".encode())
            answer = lines.readline(200).decode().split()
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: cannot join: {error}; is the run active, with replicas.port set?"
        ) from error
    if len(answer) != 2 or not hmac.compare_digest(answer[0], _proof(token, "gateway", nonce)):
        raise ConfigError(
            f"{key}: the token does not match; set {TOKEN} to that run's, or run.dir to its "
            "directory"
        )
    gateway.settimeout(None)
    return gateway, answer[1]


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
