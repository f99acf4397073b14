"""Write a run's report: one HTML page that needs nothing else, neither a network nor JavaScript.

    shardes report RUN_DIR [--out FILE]

The page has the run's curves, its settings and layout, times, samples from before and after, the
environment of each start, and resumptions. It works for runs that are still under way, and for a
directory that has a probe (`shardes probe`) and no run yet. Examples:

    shardes report runs/mine                      writes runs/mine/report.html
    shardes report runs/mine --out mine.html
"""

import sys

from shardes.commands.arguments import CommandParser, path, reports_errors
from shardes.distributed import environment
from shardes.errors import ConfigError, unusable_files
from shardes.reporting.report import Run, render, render_probe


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    parser = CommandParser("report", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=path)
    parser.add_argument(
        "--out", metavar="FILE", type=path, help="default: report.html in the run directory"
    )
    options = parser.parse_args(argv)
    out = options.out or options.run / "report.html"
    text = render_probe(options.run)
    if text is None:
        run = Run(options.run)
        for warning in run.warnings:
            print(warning, file=sys.stderr)
        text = render(run)
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
