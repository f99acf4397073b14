"""The gateway through which replicas of other jobs reach the run's store.

torch's store answers every connection, and every request. So the primary job listens at an address
of its own, admits clients that know the run's token, and makes their requests to the store itself,
as far as `replicas.access` permits them. Client and gateway each prove that they know the token by
an HMAC over the other's fresh nonce; the token never crosses the network. What crosses afterwards
is not encrypted: use an SSH tunnel or a VPN between sites.

After the proofs, each request and each answer is a frame: its length in four bytes, most
significant first, and that many bytes of JSON. The answer to a request that is refused is
{"refused": why}, the last frame of the connection; so is {"damaged": what}, if the run cannot read
its journal. No request waits for anything.
"""

import asyncio
import hmac
import json
import resource
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from shardes.errors import ConfigError
from shardes.replicas.access import ClientAccess, Refused, SharedKeys, Unreadable
from shardes.replicas.protocol import RunStore
from shardes.replicas.token import proof
from shardes.replicas.validation import ResultLimits
from shardes.storage.records import RecordReader

PATIENCE = 10.0  # seconds in which a client must have shown that it knows the token
STRANGERS = 64  # connections that have not yet; of more, the oldest is closed
PAUSE = 0.1  # seconds until the next attempt, if no connection can be accepted
LENGTH = 4  # bytes
FRAME = 1 << 10  # bytes of a request beside its result, at most


class StoreGateway:
    """Listens in a thread and answers clients from the run's store.

    Args:
        host: the address to listen at; None: all interfaces.
        port: 0: a free one.
        limits: what clients may post.
        journal: the file in which clients find the records of finished iterations.
        timeout: seconds after which a client that cannot be reached is disconnected.
        warn: takes a line for the user, from the thread.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(
        self,
        host: str | None,
        port: int,
        token: str,
        store: RunStore,
        limits: ResultLimits,
        journal: Path,
        timeout: float,
        warn: Callable[[str], None],
    ):
        self._token, self._timeout, self._warn = token, timeout, warn
        self._keys = SharedKeys(store.clone(), limits, RecordReader(journal))
        try:
            self._socket = socket.create_server((host or "", port), backlog=1024)
        except OSError as error:
            address = f" on {host}" if host else ""
            raise ConfigError(
                f"replicas.port={port}: cannot listen there{address}: {error.strerror}; "
                "choose another, or 0 for a free one"
            ) from error
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._strangers: list[asyncio.Task] = []  # oldest first
        self._clients: set[asyncio.Task] = set()
        # The run itself needs file descriptors, too.
        self._most_clients = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Admit no more clients, and disconnect those that are connected."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        accepting = self._loop.create_task(self._accept())
        self._loop.run_forever()
        tasks = [accepting, *self._strangers, *self._clients]
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._socket.close()
        self._loop.close()

    async def _accept(self) -> None:
        """Accept one connection at a time: asyncio's server would accept a hundred, and then look
        how many there are.
        """
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._socket)
            except OSError:  # it was closed at once, or file descriptors are scarce
                await asyncio.sleep(PAUSE)
                continue
            if len(self._strangers) == STRANGERS:
                self._strangers.pop(0).cancel()
            task = self._loop.create_task(self._handle(connection))
            self._strangers.append(task)
            task.add_done_callback(self._forget)
            await asyncio.sleep(0)  # lets a task that was cancelled close its connection

    def _forget(self, task: asyncio.Task) -> None:
        self._clients.discard(task)
        if task in self._strangers:
            self._strangers.remove(task)

    async def _handle(self, connection: socket.socket) -> None:
        with suppress(OSError, EOFError, ValueError, asyncio.TimeoutError, dist.DistError):
            try:
                detect_loss(connection, self._timeout)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                reader, writer = await asyncio.open_connection(sock=connection)
            except BaseException:
                connection.close()
                raise
            try:
                admitted = await asyncio.wait_for(self._authenticate(reader, writer), PATIENCE)
                if not admitted:
                    writer.write(b"refused\n")
                elif self._admit():
                    await self._answer(reader, writer)
                else:  # the client reads this as the answer to its first request
                    writer.write(frame({"refused": "one request to join too many"}))
            finally:
                writer.close()

    def _admit(self) -> bool:
        """Count the current task among the clients, unless there are too many."""
        task = asyncio.current_task()
        assert task
        if len(self._clients) >= self._most_clients:
            return False
        if task in self._strangers:
            self._strangers.remove(task)
        self._clients.add(task)
        return True

    async def _authenticate(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the client knows the token; if so, send it the gateway's proof."""
        nonce = secrets.token_hex(16)
        writer.write(f"shardes {nonce}\n".encode())
        client_nonce, given = (await reader.readline()).split()
        if not hmac.compare_digest(given, proof(self._token, "client", nonce.encode())):
            return False
        writer.write(proof(self._token, "gateway", client_nonce) + b"\n")
        return True

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client, longest = ClientAccess(self._keys), FRAME + self._keys.limits.bytes
        try:
            with suppress(dist.DistError):  # the run has ended
                while True:
                    length = int.from_bytes(await reader.readexactly(LENGTH), "big")
                    if length > longest:
                        raise Refused("a request that is too long")
                    request = json.loads(await reader.readexactly(length))
                    writer.write(frame(client.answer(request)))
                    await writer.drain()
        except Unreadable as error:
            self._warn(f"warning: a replica cannot have a record that it needs: {error}")
            writer.write(frame({"damaged": str(error)}))
        except (Refused, RecursionError, ValueError) as error:
            reason = str(error) if isinstance(error, Refused) else "a request that is not JSON"
            client.leave()
            self._report(client, writer, reason)
            writer.write(frame({"refused": reason}))
        finally:
            with suppress(dist.DistError):
                client.leave()

    def _report(self, client: ClientAccess, writer: asyncio.StreamWriter, reason: str) -> None:
        host = (writer.get_extra_info("peername") or ["?"])[0]
        who = "a client" if client.replica is None else f"replica {client.replica}"
        self._warn(
            f"warning: {who} from {host} is excluded and its work given to others; it sent {reason}"
        )


def frame(value: object) -> bytes:
    """A request or an answer, as it crosses the network."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return len(text).to_bytes(LENGTH, "big") + text


def detect_loss(connection: socket.socket, seconds: float) -> None:
    """Let a connection fail whose other end is unreachable for so long; by default TCP waits for
    hours.
    """
    interval = max(int(seconds / 4), 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
