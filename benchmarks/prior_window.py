"""Time reading and writing one window of the city prior, beside a plain numpy copy of the same size.

    python benchmarks/prior_window.py [--out prior_window.json] [--folder DIR]

Prints (and writes) JSON: medians and 99th percentiles in milliseconds. "idle" keeps one window in memory,
"driving" moves it 1.2 m a frame along a bent road while the background thread saves, "cold" reads from disk. "gpu",
where there is one, is what the window costs it: there and back, and from the stored numbers to the network's and back.
"passes" drives the same road several times, as the mapper does it: it asks for what lies ahead, reads and writes. The
cells are written with the coding of the shipped network, the drives before are apart, or compacted after each pass.
"with_a_core" leaves out how long the thread waited for a core, as it does on a machine that others use as well (Linux).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nmp.process import prepare_process

prepare_process()  # as in the processes that map

# ruff: noqa: E402
import numpy as np
from numpy.typing import NDArray

from nmp.model.weights import read_description
from nmp.prior import CityPrior, PriorSpec, Window
from nmp.prior.coding import coding_of
from nmp.prior.ledger import Ledger
from nmp.prior.storage import Storage
from nmp.prior.upkeep import compact

CELL = 0.3
STEP = 1.2
"""m driven per frame: 12 m/s at 10 Hz"""


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median and 99th percentile of durations, ms."""
    ms = np.array(seconds) * 1e3
    return {"median_ms": round(float(np.median(ms)), 3), "p99_ms": round(float(np.percentile(ms, 99)), 3)}


def with_ratio(seconds: list[float]) -> dict[str, float]:
    """Return the summary, and how many medians the 99th percentile is."""
    found = summary(seconds)
    return {**found, "p99_to_median": round(found["p99_ms"] / found["median_ms"], 2)}


def timed(action: Callable[[], object], repeats: int) -> list[float]:
    """Return how long each of ``repeats`` calls took, s; two more come before, to warm up."""
    durations = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        action()
        durations.append(time.perf_counter() - start)
    return durations[2:]


