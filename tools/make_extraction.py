"""Make the data of the task extraction: sentences about people, and the facts that they hold.

    python tools/make_extraction.py OUT_DIR [--train 200] [--test 100] [--seed 0]

Writes OUT_DIR/extraction_train.jsonl and OUT_DIR/extraction_test.jsonl: lines of {text, facts}.
The people, jobs and cities of one file are not in the other, and half of the test's sentences have
a form that no training sentence has. The same arguments give the same files.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

WORDS = {
    "train": {
        "first": "Ana Ben Carla David Elena Felix Grace Hugo Irene Jonas Karin Liam Marta Noah "
        "Olga Pedro Quinn Rosa Samir Teresa Umar Vera Walter Yusuf",
        "last": "Alvarez Becker Costa Duarte Evans Ferrari Garcia Hansen Ivanov Jansen Kowalski "
        "Laurent Moreau Novak Olsen Petrov Quintero Romano Schmidt Tanaka Varga Weber Young Zhang",
        "job": "nurse,plumber,pilot,dentist,farmer,waiter,lawyer,carpenter,tailor,painter,judge,"
        "history teacher,truck driver,bank clerk,software engineer,piano teacher",
        "city": "Lisbon,Leeds,Oslo,Rome,Madrid,Berlin,Prague,Dublin,Boston,Denver,Kyoto,Nairobi,"
        "Cape Town,New York,Santiago,Toronto",
    },
    "test": {
        "first": "Ava Bruno Clara Dario Emma Frank Hanna Ivan Julia Kevin Laura Marco Nina Oscar "
        "Paula Tom",
        "last": "Baker Castro Dahl Fischer Greco Hughes Jensen Keller Lopez Murphy Nilsson Perez "
        "Reyes Rossi Silva Walker",
        "job": "teacher,baker,butcher,firefighter,librarian,gardener,mechanic,surgeon,bus driver,"
        "math teacher",
        "city": "Paris,Vienna,Athens,Chicago,Helsinki,Lima,Warsaw,Seattle,Hong Kong,San Diego",
    },
}
FORMS = [  # of both files
    "{name} is a {age}-year-old {job} from {city}.",
    "{name}, {age}, works as a {job} in {city}.",
    "In {city} lives {name}, a {job} aged {age}.",
    "At {age}, {name} is already a {job} in {city}.",
    "The {job} {name} is {age} years old and lives in {city}.",
    "{city} is home to {name}, who is {age} and a {job}.",
]
TEST_FORMS = [
    "Our new {job} in {city} is {name}, aged {age}.",
    "{name} turned {age} this year and still works in {city} as a {job}.",
    "Meet {name}: {job}, {age}, from {city}.",
    "Born in {city} {age} years ago, {name} became a {job}.",
]


def people(rng: random.Random, words: dict[str, str], forms: list[str]) -> Iterator[dict]:
    """Yield rows endlessly, each of another person."""
    first, last = words["first"].split(), words["last"].split()
    jobs, cities = words["job"].split(","), words["city"].split(",")
    names = [f"{a} {b}" for a in first for b in last]
    rng.shuffle(names)
    for number, name in enumerate(names):
        facts = dict(
            name=name, age=rng.randint(19, 69), job=rng.choice(jobs), city=rng.choice(cities)
        )
        yield dict(text=forms[number % len(forms)].format(**facts), facts=facts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="tools/make_extraction.py",
    )
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    for name, count in (("train", 200), ("test", 100)):
        words = WORDS[name]
        most = len(words["first"].split()) * len(words["last"].split())
        parser.add_argument(
            f"--{name}",
            type=int,
            default=count,
            choices=range(1, most + 1),
            metavar="COUNT",
            help=f"sentences, at most {most}; default: %(default)s",
        )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    # Test sentences alternate between the forms of training and their own.
    mixed = [form for pair in zip(FORMS, TEST_FORMS, strict=False) for form in pair]
    for name, forms in (("train", FORMS), ("test", mixed)):
        rng = random.Random(f"{options.seed} {name}")
        rows = islice(people(rng, WORDS[name], forms), getattr(options, name))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / f"extraction_{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{options.out}: {options.train} sentences for training, {options.test} for testing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
