"""The door of a run: where replicas of other launches reach the store in which all replicas meet.

torch's store answers whoever can connect to it. So the run's home listens at an address of its own, lets in who knows
the run's token, and relays what they and the store say to each other. Each side proves that it knows the token by an
HMAC over the other's fresh nonce; the token itself never crosses. What crosses afterwards is not encrypted: between
sites, put an SSH tunnel or a VPN around it.
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

from shardes.config import ConfigError

TOKEN = "SHARDES_TOKEN"  # the environment variable
PATIENCE = 10.0  # seconds that either side waits for the other's next word
CONNECTING = 30.0  # seconds for torch's client, which asks for its peer's name: a name service may stall for five
CHUNK = 1 << 16


def token_of(run: Path, make: bool = False) -> str:
    """The run's token: from the environment, or the file `token` in the run's directory, made anew if asked.

    Raises:
        ConfigError: there is none.
    """
    if os.environ.get(TOKEN):
        return os.environ[TOKEN]
    file = run / "token"
    if make and not file.exists():
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as opened:
            opened.write(secrets.token_urlsafe(32) + "\n")
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"replicas.join: no token: set {TOKEN}, or run.dir={run} to the run's own directory ({error})"
        ) from error


def _proof(token: str, side: str, nonce: str) -> str:
    return hmac.new(token.encode(), f"shardes {side} {nonce}".encode(), hashlib.sha256).hexdigest()


class Door:
    """Listens at `host`:`port` (None: all interfaces; 0: a free port), in a thread, and relays to the TCPStore `store`.

    `room` is the prefix of the run's keys there, which guests are told. A guest that cannot be reached for `timeout`
    seconds is cut off.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, host: str | None, port: int, token: str, store: dist.TCPStore, room: str, timeout: float):
        self._token, self._room, self._store, self._timeout = token, room, (store.host, store.port), timeout
        try:
            self._socket = socket.create_server((host or "", port), backlog=1024)
        except OSError as error:
            raise ConfigError(
                f"replicas.port={port}: cannot listen there{f' on {host}' if host else ''}: {error.strerror}; "
                "choose another, or 0 for a free one"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let nobody in any more, and cut off who is in."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._welcome, sock=self._socket))
        self._loop.run_forever()
        server.close()
        guests = asyncio.all_tasks(self._loop)
        for guest in guests:
            guest.cancel()
        self._loop.run_until_complete(asyncio.gather(*guests, return_exceptions=True))
        self._loop.close()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError, asyncio.TimeoutError, asyncio.CancelledError):
            try:
                _notice_silence(writer.get_extra_info("socket"), self._timeout)
                nonce = secrets.token_hex(16)
                writer.write(f"shardes {nonce}\n".encode())
                said = await asyncio.wait_for(reader.readline(), PATIENCE)
                theirs, proof = said.decode().split()
                if not hmac.compare_digest(proof, _proof(self._token, "guest", nonce)):
                    writer.write(b"refused\n")
                    return
                writer.write(f"{_proof(self._token, 'home', theirs)} {self._room}\n".encode())
                inner, outer = await asyncio.open_connection(*self._store)
                try:
                    await asyncio.gather(_pass(reader, outer), _pass(inner, writer))
                finally:
                    outer.close()
            finally:
                writer.close()


def _notice_silence(connection: socket.socket, seconds: float) -> None:
    """Let a connection fail whose other end cannot be reached for so many seconds; TCP itself would wait for hours."""
    between = max(int(seconds / 4), 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, between)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))


async def _pass(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK):
        target.write(data)
        await target.drain()
    target.close()


def enter(address: str, token: str, timeout: float) -> dist.Store:
    """A connection to the run's store, through the door at `address`, written HOST:PORT.

    An answer that takes longer than `timeout` seconds, or a door that cannot be reached for so long, raises torch's
    DistError.

    Raises:
        ConfigError: no address, nobody there, no door, or the token does not fit.
    """
    outside, room = _knock(address, token)
    _notice_silence(outside, timeout)
    # torch's client wants a port to connect to: for one connection, this one leads to the door.
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listening:

        def relay() -> None:
            inside, _ = listening.accept()
            for source, target in ((inside, outside), (outside, inside)):
                # torch sends a request in pieces; the second would wait 40 ms for the first one's acknowledgement.
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pump, args=(source, target), daemon=True).start()

        waiting = threading.Thread(target=relay, daemon=True)
        waiting.start()
        port, limit = listening.getsockname()[1], timedelta(seconds=max(timeout, CONNECTING))
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
        store.set_timeout(timedelta(seconds=timeout))
        waiting.join()
    return dist.PrefixStore(room, store)


def _knock(address: str, token: str) -> tuple[socket.socket, str]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"replicas.join={address}: must be written HOST:PORT, as the run's file meeting has it")
    try:
        outside = socket.create_connection((host, int(port)), timeout=PATIENCE)
        with outside.makefile("rb") as heard:
            greeting = heard.readline(200).decode().split()
            if len(greeting) != 2 or greeting[0] != "shardes":
                raise ConfigError(f"replicas.join={address}: what answers there is no run of shardes")
            nonce = secrets.token_hex(16)
            outside.sendall(f"{nonce} {_proof(token, 'guest', greeting[1])}\n".encode())
            answer = heard.readline(200).decode().split()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"replicas.join={address}: nobody lets this replica in: {error}; is the run going, with replicas.port set?"
        ) from error
    if len(answer) != 2 or not hmac.compare_digest(answer[0], _proof(token, "home", nonce)):
        raise ConfigError(
            f"replicas.join={address}: the token does not fit; set {TOKEN} to that run's, or run.dir to its directory"
        )
    outside.settimeout(None)
    return outside, answer[1]


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
