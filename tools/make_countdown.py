"""Make Countdown problems, solvable by construction, for training and for testing.

    python tools/make_countdown.py OUT_DIR [--train 200] [--test 2000] [--numbers 3 4]
        [--largest 99] [--seed 0]

Writes OUT_DIR/train.json and OUT_DIR/test.json: lists of {id, context, numbers, target, solution}.
All problems of both files differ in their numbers or target. The same arguments give the same
files.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from shardes.tasks.countdown import evaluate, prompt

LARGEST_TARGET = 1000


def solution(rng: random.Random, numbers: list[int]) -> str:
    """A random expression of all numbers, in random order."""
    parts = [str(number) for number in rng.sample(numbers, len(numbers))]
    while len(parts) > 1:
        at = rng.randrange(len(parts) - 1)
        joined = f"{parts[at]} {rng.choice('+-*/')} {parts[at + 1]}"
        parts[at : at + 2] = [f"({joined})" if len(parts) > 2 else joined]
    return parts[0]


def problems(seed: int, counts: list[int], largest: int) -> Iterator[dict]:
    """Yield distinct problems, endlessly, with one of `counts` numbers, each up to `largest`."""
    rng, seen = random.Random(seed), set()
    while True:
        numbers = [rng.randint(1, largest) for _ in range(rng.choice(counts))]
        expression = solution(rng, numbers)
        try:
            value = evaluate(expression, numbers)
        except ZeroDivisionError:
            continue
        key = (tuple(sorted(numbers)), value)
        if value.denominator != 1 or not 1 <= value <= LARGEST_TARGET or key in seen:
            continue
        seen.add(key)
        context = prompt(numbers, int(value))
        yield dict(
            id=len(seen) - 1,
            context=context,
            numbers=numbers,
            target=str(value),
            solution=expression,
        )


def write(file: Path, problems: Iterable[dict]) -> None:
    """Write a JSON list, one problem per line."""
    file.write_text("[\n" + ",\n".join(map(json.dumps, problems)) + "\n]\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="tools/make_countdown.py",
    )
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument(
        "--train", type=int, default=200, help="training problems; default: %(default)s"
    )
    parser.add_argument(
        "--test", type=int, default=2000, help="test problems; default: %(default)s"
    )
    parser.add_argument(
        "--numbers", type=int, nargs="+", default=[3, 4], help="numbers per problem; default: 3 4"
    )
    parser.add_argument(
        "--largest", type=int, default=99, help="largest number; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    if min(options.train, options.test, options.largest) < 1 or min(options.numbers) < 2:
        parser.error("--train, --test and --largest must be at least 1, --numbers at least 2")
    if max(options.numbers) == 2 and options.train + options.test > options.largest**2 // 4:
        parser.error(f"there are too few problems of two numbers up to {options.largest}")
    options.out.mkdir(parents=True, exist_ok=True)
    made = problems(options.seed, options.numbers, options.largest)
    for name, count in (("train", options.train), ("test", options.test)):
        write(options.out / f"{name}.json", islice(made, count))
    print(f"{options.out}: {options.train} problems for training, {options.test} for testing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
