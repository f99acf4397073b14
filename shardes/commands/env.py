"""Print what a report of a bug needs: versions, host, devices, environment variables. Secrets are hidden.

shardes env
"""

import sys

from shardes import environment

environment.prepare()

from shardes.about import about  # noqa: E402
from shardes.commands.arguments import Parser  # noqa: E402
from shardes.config import ConfigError  # noqa: E402


def main(argv: list[str]) -> int:
    try:
        Parser("env", __doc__).parse_args(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = about()
    lines = {name: version for name, version in found["versions"].items()}
    lines |= {"CUDA of torch": found["cuda"] or "none", "GPUs": ", ".join(found["devices"]) or "none"}
    lines |= {"host": found["host"], "system": found["system"], "cores": found["cores"]}
    lines["memory"] = f"{found['memory_bytes'] / 1e9:.1f} GB"
    for name, value in (lines | found["environment"]).items():
        print(f"{name:<28} {value}")
    return 0


if __name__ == "__main__":
    environment.run(main)
