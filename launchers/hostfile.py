"""Write deepspeed's hostfile for a SLURM job, or check one before it is used.

    python launchers/hostfile.py write HOSTFILE --slots N
    python launchers/hostfile.py check HOSTFILE [CONFIG.yaml [key=value ...]]

Without a hostfile, deepspeed only warns and runs on one host. Exit codes: 0 the hostfile is valid,
2 it is not, or it cannot be read or written.
"""

import argparse
import sys
from pathlib import Path

from shardes.commands.arguments import reports_errors
from shardes.config import loading
from shardes.distributed.hosts import parse_hostfile, read_hostfile, slurm_hosts
from shardes.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="the nodes of this SLURM job")
    check = commands.add_parser(
        "check", help="lines, slots, and whether the ranks divide into replicas"
    )
    for command in (write, check):
        command.add_argument("hostfile")
    write.add_argument("--slots", type=int, required=True, help="ranks on each node")
    check.add_argument("config", metavar="CONFIG.yaml", nargs="?")
    check.add_argument("overrides", metavar="key=value", nargs="*")
    return parser


@reports_errors
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "write":
            text = "".join(f"{host} slots={arguments.slots}\n" for host in slurm_hosts())
            hosts = parse_hostfile(text, "SLURM's node list")
            Path(arguments.hostfile).write_text(text, encoding="utf-8")
        else:
            hosts = read_hostfile(arguments.hostfile)
            if arguments.config:
                config = loading.load(arguments.config, arguments.overrides)
                loading.check_layout(config, sum(hosts.values()))
    except OSError as error:
        raise ConfigError(str(error)) from error
    ranks = sum(hosts.values())
    print(f"{arguments.hostfile}: {ranks} ranks on {len(hosts)} hosts: {', '.join(hosts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
