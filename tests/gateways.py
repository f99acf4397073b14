"""What the gateways of the tests permit, and what they are asked nevertheless."""

import re

from shardes.replicas import protocol
from shardes.replicas.validation import ResultLimits

SECRET = "a token of the test"
LIMITS = ResultLimits(
    members=4, prompts=3, scores=False, new_tokens=5, vocabulary=100, evaluation=(2, 1)
)
OPERATIONS = (
    *("set", "get", "add", "check", "compare_set", "delete_key", "append", "wait", "num_keys"),
    "records",
    *("multi_set", "queue_push", "", "SET", "__class__"),
)
GARBAGE = ("", "x", "0", "-1", "7", "1:[0.5]", 0, 1, -1, 10**30, 0.5, True, None, [], ["x"], {})
VALUES = [
    [],
    *([value] for value in GARBAGE),
    *([one, other] for one in ("", "x", "0", "-1") for other in ("", "x", "0", "7:[0.5]", 1)),
    ["", "", ""],
]


def key_table() -> list[str]:
    """The keys in the table of `replicas.protocol`."""
    keys = re.findall(r"^\| `([^`]+)` \|", protocol.__doc__, re.MULTILINE)
    assert len(keys) == 14, keys
    return keys


def concrete(key: str, own: int) -> list[str]:
    """Keys of one row: the replica's own and others', of each kind of queue, of pieces that are and
    are not there.
    """
    keys = [key]
    for letter, names in {
        "K": (str(own), "0", "-1", "999999998", "٣", "x"),
        "Q": ("iteration 0", "evaluation 0", "iteration 1", "iteration 99", "evaluation", "x 0"),
        "N": ("0", "3", "4", "-1", "x"),
        "R": ("0",),
        "T": ("0", "1", "99", "-1", "x"),
    }.items():
        pattern = rf"\b{letter}\b"
        keys = [
            re.sub(pattern, name, found)
            for found in keys
            for name in (names if re.search(pattern, found) else names[:1])
        ]
    return keys


def forgeries(own: int) -> list[list]:
    """Every operation on every key with every garbage."""
    return [
        [operation, key, *values]
        for row in key_table()
        for key in concrete(row, own)
        for operation in OPERATIONS
        for values in VALUES + [[*before, str(own)] for before in ([], [""], ["0"], ["-1"], ["x"])]
    ]
