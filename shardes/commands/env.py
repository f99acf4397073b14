"""Print versions, host, devices and environment variables for a bug report. Secrets are hidden.

shardes env
"""

from shardes.commands.arguments import CommandParser, reports_errors
from shardes.distributed import environment
from shardes.reporting.system_info import system_info


@reports_errors
def main(argv: list[str]) -> int:
    CommandParser("env", __doc__).parse_args(argv)
    info = system_info()
    lines = {name: version for name, version in info["versions"].items()}
    lines |= {
        "CUDA of torch": info["cuda"] or "none",
        "GPUs": ", ".join(info["devices"]) or "none",
    }
    lines |= {"host": info["host"], "system": info["system"], "cores": info["cores"]}
    lines["memory"] = f"{info['memory_bytes'] / 1e9:.1f} GB"
    for name, value in (lines | info["environment"]).items():
        print(f"{name:<28} {value}")
    return 0


if __name__ == "__main__":
    environment.run(main)
