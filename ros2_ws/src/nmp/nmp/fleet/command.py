"""The command ``nmp prior build``: cities from many recorded drives."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nmp.errors import NmpError
from nmp.prior.storage import place_of
from nmp.prior.upkeep import HORIZON_DAYS


def add_arguments(actions: Any) -> None:
    """Declare ``nmp prior build`` among the actions of ``nmp prior``."""
    text = "build cities from many recorded drives, on several workers"
    sub = actions.add_parser("build", help=text, description=f"{text.capitalize()}.")
    sub.add_argument("bags", nargs="+", type=Path, metavar="BAG", help="bag folders, .mcap or .db3 files")
    sub.add_argument("--prior", type=place_of, required=True, metavar="DIR", help="folder or URL of the cities")
    sub.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors file (default: the shipped network)")
    sub.add_argument("--location", default="", help="the city, if the bags name none (e.g. boston-seaport)")
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="more than 1 need Ray (default: %(default)s)")
    sub.add_argument("--address", default="", metavar="RAY_ADDRESS", help="of a Ray cluster (default: this machine)")
    sub.add_argument(
        "--threads",
        type=int,
        help="CPU threads of a worker; the same number gives the same bytes (default: that of nmp map)",
    )
    sub.add_argument("--skip-bad", action="store_true", help="go on without bags of which nothing can be made")
    sub.add_argument(
        "--compact",
        type=float,
        nargs="?",
        const=HORIZON_DAYS,
        metavar="DAYS",
        help=f"then compact the cities: drives so much older than the newest one (default: {HORIZON_DAYS:g})",
    )
    sub.set_defaults(act=run)


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp prior build``."""
    for name in ("workers", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise NmpError(f"--{name} is {value}: give at least 1")
    if args.compact is not None and not args.compact >= 0:
        raise NmpError(f"--compact is {args.compact} days: give 0 or more")
    # not above: the other actions of nmp prior need none of it
    from nmp.fleet.build import build
    from nmp.replay import THREADS

    built = build(
        args.bags,
        args.prior,
        weights=args.weights,
        location=args.location,
        count=args.workers,
        address=args.address,
        threads=args.threads or THREADS,
        skip_bad=args.skip_bad,
        compact_days=args.compact,
    )
    for bag, problem in sorted(built.bad.items()):
        print(f"left out {bag}: {problem}")
    if built.late:
        print(
            f"{built.late} drives are older than what the city held where they pass; for what all drives give in the "
            "order of time, build into a new folder"
        )
    print(
        f"{args.prior}: {built.drives} drives came in ({built.frames} frames in {built.seconds:.1f} s, {built.dropped} "
        f"dropped), {built.known} were known; more than {built.speedup:.1f} workers make no difference"
    )
    if args.compact is not None:
        print(f"{built.compacted} drives were folded into the bases of their cities")
