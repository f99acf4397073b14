"""A port for the store of a job whose ranks all run on this host."""

import random
import socket
from contextlib import suppress

from shardes.errors import RunError


def free_port() -> int:
    """A port of this host on which no process listens, outside the range of ephemeral ports."""
    for port in random.SystemRandom().sample(range(15000, 32768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RunError("this host has no free port among 100 tried between 15000 and 32767")
