"""The command ``nmp``: record, replay and score, without any ROS process."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import nmp
from nmp.errors import NmpError


@dataclass(frozen=True)
class Command:
    """A subcommand, imported only when it is the one that was asked for: ``nmp --help`` stays instant."""

    help: str
    module: str
    arguments: str = "add_arguments"
    """function of ``module`` that declares the arguments on a parser"""
    run: str = "run"
    """function of ``module`` that takes the parsed arguments"""


COMMANDS = {
    "bag": Command("turn a nuScenes scene into a rosbag2", "nmp.bags.nuscenes_to_bag"),
    "map": Command("map a recorded drive, as fast as it goes, without DDS", "nmp.replay"),
    "eval": Command("score layers against the map expansion (IoU)", "nmp.evaluation"),
    "vectors": Command("make one vector map of a city from layers", "nmp.vectors.command"),
    "view": Command("look at a drive in a browser", "nmp.view.command"),
    "prior": Command("look after a stored city: log, merge, roll back, compact, verify, draw", "nmp.prior.commands"),
    "truth": Command("draw ground-truth layers at any poses", "nmp.evaluation", "add_truth_arguments", "run_truth"),
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for these arguments; only the subcommand that ``argv`` names is filled in."""
    parser = argparse.ArgumentParser(prog="nmp", description="An online neural map: cameras and pose in, layers out.")
    parser.add_argument("--version", action="version", version=f"nmp {nmp.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((a for a in argv if not a.startswith("-")), None)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=f"{command.help.capitalize()}.")
        if name == chosen:
            module = import_module(command.module)
            getattr(module, command.arguments)(subparser)
            subparser.set_defaults(run=getattr(module, command.run))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = build_parser(argv).parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except NmpError as error:
        print(f"nmp: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("nmp: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