def resident_mib() -> float:
    """Return the memory that this process occupies now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def without_core_s() -> float:
    """Return how long this thread was ready and had no core so far, s."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def numpy_copy(size: int, channels: int, latent: NDArray[np.int8], evidence: NDArray[np.uint16]) -> Callable[[], None]:
    """Return the least that a read and a write can do: copy the window out of a dense array, and back into it."""
    dense_latent = np.zeros((channels, 3 * size, 3 * size), np.int8)
    dense_evidence = np.zeros((3 * size, 3 * size), np.uint16)
    block = slice(size // 3, size // 3 + size)

    def copy() -> None:
        dense_latent[:, block, block].copy()
        dense_evidence[block, block].copy()
        dense_latent[:, block, block] = latent
        dense_evidence[block, block] = evidence

    return copy


def road(frame: int) -> tuple[float, float]:
    """Return the position (m) on a bent road at a frame."""
    along = frame * STEP
    return along, 60 * float(np.sin(along / 150))


def seen_from(size: int, heading: float) -> NDArray[np.bool_]:
    """Return the cells of a window under a region of 60 x 30 m around its centre, as a frame covers them."""
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * CELL
    along, across = x * np.cos(heading) + y * np.sin(heading), y * np.cos(heading) - x * np.sin(heading)
    return (np.abs(along) < 30) & (np.abs(across) < 15)


def measure(folder: Path, size: int, channels: int, repeats: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    # neighbours resemble each other, as in a learned map: white noise would not compress at all
    coarse = rng.normal(0, 30, (channels, size // 4 + 1, size // 4 + 1)).repeat(4, 1).repeat(4, 2)[:, :size, :size]
    latent = np.clip(coarse + rng.normal(0, 2, coarse.shape), -127, 127).astype(np.int8)
    evidence = rng.integers(1, 50, (size, size)).astype(np.uint16)
    visible = seen_from(size, heading=0.4)
    spec = PriorSpec(channels, CELL, "benchmark", evidence_cap=4096)
    results: dict[str, object] = {}

    copies = timed(numpy_copy(size, channels, latent, evidence), repeats)
    results["numpy_copy"] = summary(copies)

    window = Window.around(0, 0, CELL, size, size)
    weight = rng.integers(100, 256, (size, size)).astype(np.uint16)
    with CityPrior.open(folder, "idle", spec, flush_interval_s=1e6) as prior:
        prior.write(window, latent, evidence, 10**9)
        reads = timed(lambda: prior.read(window), repeats)
        # every write adds a little to cells that are at the cap, which takes the longest
        grown = spec.evidence_cap + weight // 8
        writes = timed(lambda: prior.write(window, latent, grown, 10**9), repeats)
        masked = timed(lambda: prior.write(window, latent, grown, 10**9, visible), repeats)
        results["idle_read"] = summary(reads)
        results["idle_write"] = summary(writes)
        results["idle_write_masked"] = summary(masked)
        results["idle_read_write"] = summary([r + w for r, w in zip(reads, masked, strict=True)])
        tiles = prior.statistics()["tiles"]
        start = time.perf_counter()
        prior.flush()
        results["flush_ms_per_tile"] = round((time.perf_counter() - start) * 1e3 / tiles, 3)

    def cold() -> float:
        with CityPrior.open(folder, "idle", spec, read_only=True) as reader:
            start = time.perf_counter()
            reader.read(window)
            return time.perf_counter() - start

    results["cold_read"] = summary([cold() for _ in range(20)])

    both, memory = [], []
    with CityPrior.open(folder, "driving", spec, flush_interval_s=2.0) as prior:
        for frame in range(repeats):
            window = Window.around(*road(frame), CELL, size, size)
            start = time.perf_counter()
            _, before = prior.read(window)
            prior.write(window, latent, before + weight, frame * 10**8, visible)
            both.append(time.perf_counter() - start)
            time.sleep(max(0.0, 0.02 - both[-1]))  # five times as fast as the car
            memory.append(resident_mib())
        prior.flush()
        results["driving_read_write"] = summary(both)
        results["driving_statistics"] = prior.statistics()
        results["driving_resident_mib"] = {"first": memory[0], "last": memory[-1]}
    median = float(np.median(copies))
    results["ratio_idle_to_numpy"] = round(
        float(np.median([r + w for r, w in zip(reads, masked, strict=True)])) / median, 2
    )
    results["ratio_driving_to_numpy"] = round(float(np.median(both)) / median, 2)
    return results


def gpu_window(size: int, channels: int, repeats: int) -> dict[str, float]:
    """Return what a GPU spends on one window, by its own clock; empty where there is none."""
    import torch

    from nmp.model.runner import quantize, read_quantized

    if not torch.cuda.is_available():
        return {}
    latent = torch.randint(-127, 128, (1, channels, size, size), dtype=torch.int8).pin_memory()
    evidence = torch.randint(0, 4096, (1, 1, size, size), dtype=torch.int16).pin_memory()
    back = latent.clone().pin_memory(), evidence.clone().pin_memory()
    durations = []
    for _ in range(repeats + 10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        cells = read_quantized(latent.cuda(non_blocking=True), evidence.cuda(non_blocking=True))
        for host, values in zip(back, quantize(cells), strict=True):
            host.copy_(values, non_blocking=True)
        end.record()
        end.synchronize()
        durations.append(start.elapsed_time(end) / 1e3)
    return summary(durations[10:])


def passes(folder: Path, size: int, frames: int, count: int, pace_s: float, *, compacted: bool) -> list[dict[str, Any]]:
    """Drive along one road several times, and return what each frame of each pass took, its first read apart."""
    rng = np.random.default_rng(0)
    coding = coding_of(read_description(None))
    assert coding is not None
    spec = PriorSpec(coding.channels, CELL, "benchmark", evidence_cap=4096, coding=coding)
    # the same content at the same place whenever it is driven, and noise of each look
    coarse = rng.normal(0, 30, (spec.channels, 2 * size // 4, 2 * size // 4)).repeat(4, 1).repeat(4, 2)
    world = np.clip(coarse + rng.normal(0, 2, coarse.shape), -127, 127).astype(np.int8)
    weight = rng.integers(100, 256, (size, size)).astype(np.uint16)
    out = []
    for number in range(count):
        prior = CityPrior.open(folder, "passes", spec, flush_interval_s=2.0)
        both, reads, working = [], [], []
        for frame in range(frames):
            (x, y), (next_x, next_y) = road(frame), road(frame + 1)
            heading = math.atan2(next_y - y, next_x - x)
            window = Window.around(x, y, CELL, size, size)
            rows, cols = (np.arange(start, start + size) % (2 * size) for start in (window.row, window.col))
            seen, latent = seen_from(size, heading), world[:, rows[:, None], cols]
            start, idle = time.perf_counter(), without_core_s()
            prior.prefetch(x, y, heading)
            _, before = prior.read(window)
            reads.append(time.perf_counter() - start)
            prior.write(window, latent, before + weight, (number * 10**5 + frame) * 10**8, seen)
            both.append(time.perf_counter() - start)
            working.append(both[-1] - (without_core_s() - idle))
            time.sleep(max(0.0, pace_s - both[-1]))
        prior.close()
        more = {"first_read_ms": round(reads[0] * 1e3, 1), "most_ms_after_it": round(max(both[1:]) * 1e3, 1)}
        out.append({"pass": number + 1, **more, **with_ratio(both), "with_a_core": with_ratio(working)})
        if compacted:
            compact(Ledger.open(Storage(folder / "passes")))
    return out


def long_drive(folder: Path, size: int, channels: int, frames: int) -> dict[str, object]:
    """Drive through a large city as fast as it goes, with 64 MB resident, and commit it."""
    rng = np.random.default_rng(0)
    latent = rng.normal(0, 30, (channels, size // 8 + 1, size // 8 + 1)).repeat(8, 1).repeat(8, 2)[:, :size, :size]
    latent = np.clip(latent, -127, 127).astype(np.int8)
    visible, memory, both = seen_from(size, heading=0.4), [], []
    weight = np.full((size, size), 200, np.uint16)
    prior = CityPrior.open(folder, "long", PriorSpec(channels, CELL, "benchmark", evidence_cap=4096), resident_mb=64)
    for frame in range(frames):
        window = Window.around(*road(frame), CELL, size, size)
        start = time.perf_counter()
        _, before = prior.read(window)
        prior.write(window, latent, before + weight, frame * 10**8, visible)
        both.append(time.perf_counter() - start)
        memory.append(resident_mib())
    start = time.perf_counter()
    tiles = prior.statistics()["tiles"]
    prior.close()
    settled = memory[frames // 5 :]
    return {
        "frames": frames,
        "tiles": tiles,
        "read_write": summary(both),
        "resident_mib": {"after_a_fifth": settled[0], "least": min(settled), "most": max(settled), "last": settled[-1]},
        "commit_s": round(time.perf_counter() - start, 1),
        "commit_ms_per_tile": round((time.perf_counter() - start) * 1e3 / tiles, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--folder", type=Path, help="an existing folder on the disk to measure (default: temporary)")
    parser.add_argument("--size", type=int, default=224, help="rows and columns of the window")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--long", type=int, default=0, metavar="FRAMES", help="also a long drive: is memory bounded?")
    parser.add_argument("--passes", type=int, default=3, metavar="N", help="along one road; 0: leave this out")
    parser.add_argument("--frames", type=int, default=500, help="of each pass")
    parser.add_argument("--pace", type=float, default=0.02, metavar="S", help="from frame to frame of a pass")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(Path(folder), options.size, options.channels, options.repeats)
        if gpu := gpu_window(options.size, options.channels, options.repeats):
            results["gpu"] = gpu
        for name in ("apart", "compacted") if options.passes else ():
            place, compacted = Path(folder) / name, name == "compacted"
            results[f"passes_{name}"] = passes(
                place, options.size, options.frames, options.passes, options.pace, compacted=compacted
            )
        if options.long:
            results["long_drive"] = long_drive(Path(folder), options.size, options.channels, options.long)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    setting = {"size": options.size, "channels": options.channels, "repeats": options.repeats, "cell_m": CELL}
    text = json.dumps({"machine": machine, "setting": setting, **results}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
