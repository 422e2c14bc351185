"""``make demo``: drive, map, score and draw, with the player, the node and the recorder as processes over DDS.

Without a data root, a simulated city is driven twice along one route: the first time with an empty prior, the
second time with what the first stored. With a nuScenes data root, its scenes are driven one after the other.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from children import Children, MemoryMeter
from drive import environment
from scenes import drive_scenes, scenes_of
from simulated import AGREEMENT_MIOU, simulated
from stage import Stage, Steps, milliseconds

from nmp.errors import NmpError
from nmp.evaluation import write_json

ROOT = Path(__file__).resolve().parents[1]
MARKER = ".made-by-nmp-demo"

OWN_DATA = """
# one's own nuScenes, several drives through the same place; they share one stored map
make demo DATAROOT=/data/nuscenes VERSION=v1.0-trainval
.venv/bin/python demo/run.py --dataroot /data/nuscenes --version v1.0-trainval --scene scene-0061 scene-0103

# step by step: a scene to a bag, the bag to layers, the layers to scores
.venv/bin/nmp bag --dataroot /data/nuscenes --version v1.0-trainval --scene scene-0061 --out scene-0061
.venv/bin/nmp map scene-0061 --prior my_city --out layers
.venv/bin/nmp eval layers --maps /data/nuscenes
"""


def _machine() -> dict[str, Any]:
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "system": platform.platform(),
    }


def _here(path: Path) -> str:
    """Return a path as it is typed in the current folder."""
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def prepare(out: Path) -> None:
    """Empty the output folder of an earlier demo; never one that holds anything else."""
    if out.exists() and not out.is_dir():
        raise NmpError(f"{out} is a file: choose another OUT")
    try:
        if out.is_dir() and any(out.iterdir()):
            if not (out / MARKER).is_file():
                raise NmpError(f"{out} is not empty and not made by the demo: remove it or choose another OUT")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("make demo writes here, and empties this folder first\n")
    except OSError as error:
        raise NmpError(f"cannot write to {out} ({error.strerror}): choose another OUT") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument(
        "--dataroot", default=os.environ.get("DATAROOT"), help="nuScenes folder (default: a simulated city)"
    )
    parser.add_argument("--version", default=os.environ.get("VERSION"), help="its tables (default: v1.0-mini)")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="folder for all results (default: out/demo)")
    parser.add_argument("--scene", nargs="+", default=[], metavar="SCENE", help="scenes to drive, in this order")
    parser.add_argument(
        "--max-scenes", type=int, default=2, help="how many, where none are named (default: %(default)s)"
    )
    parser.add_argument("--weights", type=Path, help="another network (.safetensors)")
    parser.add_argument("--seed", type=int, help="another simulated city and route")
    args = parser.parse_args(argv)
    # make passes empty variables on as empty text
    args.dataroot = Path(args.dataroot).expanduser().resolve() if args.dataroot else None
    args.version = args.version or "v1.0-mini"
    args.out = Path(args.out).expanduser().resolve() if args.out else ROOT / "out" / "demo"
    if args.scene and not args.dataroot:
        parser.error("--scene needs --dataroot")
    if args.max_scenes < 1:
        parser.error("--max-scenes: at least 1")
    return args


def run(args: argparse.Namespace) -> None:
    """Carry out the demo."""
    if args.weights and not args.weights.is_file():
        raise NmpError(f"weights {args.weights} do not exist: check the path")
    scenes = scenes_of(args.dataroot, args.version, args.scene, args.max_scenes) if args.dataroot else []
    prepare(args.out)
    steps = Steps()
    with MemoryMeter() as memory, Children(args.out / "logs", environment()) as children:
        stage = Stage(args.out, args.weights, children, steps)
        if args.dataroot:
            metrics, report, lines = drive_scenes(stage, args.dataroot, args.version, scenes)
        else:
            metrics, report, lines = simulated(stage, args.seed)
    metrics["seconds"] = {**steps.seconds, "total": steps.total}
    metrics["peak_memory_mb"] = round(memory.peak_bytes / 1e6)
    metrics["machine"] = _machine()

    report.text(
        f"The whole demo took {steps.total:.0f} s on {metrics['machine']['cores']} cores "
        f"({metrics['machine']['cpu']}), with at most "
        f"{metrics['peak_memory_mb'] / 1e3:.1f} GB of memory in all processes together."
    )
    report.heading("With your own data")
    report.commands(OWN_DATA)
    write_json(args.out / "metrics.json", metrics)
    (args.out / "report.html").write_text(report.html(), encoding="utf-8")
    for line in lines:
        print(line)
    for d in metrics["drives"]:
        s = metrics["drives"][d]
        drops = ", ".join(f"{count} {cause}" for cause, count in s.get("drops", {}).items())
        print(
            f"{d.replace('_', ' ')}: {s['recorded']} of {s['keyframes']} keyframes answered, latency median "
            f"{milliseconds(s.get('latency_median_s'))}, 95 % {milliseconds(s.get('latency_p95_s'))}"
            + (f", dropped: {drops}" if drops else "")
        )
    print(f"{steps.total:.0f} s, at most {metrics['peak_memory_mb'] / 1e3:.1f} GB of memory")
    print(f"\nOpen {args.out / 'report.html'}")
    print(f"Watch the drives in a browser: {_here(Path(sys.executable).parent / 'nmp')} view {_here(args.out)}")
    if metrics.get("replay_check", {}).get("agrees") is False:
        raise NmpError(
            f"replay and DDS score more than {AGREEMENT_MIOU:g} mIoU apart on the second pass: please report it with "
            f"{args.out / 'metrics.json'}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # unwinds, so that the children are ended

    signal.signal(signal.SIGTERM, end)
    try:
        run(parse(argv))
    except NmpError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"demo: error: {error.filename or 'disk'}: {error.strerror}: check space and permissions", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
