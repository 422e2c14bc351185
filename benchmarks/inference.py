"""How long a network takes for one frame, with the prior read and written: median and 99th percentile.

    python benchmarks/inference.py --out inference.json
    python benchmarks/inference.py --case r50 --way graph --precision bf16
    python benchmarks/inference.py --network nmp_train/configs/gpu_default.yaml --network view=bevformer

A frame begins with its images on the device and ends with the layers and the updated window of the prior there;
"with_transfers" is the same from the host's memory and back into it. The window is a plain block in memory. The parts
run by themselves: "encode" is images to BEV features, "prior" is reading, fusing and writing it on the device
(quantisation included), "decode" is features to layers. "difference" compares with the plain network in float32.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from nmp.errors import NmpError
from nmp.model import BEVNetwork, NetworkConfig, fusion, load_network
from nmp.model.runner import (
    Inputs,
    OneFrame,
    Program,
    Runner,
    choose_device,
    choose_precision,
    compare,
    example_inputs,
    prepare,
    quantize,
    read_quantized,
    window_side,
)

R50 = {"backbone": "resnet50", "backbone_stages": 4, "input_width": 704, "input_height": 256, "neck_channels": 64}
CASES: dict[str, dict[str, Any]] = {
    "cpu_default": {
        "bev_channels": 32,
        "bev_half_channels": 64,
        "bev_quarter_channels": 128,
        "align": True,
        "slopes": True,
    },
    "r50": {**R50, "bev_channels": 104},
    "r50_align": {**R50, "bev_channels": 104, "align": True, "slopes": True},
    "r50_bevformer": {**R50, "bev_channels": 104, "view": "bevformer"},
    "r50_lift_splat": {**R50, "bev_channels": 104, "view": "lift_splat"},
    "r50_hdmapnet": {**R50, "bev_channels": 104, "view": "hdmapnet"},
    "r50_paper": {**R50, "bev_channels": 256, "fusion": "paper"},
    "r50_vectors": {**R50, "bev_channels": 104, "vector_heads": True},
}
WAYS: dict[str, dict[str, bool]] = {
    "eager": {"compiled": False, "graph": False},
    "graph": {"compiled": False, "graph": True},
    "compiled": {"compiled": True, "graph": False},
    "compiled_graph": {"compiled": True, "graph": True},
}
"""ways of running on a GPU; a CPU has eager only"""


def network_config(given: Sequence[str]) -> NetworkConfig:
    """Return the configuration of ``--network``: YAML files (their section ``network``, or all) and key=value."""
    values: dict[str, Any] = {}
    for part in given:
        key, separator, text = part.partition("=")
        if separator:
            values[key] = yaml.safe_load(text)
            continue
        try:
            read: dict[str, Any] = yaml.safe_load(Path(part).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise NmpError(f"cannot read --network {part} ({error}): give a YAML file or key=value") from error
        values.update(read.get("network") or read)
    return NetworkConfig.from_dict(values)


def make_network(config: NetworkConfig, seed: int) -> BEVNetwork:
    """Return a network of random weights in which the prior has a say."""
    torch.manual_seed(seed)
    network = BEVNetwork(config).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)  # doors that training opens
    return network


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return median and 99th percentile of durations (s) in ms."""
    ms = np.array(seconds) * 1e3
    return {"median_ms": round(float(np.median(ms)), 3), "p99_ms": round(float(np.percentile(ms, 99)), 3)}


