"""List the configs that come with shardes, with what each is for.

    shardes configs

`shardes init DIR NAME` copies one.
"""

from shardes.commands.arguments import CommandParser, reports_errors
from shardes.config.shipped import shipped_configs, summary
from shardes.distributed import environment
from shardes.errors import unusable_files


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    CommandParser("configs", __doc__).parse_args(argv)
    configs = shipped_configs()
    width = max(map(len, configs), default=0)
    for name, file in configs.items():
        print(f"{name:<{width}}  {summary(file)}")
    return 0


if __name__ == "__main__":
    environment.run(main)
