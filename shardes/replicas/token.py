"""The token of a run: who knows it may join."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from shardes.errors import ConfigError, RunError
from shardes.storage.files import write_whole

TOKEN = "SHARDES_TOKEN"  # environment variable
SHORTEST = 16  # characters


def run_token(run: Path, create: bool = False) -> str:
    """The run's token: from the environment, or from the file `token` in the run directory.

    Args:
        create: write the file if there is none.

    Raises:
        ConfigError: there is no token, or it is too short to be one.
        RunError: the file cannot be written.
    """
    if TOKEN in os.environ:
        return _checked(os.environ[TOKEN].strip(), TOKEN, "set a longer one, or none")
    file = run / "token"
    try:
        if create and not file.exists():
            write_whole(file, secrets.token_urlsafe(32) + "\n", mode=0o600)
    except OSError as error:
        raise RunError(f"replicas.port: cannot write {file}: {error.strerror}") from error
    try:
        token = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"replicas.join: no token: set {TOKEN}, or run.dir={run} to the run's own directory "
            f"({error})"
        ) from error
    return _checked(token, str(file), "it is damaged; delete it, and start the primary job again")


def _checked(token: str, where: str, advice: str) -> str:
    if len(token) < SHORTEST:
        raise ConfigError(
            f"{where}: a token has at least {SHORTEST} characters, this one {len(token)}; {advice}"
        )
    return token


def proof(token: str, side: str, nonce: bytes) -> bytes:
    """What only who knows the token can say about a nonce; each side says another thing."""
    message = f"shardes {side} ".encode() + nonce
    key = token.encode(errors="surrogateescape")  # as the environment has it
    return hmac.new(key, message, hashlib.sha256).hexdigest().encode()
