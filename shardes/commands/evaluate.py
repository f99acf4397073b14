"""Evaluate a model on a task's prompts: rewards, accuracy, and divergence from its base model.

    shardes evaluate CONFIG.yaml --gpus 2 --model DIR [--base] [--split test ...] [--samples 4]
    deepspeed --num_gpus 2 launchers/evaluate.py CONFIG.yaml --model DIR [options]

CONFIG.yaml is the training run's; its model.path is the base model. DIR is the tuned model: a
snapshot or an export. With --base both answer, and are printed side by side. Every prompt gets the
greedy response and, with --samples n, n responses sampled at temperature 1, each a function of
es.seed, prompt and sample number. On the sampled responses the tuned model is compared with the
base: KL by the k3 estimator (the paper's equation 1), in nats per token. --out FILE holds the
figures with 95 % confidence intervals, and every response.
"""

from os.path import expanduser

from shardes import evaluation, lifecycle
from shardes.commands.arguments import LaunchParser, path
from shardes.distributed import environment
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.world import Job
from shardes.evaluation import PreparedEvaluation
from shardes.reporting.report_file import OUT

EXAMPLES = """examples:
  shardes evaluate configs/quickstart.yaml --model exported
  shardes evaluate configs/quickstart.yaml --model exported --gpus 2 --split train test --samples 4
  deepspeed --num_gpus 2 launchers/evaluate.py configs/quickstart.yaml --model exported
"""
OPTIONS = ("model", "base", "split", "samples", "out")


def parser() -> LaunchParser:
    summary = __doc__.splitlines()[0]
    parser = LaunchParser(
        "evaluate", "[--gpus N] [--model DIR [--base]] [options]", summary, EXAMPLES
    )
    add = parser.add_argument
    help = "the model to evaluate; default: model.path itself"
    add("--model", metavar="DIR", type=expanduser, help=help)
    help = "let the base model answer, too, and print both side by side; needs --model"
    add("--base", action="store_true", help=help)
    add(
        "--split",
        nargs="+",
        default=["test"],
        help="the task's prompts: train, test, names of task.tests; default: test",
    )
    add("--samples", type=int, default=0, help="sampled responses per prompt; default: %(default)s")
    help = f"default: {OUT} in the working directory, with a number if there is one already"
    add("--out", metavar="FILE", type=path, help=help)
    return parser


def prepare(argv: list[str], job: Job) -> PreparedEvaluation:
    arguments, config = parser().read(argv)
    options = {name: getattr(arguments, name) for name in OPTIONS}
    return evaluation.prepare(config, job, **options)


def work(job: Job, prepared: PreparedEvaluation, watcher: ShutdownWatcher) -> None:
    evaluation.work(job, prepared, watcher)
    if job.rank == 0:
        print(f"every response: {prepared.out.path}", flush=True)


def main(argv: list[str]) -> int:
    return lifecycle.launch(argv, parser(), prepare, work)


if __name__ == "__main__":
    environment.run(main)
