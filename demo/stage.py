"""What both kinds of demo do alike: steps with their time, bags, drives, replays, and the table of drives."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from children import Child, Children
from drive import Drive, run_drive
from report import Report


class Steps:
    """Says what is being done and how long it took."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, key: str, text: str) -> Iterator[None]:
        begin = time.monotonic()
        print(f"[{begin - self.begin:5.1f} s] {text} ...", flush=True)
        yield
        self.seconds[key] = round(self.seconds.get(key, 0.0) + time.monotonic() - begin, 2)
        if sys.stdout.isatty():
            print("\r", end="")
        print(f"          done in {self.seconds[key]:.1f} s", flush=True)

    @property
    def total(self) -> float:
        return round(time.monotonic() - self.begin, 2)


def _count(answered: int, keyframes: int) -> None:
    if sys.stdout.isatty():
        print(f"\r          {answered} of {keyframes} keyframes answered ", end="", flush=True)


class Stage:
    """One run: its folder, its processes, its clock."""

    def __init__(self, out: Path, weights: Path | None, children: Children, steps: Steps) -> None:
        self.out = out
        self.weights = weights
        self.children = children
        self.steps = steps

    def nmp(self, name: str, *arguments: str | Path) -> Child:
        """Start the command ``nmp`` as a process of its own."""
        return self.children.start(name, [sys.executable, "-m", "nmp.cli", *(str(a) for a in arguments)])

    def record(self, dataroot: Path, version: str, scenes: Sequence[str]) -> dict[str, Path]:
        """Turn scenes into bags, side by side two at a time, and return them by scene."""
        bags = {scene: self.out / "bags" / scene for scene in scenes}
        for i in range(0, len(scenes), 2):
            jobs = [
                self.nmp(
                    f"bag-{scene}", "bag", "--dataroot", dataroot, "--version", version, "--scene", scene,
                    "--out", bags[scene],
                )
                for scene in scenes[i : i + 2]
            ]  # fmt: skip
            self.children.wait(*jobs, timeout=1800.0)
        return bags

    def drive(self, name: str, bag: Path, prior: Path) -> Drive:
        layers = self.out / "layers" / name
        layers.mkdir(parents=True)
        return run_drive(self.children, name, bag, layers=layers, prior=prior, weights=self.weights, progress=_count)

    def replay(self, runs: Mapping[str, tuple[Path, Path | None]]) -> list[Path]:
        """Map bags without DDS, {name: (bag, prior or None)}, side by side; return the folders of the layers."""
        jobs, folders = [], []
        for name, (bag, prior) in runs.items():
            arguments: list[str | Path] = ["map", bag, "--out", self.out / "layers" / name]
            arguments += ["--prior", prior] if prior else ["--no-prior"]
            arguments += ["--weights", self.weights] if self.weights else []
            # Two processes of one thread get further than two that share their cores by halves.
            arguments += ["--threads", "1"] if len(runs) > 1 else []
            jobs.append(self.nmp(f"map-{name}", *arguments))
            folders.append(self.out / "layers" / name)
        self.children.wait(*jobs, timeout=900.0)
        return folders


def drives_table(report: Report, drives: Sequence[Drive]) -> None:
    rows = []
    for d in drives:
        s = d.statistics
        drops = ", ".join(f"{count} {cause}" for cause, count in s.get("drops", {}).items()) or "none"
        latency = [milliseconds(s.get(f"latency_{k}_s")) for k in ("median", "p95", "max")]
        rows.append([d.name.replace("_", " "), str(d.keyframes), str(d.answered), drops, *latency])
    report.table(["Drive", "Keyframes", "Answered", "Dropped", "Median", "95 %", "Worst"], rows)
    report.text("Latency from the arrival of a keyframe's last camera image to its published layers.", "note")


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None or not math.isfinite(seconds) else f"{seconds * 1e3:.0f} ms"


def byte_count(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def folder_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
