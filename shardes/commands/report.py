"""Write a report: one HTML page that needs no network, on which figures can be zoomed.

    shardes report RUN_DIR [RUN_DIR ...] [--out FILE]

The page of a run has answers from before and after, its curves, times, settings and layout, the
environment of each start, and resumptions. It works for runs that are still under way, and for a
directory that has a probe (`shardes probe`) and no run yet. The page of several runs compares their
answers, curves and settings. Examples:

    shardes report runs/mine                      writes runs/mine/report.html
    shardes report runs/mine --out mine.html
    shardes report runs/seed0 runs/seed1          writes report.html here
"""

import sys
from pathlib import Path

from shardes.commands.arguments import CommandParser, path, reports_errors
from shardes.distributed import environment
from shardes.errors import ConfigError, unusable_files
from shardes.reporting.report import render, render_probe
from shardes.reporting.run_directory import RunContents


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    parser = CommandParser("report", __doc__)
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", type=path)
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=path,
        help="default: report.html in the run directory; of several runs, in this one",
    )
    options = parser.parse_args(argv)
    single = len(options.runs) == 1
    out = options.out or (options.runs[0] if single else Path()) / "report.html"
    text = render_probe(options.runs[0]) if single else None
    if text is None:
        runs = [RunContents(directory) for directory in options.runs]
        for warning in (line for run in runs for line in run.warnings):
            print(warning, file=sys.stderr)
        text = render(runs)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written: {error}; choose another place with --out"
        ) from error
    print(out)
    return 0


if __name__ == "__main__":
    environment.run(main)
