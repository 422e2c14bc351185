"""How fast the simulator renders: six-camera samples a second, rays, and the distance to the device's limits.

python benchmarks/render.py --size 128x352 --size 256x704 --out render.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from nmp.model.config import NetworkConfig
from nmp_train.config import StageConfig, TrainConfig
from nmp_train.data import SimulatedGroups, SimulatedSource, collate
from nmp_train.sim.light import BEAMS, LAMP_SIDE, LAMPS, SHADOW_SIDE, SHADOW_TILES, shadow_scores
from nmp_train.sim.render import SOLIDS_PER_SHADOW_TILE, SOLIDS_PER_STRIP, Solids, strip_scores
from nmp_train.sim.weather import Weather
from nmp_train.world import make_world

# Arithmetic, counted in the source (a root, a power or an exponential as one operation, whole numbers too):
# one ray against one solid: three slabs 24, the ellipsoid 18, both again for the mirror image 6 + 12, the choice 8
FLOPS_PER_TEST = 68
# one ray besides: directions 20, ground with kerbs 130, sky and patterns 70, shading 130, light and air 120, lens 140
FLOPS_PER_RAY = 610
# one ray against one lamp: its blob and its streak
FLOPS_PER_LAMP = 26
# one cell of the shadow map against one solid, and one cell of the map of lamps against one lamp
FLOPS_PER_SHADE, FLOPS_PER_POOL = 46, 14
# Memory that must be touched, per ray: nothing of what is computed has to leave the chip but radiance (written by
# the tracer, read for metering and again by the lens: 3 x 12 bytes), noise (written and read: 24) and the image (3).
BYTES_PER_RAY = 63
# Texels, shadows and patterns are fetched per ray as well, mostly from caches: 5 x 4 + 3 x 16 + 2 x 48 bytes.
CACHED_BYTES_PER_RAY = 164


def _measure(height: int, width: int, batch: int, repeats: int, device: torch.device, seed: int) -> dict[str, Any]:
    config = TrainConfig(supersample=1, network=NetworkConfig(input_width=width, input_height=height), workers=0)
    world = make_world(seed, size_m=420.0, drives=2, duration_s=20.0)
    groups = SimulatedGroups([world], config, StageConfig(batch=batch), seed=seed, length=batch)
    samples = collate([groups[i] for i in range(batch)])
    samples = dataclasses.replace(samples, truth=samples.truth[..., :1, :1])  # labels are not rendered
    source = SimulatedSource([world], config, device)
    begin = time.perf_counter()
    source.batch(samples)
    _wait(device)
    first = time.perf_counter() - begin
    if device.type == "cuda":
        samples = samples.pin_memory()  # as the data loader does
    # On a GPU the next batch is prepared while one is rendered, as in training: several are timed together.
    together = 4 if device.type == "cuda" else 1
    seconds, processor = [], []
    for _ in range(repeats):
        begin, used = time.perf_counter(), time.process_time()
        for _ in range(together):
            source.batch(samples)
        _wait(device)
        seconds.append((time.perf_counter() - begin) / together)
        processor.append((time.process_time() - used) / together)
    median = statistics.median(seconds)
    drawn = samples.drawn
    assert drawn is not None
    rays = batch * 6 * height * width
    solids = Solids(*(part.flatten(0, 1) for part in drawn.solids))
    seen = strip_scores(
        drawn.intrinsics.flatten(0, 1), drawn.map_from_camera.flatten(0, 1), solids, (width, height), True
    )
    in_view = (seen > 0).sum(dim=-1).float()
    shading = shadow_scores(solids.centre, solids.size, Weather.clear(len(solids.yaw)).sun) > 0
    batched = device.type != "cpu"
    tests = min(SOLIDS_PER_STRIP, solids.yaw.shape[1]) if batched else float(in_view.mean())
    shades = min(SOLIDS_PER_SHADOW_TILE, solids.yaw.shape[1]) if batched else float(shading.float().sum(-1).mean())
    flops = rays * (FLOPS_PER_RAY + tests * FLOPS_PER_TEST + LAMPS * FLOPS_PER_LAMP)
    flops += batch * (SHADOW_SIDE**2 * shades * FLOPS_PER_SHADE + LAMP_SIDE**2 * (LAMPS + BEAMS) * FLOPS_PER_POOL)
    return {
        "height": height,
        "width": width,
        "batch": batch,
        "samples_per_s": round(batch / median, 1),
        "median_s": round(median, 5),
        "worst_s": round(max(seconds), 5),
        "first_call_s": round(first, 1),
        "processor_s_per_sample": round(statistics.median(processor) / batch, 4),
        "rays": rays,
        "rays_per_s": round(rays / median),
        "solids_per_sample": solids.yaw.shape[1],
        "solids_in_view_of_a_ray": round(float(in_view.mean()), 1),
        "solids_tested_per_ray": round(tests, 1),
        "strips_with_solids_left_out": round(float((in_view > SOLIDS_PER_STRIP).float().mean()), 4),
        "shadow_tiles": SHADOW_TILES**2,
        "solids_tested_per_shadow_cell": round(shades, 1),
        "tflop_per_s": round(flops / median / 1e12, 4),
        "memory_gb_per_s": round(rays * BYTES_PER_RAY / median / 1e9, 2),
        "cache_gb_per_s": round(rays * CACHED_BYTES_PER_RAY / median / 1e9, 2),
    }


def _limits(device: torch.device) -> dict[str, float]:
    """Measure the ceilings: float32 arithmetic without matrix units, and memory."""
    elements, rounds = (2**28, 128) if device.type == "cuda" else (2**16, 0)
    x = torch.rand(elements, device=device)
    y = torch.empty_like(x)

    def chain(v: torch.Tensor) -> torch.Tensor:
        for _ in range(rounds):
            v = v * 0.999 + 0.001
        return v

    def best(call: Any) -> float:
        times = []
        for _ in range(12):
            _wait(device)
            begin = time.perf_counter()
            call()
            _wait(device)
            times.append(time.perf_counter() - begin)
        return min(times)

    if device.type == "cuda":
        fused = torch.compile(chain)
        flops = x.numel() * 2 * rounds / best(lambda: fused(x))
    else:  # a product of matrices is the only thing that a CPU does at its full speed from Python
        side = 1024
        a = torch.rand(side, side)
        flops = 2 * side**3 / best(lambda: a @ a)
        x = torch.rand(2**26)
        y = torch.empty_like(x)
    return {
        "fp32_tflop_per_s": round(flops / 1e12, 3),
        "memory_gb_per_s": round(2 * x.numel() * 4 / best(lambda: y.copy_(x)) / 1e9, 1),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="HEIGHTxWIDTH, repeatable (default 128x352 and 256x704)")
    parser.add_argument("--batch", type=int, default=0, help="samples a call (default 64 on a GPU, 2 on a CPU)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1001)
    parser.add_argument("--out", type=Path, help="write JSON here as well")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = arguments.batch or (64 if device.type == "cuda" else 2)
    limits = _limits(device)
    print(json.dumps(limits), flush=True)
    rows = []
    for size in arguments.size or ["128x352", "256x704"]:
        height, width = (int(v) for v in size.split("x"))
        row = _measure(height, width, batch, arguments.repeats, device, arguments.seed)
        row["of_fp32_limit"] = round(row["tflop_per_s"] / limits["fp32_tflop_per_s"], 4)
        row["of_memory_limit"] = round(row["memory_gb_per_s"] / limits["memory_gb_per_s"], 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "sizes": rows}
    result["limits"] = limits
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
