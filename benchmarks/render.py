"""How fast the simulator renders: six-camera samples a second, rays, and the distance to the device's limits.

python benchmarks/render.py --size 128x352 --size 256x704 --out render.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from nmp.model.config import NetworkConfig
from nmp_train.config import TrainConfig
from nmp_train.data import MAX_SOLIDS, SimulatedGroups, collate
from nmp_train.fit import Simulator
from nmp_train.world import make_world

# Counted in the source: arithmetic of one ray against one solid, and of everything else for one ray.
FLOPS_PER_TEST, FLOPS_PER_RAY = 45, 500


def _measure(height: int, width: int, batch: int, repeats: int, device: torch.device, seed: int) -> dict[str, Any]:
    config = TrainConfig(supersample=1, network=NetworkConfig(input_width=width, input_height=height), workers=0)
    world = make_world(seed, size_m=420.0, drives=2, duration_s=20.0)
    groups = SimulatedGroups([world], config.network, group=1, radius_m=30.0, seed=seed, length=batch)
    samples = collate([groups[i] for i in range(batch)])
    simulator = Simulator([world], config, device)
    begin = time.perf_counter()
    simulator.render(samples)
    _wait(device)
    first = time.perf_counter() - begin
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        simulator.render(samples)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    rays = batch * 6 * height * width
    flops = rays * (FLOPS_PER_RAY + MAX_SOLIDS * FLOPS_PER_TEST)
    return {
        "height": height,
        "width": width,
        "batch": batch,
        "samples_per_s": round(batch / median, 1),
        "median_s": round(median, 5),
        "worst_s": round(max(seconds), 5),
        "first_call_s": round(first, 1),
        "rays_per_s": round(rays / median),
        "solids_per_ray": MAX_SOLIDS,
        "estimated_tflop_per_s": round(flops / median / 1e12, 3),
        "image_gb_per_s": round(rays * 3 / median / 1e9, 2),
    }


def _limits(device: torch.device) -> dict[str, float]:
    """Measure the ceilings: float32 arithmetic without matrix units, and memory."""
    if device.type != "cuda":
        return {}
    x = torch.rand(2**28, device=device)
    y = torch.empty_like(x)

    @torch.compile
    def chain(v: torch.Tensor) -> torch.Tensor:
        for _ in range(128):
            v = v * 0.999 + 0.001
        return v

    def best(call: Any) -> float:
        times = []
        for _ in range(12):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    return {
        "fp32_tflop_per_s": round(x.numel() * 256 / best(lambda: chain(x)) / 1e12, 1),
        "memory_gb_per_s": round(2 * x.numel() * 4 / best(lambda: y.copy_(x)) / 1e9),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="HEIGHTxWIDTH, repeatable (default 128x352)")
    parser.add_argument("--batch", type=int, default=0, help="samples a call (default 64 on a GPU, 2 on a CPU)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1001)
    parser.add_argument("--out", type=Path, help="write JSON here as well")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = arguments.batch or (64 if device.type == "cuda" else 2)
    rows = []
    for size in arguments.size or ["128x352"]:
        height, width = (int(v) for v in size.split("x"))
        rows.append(_measure(height, width, batch, arguments.repeats, device, arguments.seed))
        print(json.dumps(rows[-1]), flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "sizes": rows}
    result["limits"] = _limits(device)
    print(json.dumps(result["limits"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
