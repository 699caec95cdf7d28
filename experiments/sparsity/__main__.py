"""Zeros and accuracy, way by way: runs, tables, plots.

    python -m experiments.sparsity run          # all comparisons; those whose results are there are not run again
    python -m experiments.sparsity tables       # prints the tables, and renews those of docs/minibatch.md
    python -m experiments.sparsity plot         # draws docs/pictures/sparsity-*.png
    python -m experiments.sparsity strengths    # by lambda: the prox, the penalty in the loss, "decoupled"
    python -m experiments.sparsity survivors    # where the weights are that are left

It measures no time. One process, one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from . import report, runner, strengths, survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="some forty minutes on one core")
    run.add_argument("--only", nargs="+", metavar="NAME", help="these comparisons alone, such as digits-Adam")
    run.add_argument("--sanity", action="store_true", help="the problems on which nothing was chosen")
    run.add_argument("--results", type=Path, default=runner.RESULTS, help="(default: %(default)s)")
    commands.add_parser("tables")
    commands.add_parser("plot")
    commands.add_parser("strengths", help="some five minutes")
    commands.add_parser("survivors", help="some two minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    if arguments.command == "run":
        comparisons = runner.SANITY if arguments.sanity else runner.COMPARISONS
        known = [each.name for each in comparisons]
        if unknown := set(arguments.only or ()) - set(known):
            parser.error(f"no comparison {', '.join(sorted(unknown))} (allowed: {', '.join(known)})")
        runner.run_all(
            tuple(each for each in comparisons if not arguments.only or each.name in arguments.only), arguments.results
        )
    elif arguments.command == "strengths":
        strengths.run_all()
    elif arguments.command == "survivors":
        survivors.run_all()
    elif arguments.command == "plot":
        report.plot()
    else:
        tables = report.tables()
        for name, table in tables.items():
            print(f"{name}: {report.TITLES.get(name.partition('-')[0], 'digits, by lambda')}\n\n{table}\n")
        for share, mean in report.means("digits", "metric", runner.read()).items():
            print(f"digits, Adam, target sparsity of {share:.0%}: {mean:.2%} in the mean")
        report.PAGE.write_text(report.renewed(report.PAGE.read_text(), tables))
    print(f"{(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
