"""Words of messages."""


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 replica", "2 replicas"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
