"""``nmp-train``: simulate, train, export."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from nmp import __version__
from nmp.errors import NmpError


def _sim(arguments: argparse.Namespace) -> None:
    from nmp_train.sim.make import make_dataset, make_from_maps

    if bool(arguments.maps) != bool(arguments.trajectories):
        raise NmpError("--maps and --trajectories go together: a map folder and the drives through it")
    if arguments.maps:
        make_from_maps(
            arguments.out,
            arguments.maps,
            arguments.trajectories,
            scenes=arguments.scenes,
            seed=arguments.seed,
            version=arguments.version,
            render_scale=arguments.render_scale,
            sweeps=arguments.sweeps,
            weather=arguments.weather or "mixed",
        )
        return
    make_dataset(
        arguments.out,
        seed=arguments.seed,
        routes=arguments.routes,
        passes=arguments.passes,
        duration_s=arguments.duration,
        size_m=arguments.size,
        version=arguments.version,
        render_scale=arguments.render_scale,
        sweeps=arguments.sweeps,
        weather=arguments.weather or "day",
    )


def _fit(arguments: argparse.Namespace) -> None:
    from nmp_train.config import load_config
    from nmp_train.fit import fit

    config = load_config(arguments.config, arguments.override)
    fit(config, arguments.out, start=arguments.start, first_stage=arguments.first_stage, device_name=arguments.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nmp-train", description="Make simulated data and train nmp's networks.")
    parser.add_argument("--version", action="version", version=f"nmp-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    sim = commands.add_parser("sim", help="write a simulated nuScenes data set")
    sim.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    sim.add_argument("--seed", type=int, default=0, help="the same seed gives the same data set (default 0)")
    sim.add_argument("--routes", type=int, default=1, help="number of routes (default 1)")
    sim.add_argument("--passes", type=int, default=2, help="drives of every route, each on another day (default 2)")
    sim.add_argument("--maps", type=Path, help="use the maps below this folder (maps/expansion/*.json) instead")
    sim.add_argument("--trajectories", type=Path, help="drives through --maps: a folder of scenes, or one list file")
    sim.add_argument("--scenes", type=int, default=0, help="how many of --trajectories, drawn by seed (default all)")
    sim.add_argument(
        "--weather", choices=("day", "rain", "night", "night rain", "mixed"), help="(default day, with --maps mixed)"
    )
    sim.add_argument("--duration", type=float, default=20.0, help="length of a scene, s (default 20)")
    sim.add_argument("--size", type=float, default=420.0, help="edge of the city, m (default 420)")
    sim.add_argument("--render-scale", type=float, default=0.4, help="resolution of the ray caster (default 0.4)")
    sim.add_argument("--name", dest="version", default="v1.0-mini", help="nuScenes version name (default v1.0-mini)")
    sim.add_argument("--sweeps", action="store_true", help="also write the 12 Hz images between keyframes")
    sim.set_defaults(run=_sim)

    fit = commands.add_parser("fit", help="train a network from a YAML configuration")
    fit.add_argument("config", type=Path)
    fit.add_argument("override", nargs="*", help="key=value, for example stages.0.batch=8")
    fit.add_argument("--out", type=Path, required=True, help="folder for weights and logs")
    fit.add_argument("--start", type=Path, help="weights to start from")
    fit.add_argument("--first-stage", type=int, default=1, help="skip the stages before this one (default 1)")
    fit.add_argument("--device", help="cuda or cpu (default: cuda when there is one)")
    fit.set_defaults(run=_fit)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments.run(arguments)
    except NmpError as error:
        print(f"nmp-train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
