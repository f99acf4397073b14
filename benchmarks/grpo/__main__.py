"""TRL's GRPO beside ES: one base model, one task, the same two cores.

    pip install -e '.[grpo]' && python tools/make_countdown_base.py

    # for S = 0, 1, 2
    python -m benchmarks.grpo train --method es --seed S --seconds 420 --out runs/grpo/es_S
    # for X = 3e-5, 1e-4, 3e-4, 1e-3 and seed 0, then the best X and seeds 1 and 2
    python -m benchmarks.grpo train --method grpo --learning-rate X --seed S --seconds 420 --out runs/grpo/X_S

    python -m benchmarks.grpo table runs/grpo/* --out results/grpo

A run trains, then evaluates models from along the way on the test problems. Its clock starts with
the first step, and evaluations are not in it. DIR/run.json is written anew after each evaluation;
`evaluate DIR` goes on where a killed one stopped. `taskset -c 0,1` keeps a run to two cores.
"""  # noqa: E501

import argparse
import sys
from pathlib import Path

from benchmarks.grpo.table import best_settings, read_runs, write_results


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.grpo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model, and evaluate it along the way")
    train.add_argument("--method", choices=("es", "grpo"), required=True)
    train.add_argument("--seed", type=int, required=True)
    train.add_argument("--seconds", type=float, required=True, help="of training")
    train.add_argument(
        "--config",
        type=Path,
        default=Path("configs/countdown_small.yaml"),
        help="of the ES run, with model and task of both; default: %(default)s",
    )
    train.add_argument("--learning-rate", type=float, help="of GRPO")
    train.add_argument(
        "--responses", type=int, default=64, help="of a step of GRPO; default: %(default)s"
    )
    train.add_argument("--out", metavar="DIR", type=Path, required=True, help="created")
    evaluate = commands.add_parser("evaluate", help="evaluate what a killed run has left")
    evaluate.add_argument("out", metavar="DIR", type=Path)
    best = commands.add_parser(
        "best", help="print learning rate and responses of the best GRPO run"
    )
    best.add_argument("runs", metavar="DIR", type=Path, nargs="+")
    table = commands.add_parser("table", help="write the tables and the figure")
    table.add_argument("runs", metavar="DIR", type=Path, nargs="+")
    table.add_argument("--out", metavar="DIR", type=Path, default=Path("results/grpo"))
    return parser


def main(argv: list[str]) -> int:
    commands = parser()
    options = commands.parse_args(argv)
    if options.command == "train":
        if (options.method == "grpo") != (options.learning_rate is not None):
            commands.error("--learning-rate: required for --method grpo, and only there")
        if options.out.exists():
            commands.error(f"--out {options.out}: exists already")
    if options.command in ("train", "evaluate"):
        # They import torch, which the tables do without.
        from benchmarks.grpo import evaluation, runs

        if options.command == "train":
            rate = options.learning_rate
            grpo = dict(learning_rate=rate, responses=options.responses) if rate else {}
            settings = options.method, options.config, options.seed, options.seconds
            report = runs.train(*settings, grpo, options.out)
            evaluation.write_report(options.out, report)
        evaluation.evaluate(options.out)
    elif options.command == "best":
        print(*best_settings(read_runs(options.runs)))
    else:
        print(write_results(options.runs, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
