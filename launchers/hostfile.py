"""Write deepspeed's hostfile for a SLURM job, or check one before it is used.

    python launchers/hostfile.py write HOSTFILE --slots N
    python launchers/hostfile.py check HOSTFILE [CONFIG.yaml [key=value ...]]

deepspeed runs on one host alone, with a mere warning, where it finds no hostfile. Exit codes: 0 all is well, 2 your
mistake.
"""

import argparse
import sys
from pathlib import Path

from shardes import settings
from shardes.config import ConfigError
from shardes.hosts import parse_hostfile, read_hostfile, slurm_hosts


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="the nodes of this SLURM job")
    check = commands.add_parser("check", help="lines, slots, and whether the ranks divide into replicas")
    for command in (write, check):
        command.add_argument("hostfile")
    write.add_argument("--slots", type=int, required=True, help="ranks on each node")
    check.add_argument("config", metavar="CONFIG.yaml", nargs="?")
    check.add_argument("overrides", metavar="key=value", nargs="*")
    return parser


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
                settings.check_layout(settings.load(arguments.config, arguments.overrides), sum(hosts.values()))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.hostfile}: {sum(hosts.values())} ranks on {len(hosts)} hosts: {', '.join(hosts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
