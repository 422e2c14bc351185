"""``nmp-train``: simulate, compare, train, score."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nmp import __version__
from nmp.errors import NmpError

SIM_HELP = """\
Write a simulated data set in the format of nuScenes: images of six cameras, poses, boxes, maps. Loads with the
official devkit and with 'nmp bag'. There are three kinds:

  one city, some routes driven several times (the default):
    nmp-train sim --out data/sim --seed 7 --routes 4 --passes 2
  the bench: a fleet in four cities, 150 scenes of 20 s, with rain and night, streets driven 1 to 6 times in both
  directions, changes of the map on the way, and splits for training and validation in splits.json:
    nmp-train sim --bench --out data/bench --seed 1
    nmp-train sim --bench --scenes 8 --cities 1 --render-scale 0.22 --out data/look       # a quick look
    nmp-train sim --bench --seed 1 --plan --out plan.json             # only the drives, and how they overlap
    nmp-train sim --bench --seed 1 --only scene-0003 --out data/one   # one scene as it is in the whole bench
  recorded drives through the maps of real cities:
    nmp-train sim --maps ~/nuscenes --trajectories drives.json --scenes 20 --out data/mine

The same options and seed give the same data set. A keyframe of six images takes about 250 kB to 1 MB on disk."""

OVERLAP_HELP = """\
Show how often the roads of data sets are driven, how far apart (in metres and in days), and in which direction, side
by side for several of them. A source is a file or folder of trajectories (as for 'nmp-train sim --trajectories'), a
plan ('nmp-train sim --bench --plan') or a nuScenes data root.

  nmp-train overlap drives.json plan.json ~/nuscenes --version v1.0-trainval"""

_MODULES = {
    "fit": "train a network from a YAML configuration",
    "eval": "score weights on a nuScenes data set",
    "splits": "divide the scenes of a data set into training and validation",
    "export": "write weights for the node",
    "search": "measure how exact a network's search for the pose is",
    "coding": "make the coding with which a network's prior is written",
}
"""commands that are modules of their own, each with ``add_arguments`` and ``run``"""
_FILES = {"eval": "evaluate"}

_MODES = {
    "routes": ("plain",),
    "passes": ("plain",),
    "size": ("plain", "bench"),
    "duration": ("plain", "bench"),
    "weather": ("plain", "maps"),
    "scenes": ("bench", "maps"),
    "cities": ("bench",),
    "plan": ("bench",),
}
"""options of ``sim`` that only some kinds of data sets have"""
_NAMES = {"plain": "a data set of one city", "bench": "--bench", "maps": "--maps and --trajectories"}


def _sim(arguments: argparse.Namespace) -> None:
    if bool(arguments.maps) != bool(arguments.trajectories):
        raise NmpError("--maps and --trajectories go together: a map folder and the drives through it")
    if arguments.maps and arguments.bench:
        raise NmpError("--bench makes its own cities: leave out --maps and --trajectories, or --bench")
    mode = "bench" if arguments.bench else "maps" if arguments.maps else "plain"
    for name, modes in _MODES.items():
        if getattr(arguments, name) not in (None, False) and mode not in modes:
            raise NmpError(
                f"--{name} goes with {' or '.join(_NAMES[m] for m in modes)}, not with {_NAMES[mode]}: leave it out"
            )
    for name, least in (("scenes", 0 if mode == "maps" else 1), ("routes", 1), ("passes", 1), ("cities", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise NmpError(f"--{name} {value} is out of range: choose {least} or more")
    if arguments.seed < 0:
        raise NmpError(f"--seed {arguments.seed} is out of range: choose 0 or more")
    noisy = arguments.pose_noise is not None or arguments.yaw_noise is not None
    if arguments.plan and (arguments.only or arguments.sweeps or noisy or arguments.flat_roads):
        raise NmpError("--plan draws no images: leave out --only, --sweeps, --pose-noise, --yaw-noise and --flat-roads")

    from nmp_train.sim import make
    from nmp_train.sim.localisation import LocalisationNoise

    noise = None
    if noisy:
        noise = LocalisationNoise(arguments.pose_noise or 0.0, arguments.yaw_noise or 0.0)
    output = make.Output(
        version=arguments.version,
        render_scale=arguments.render_scale,
        sweeps=arguments.sweeps,
        device=arguments.device,
        localisation=noise,
        slopes=not arguments.flat_roads,
        only=tuple(arguments.only or ()),
    )
    # What is not given stays as the maker has it.
    given = {"duration_s": arguments.duration, "size_m": arguments.size, "changes": arguments.changes}
    given |= {name: getattr(arguments, name) for name in ("routes", "passes", "cities", "scenes", "weather")}
    options = {name: value for name, value in given.items() if value is not None}
    if mode == "maps":
        options.setdefault("scenes", 0)
        make.make_from_maps(
            arguments.out, arguments.maps, arguments.trajectories, seed=arguments.seed, output=output, **options
        )
    elif arguments.plan:
        plan, changes = make.plan_bench(arguments.seed, **options)
        print(make.write_plan(arguments.out, plan, changes))
    elif mode == "bench":
        make.make_bench(arguments.out, arguments.seed, output=output, **options)
    else:
        options.setdefault("passes", 2)
        make.make_dataset(arguments.out, seed=arguments.seed, output=output, **options)


def _overlap(arguments: argparse.Namespace) -> None:
    from nmp_train.sim.overlap import compare

    print(compare(arguments.source, arguments.version, arguments.json))


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nmp-train", description="Make simulated data and train nmp's networks.")
    parser.add_argument("--version", action="version", version=f"nmp-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    plain = argparse.RawDescriptionHelpFormatter
    sim = commands.add_parser(
        "sim", help="write a simulated nuScenes data set", description=SIM_HELP, formatter_class=plain
    )
    sim.add_argument("--out", type=Path, required=True, help="folder to make (with --plan: JSON file); must not exist")
    sim.add_argument("--seed", type=int, default=0, help="the same seed gives the same data set (default 0)")
    sim.add_argument("--name", dest="version", default="v1.0-mini", help="nuScenes version name (default v1.0-mini)")

    kind = sim.add_argument_group("what is driven")
    kind.add_argument("--routes", type=int, help="one city: number of routes (default 1)")
    kind.add_argument("--passes", type=int, help="one city: drives of every route, on different days (default 2)")
    kind.add_argument("--bench", action="store_true", help="the fleet in several cities")
    kind.add_argument("--cities", type=int, help="bench: 1 to 4 cities (default 4)")
    kind.add_argument("--plan", action="store_true", help="bench: draw nothing, write the drives as JSON to --out")
    kind.add_argument("--maps", type=Path, help="use the maps below this folder (maps/expansion/*.json) instead")
    kind.add_argument(
        "--trajectories",
        type=Path,
        help="drives through --maps: a folder of JSON files, one per scene, or one list file; every scene has scene, "
        "location, rate_hz, poses_xyyaw ([x m, y m, yaw rad] in the map frame) and date or logfile",
    )
    kind.add_argument(
        "--scenes", type=int, help="bench: number of scenes (default 150); maps: how many, drawn by seed (default all)"
    )
    kind.add_argument("--duration", type=float, help="length of a scene, s (default 20)")
    kind.add_argument("--size", type=float, help="edge of a city, m (default 420; bench: what the scenes need)")

    look = sim.add_argument_group("what it looks like")
    look.add_argument(
        "--weather",
        choices=("day", "rain", "night", "night rain", "mixed"),
        help="of all scenes (default day, with --maps mixed; the bench has 70 %% day, 20 %% rain, 10 %% night)",
    )
    look.add_argument(
        "--changes",
        type=int,
        metavar="N",
        help="crossings, lane markings and kerbs of each city that change between its first and last drive: the "
        "images show it, the map expansion does not, maps/changes/ says when (default 0; bench: 1 to 6)",
    )
    look.add_argument(
        "--pose-noise",
        type=float,
        nargs="?",
        const=0.1,
        metavar="M",
        help="the car knows its position only to this standard deviation, m: ego_pose_estimate.json (alone: 0.1)",
    )
    look.add_argument(
        "--yaw-noise",
        type=float,
        nargs="?",
        const=0.01,
        metavar="RAD",
        help="the same for its heading, rad (alone: 0.01)",
    )
    look.add_argument(
        "--flat-roads",
        action="store_true",
        help="the car knows exactly how it stands on the road; otherwise to 0.3 degrees: roads have slopes and bumps",
    )

    images = sim.add_argument_group("images")
    images.add_argument(
        "--render-scale", type=float, default=0.4, help="resolution of the ray caster, of 1600 x 900 (default 0.4)"
    )
    images.add_argument("--sweeps", action="store_true", help="also write the 12 Hz images between keyframes")
    images.add_argument("--only", nargs="+", metavar="SCENE", help="write these scenes alone, as in the whole set")
    images.add_argument("--device", choices=("cuda", "cpu"), help="what renders (default: cuda when there is one)")
    sim.set_defaults(run=_sim)

    overlap = commands.add_parser(
        "overlap", help="show how the drives of data sets overlap", description=OVERLAP_HELP, formatter_class=plain
    )
    overlap.add_argument("source", type=Path, nargs="+", help="trajectory file or folder, plan, or data root")
    overlap.add_argument("--version", help="nuScenes version of the data roots (default: the only one there)")
    overlap.add_argument("--json", type=Path, metavar="FILE", help="write the statistics to this file as well")
    overlap.set_defaults(run=_overlap)

    # Imported only when it is asked for: the help of the other commands stays instant.
    asked = next((a for a in argv if not a.startswith("-")), None)
    for name, text in _MODULES.items():
        command = commands.add_parser(name, help=text, formatter_class=plain)
        if name == asked:
            module = importlib.import_module(f"nmp_train.{_FILES.get(name, name)}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 nobody reads the output, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv)
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one piece only; overrides may come behind options, too.
    if rest and hasattr(arguments, "override") and not any(text.startswith("-") for text in rest):
        arguments.override += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.command_line = shlex.join([parser.prog, *argv])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except NmpError as error:
        print(f"nmp-train: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # As after "| head". What is still buffered has to go somewhere when Python flushes it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