def measure(action: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Time an action that may only queue work: from an idle device until its work is done."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        begin = time.perf_counter()
        action()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return summary(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_way(
    network: BEVNetwork, inputs: Inputs, precision: str, way: dict[str, bool], repeats: int
) -> dict[str, Any]:
    """Time a prepared network in one way of running."""
    device = network.mean.device
    begin = time.perf_counter()
    runner = Runner(network, side=inputs.evidence.shape[-1], precision=precision, **way)
    out: dict[str, Any] = {"first_call_s": round(time.perf_counter() - begin, 2)}
    runner.outputs(inputs)
    out["frame"] = measure(runner.compute, repeats, device)
    images = inputs.images.permute(0, 1, 4, 2, 3)
    cells = (inputs.latent[0].numpy(), inputs.evidence[0, 0].numpy().view(np.uint16))
    given = (images, inputs.pixel_from_base, inputs.present, inputs.pose, inputs.spread, *cells)
    out["with_transfers"] = measure(lambda: runner.run(*given), repeats, device)
    for name, part in parts(network, inputs, precision, way).items():
        out[name] = measure(part.run, repeats, device)
    return out


def parts(network: BEVNetwork, inputs: Inputs, precision: str, way: dict[str, bool]) -> dict[str, Program]:
    """Return the three parts of a frame as programs of their own."""
    device = network.mean.device
    frame = OneFrame(network, choose_precision(precision, device))
    images, pixel_from_base, present, pose, spread, latent, evidence = (t.to(device) for t in inputs)
    origin = torch.zeros(1, 2, device=device)

    def prior(bev: Tensor, pose: Tensor, spread: Tensor, latent: Tensor, evidence: Tensor) -> tuple[Tensor, ...]:
        memory = read_quantized(latent, evidence)
        fused = network.fusion
        with frame.autocast():  # BEVNetwork.step without its decoder
            cells = fused.opened(memory)
            alignment = fused.locate(bev, cells, pose, origin, spread)
            if alignment is not None:
                pose = fusion.moved(pose, alignment.offset)
            latent, evidence = fused.read(cells, pose, origin)
            level, _ = fused.level(bev, latent, evidence)
            features = fused.fuse(level, latent, evidence, alignment)
            memory = fused.write(cells, bev, features, pose, origin, alignment)
        return features, *quantize(memory)

    def decode(features: Tensor) -> tuple[Tensor, Tensor]:
        with frame.autocast():
            logits = network.decode(features).logits.float()
        return logits, torch.sigmoid(logits)

    out = {"encode": Program(frame.encode, (images, pixel_from_base, present), **way)}
    bev = out["encode"].run().clone()
    out["prior"] = Program(prior, (bev, pose, spread, latent, evidence), **way)
    out["decode"] = Program(decode, (out["prior"].run()[0].clone(),), **way)
    return out


def measure_case(
    network: BEVNetwork, device: torch.device, precision: str, ways: Sequence[str], repeats: int, seed: int
) -> dict[str, Any]:
    """Time a network in several ways of running."""
    inputs = example_inputs(network, window_side(network.config), seed)
    out: dict[str, Any] = {
        "network": dataclasses.asdict(network.config),
        "parameters": sum(p.numel() for p in network.parameters()),
        "window": list(inputs.latent.shape[1:]),
        "precision": str(choose_precision(precision, device)).removeprefix("torch."),
        "ways": {},
    }
    for name in ways:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        prepared = prepare(copy.deepcopy(network), device, precision)
        torch.compiler.reset()  # it gives up on a function that it has compiled for eight networks
        try:
            found = measure_way(prepared, inputs, precision, WAYS[name], repeats)
        except NmpError as error:  # a compiler that is missing must not cost the other measurements
            out["ways"][name] = {"error": str(error)}
            continue
        if device.type == "cuda":
            found["gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        torch.compiler.reset()
        found["difference"] = compare(network, device=device, precision=precision, **WAYS[name])
        out["ways"][name] = found
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="repeatable (default: all, on a CPU one)")
    parser.add_argument("--network", action="append", metavar="FILE|KEY=VALUE", help="a network of your own instead")
    parser.add_argument("--weights", type=Path, help="weights of your own instead")
    parser.add_argument("--way", action="append", choices=tuple(WAYS), help="repeatable (default: all, on a CPU eager)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repeats", type=int, help="frames (default 200, on a CPU 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON here, after every case")
    options = parser.parse_intermixed_args()
    device = choose_device(options.device)
    on_gpu = device.type == "cuda"
    ways = options.way or (list(WAYS) if on_gpu else ["eager"])
    repeats = options.repeats or (200 if on_gpu else 20)
    if options.weights:
        networks = {options.weights.stem: load_network(options.weights)[0]}.items()
    elif options.network:
        networks = {"network": make_network(network_config(options.network), options.seed)}.items()
    else:
        names = options.case or (list(CASES) if on_gpu else ["cpu_default"])
        # made one by one: all of them would not fit into a small GPU
        networks = ((n, make_network(NetworkConfig.from_dict(CASES[n]), options.seed)) for n in names)  # type: ignore[assignment]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "cases": {},
    }
    for name, network in networks:
        row = measure_case(network, device, options.precision, ways, repeats, options.seed)
        result["cases"][name] = row
        print(json.dumps({name: row["ways"]}), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except NmpError as error:
        raise SystemExit(f"inference: error: {error}") from None
