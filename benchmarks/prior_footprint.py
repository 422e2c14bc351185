"""How many bytes the prior takes per km of road, and what that costs in accuracy, over weights, coding, bits and cells.

    python benchmarks/prior_footprint.py --trajectories ../shared/real/val_trajectories.json \
        [--weights cpu_default my.safetensors ...] [--data DIR ...] [--steps 96 128 192 256 384] [--bits 8 6 4 3 2] \
        [--cells 0.3 0.6] [--stride 3] [--every 4] [--out prior_footprint.json] [--plot prior_footprint.png]

Accuracy: in simulated cities that no training saw (``--data`` names data sets that are there already) each route is
driven several times. The drives but the last ones are mapped with the weights and committed to a prior, once for each
setting: stored, compacted, opened again. The last ones are then mapped with that prior, which stays as it is, and
scored; the reference is the same with cells in float32 that no file ever held. A coding (``step``) is made from one
data set, the last of ``--data``, and scored on the others; ``shipped`` is the one beside the weights.

Bytes: the recorded trajectories leave in each cell the evidence that a frame has on average at that place around the
car, summed over their poses. Each of these tiles is filled with the latents of a tile of the simulated cities that is
known nearly as a whole, and all of them are written as the base of a city. What counts is every byte below the folder
of the city: tiles, records, their copies, checksums, descriptions. ``--every 4`` does that with every fourth file.
"apart" is the same before anything is compacted: every trajectory is a drive of its own (of every fourth one).

Cells twice as large as those of the network are stand-ins, the weighted means of four: it was not trained for them.
Cells that are smaller than the network's are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from nmp.changelog import local_date
from nmp.evaluation import CityMaps
from nmp.geometry import yaw_of
from nmp.mapper import OnlineMapper
from nmp.metrics import IouMeter
from nmp.model import fusion
from nmp.model.network import BEVNetwork
from nmp.model.preprocess import network_input
from nmp.model.runner import quantize, read_quantized, window_side
from nmp.model.weights import read_description
from nmp.prior import CityPrior, PriorSpec, Window
from nmp.prior.cells import Cells, on_grid
from nmp.prior.coding import coding_of, make_coding
from nmp.prior.ledger import Ledger, State, create
from nmp.prior.record import Record, tile_table
from nmp.prior.storage import Storage
from nmp.prior.tiles import TILE, Key
from nmp.prior.upkeep import compact, digests
from nmp.truth import rasterize
from nmp_train.coding import reads_of
from nmp_train.evaluate import Scene, read_scenes, scene_frames

HALF = TILE // 2
SEEDS = (501, 502, 503)
FULL = 0.9
"""share of its cells that a tile has to know to be pasted"""


@dataclass
class Drive:
    """What is kept of a scene: features instead of images."""

    location: str
    bev: torch.Tensor
    """[T, C, rows, cols] half precision"""
    truth: NDArray[np.uint8]
    """[T, 3, rows, cols]"""
    poses: list[tuple[float, float, float]]
    stamps: list[int]


@dataclass
class City:
    """Drives of one data set: those that write the prior, and those that are scored."""

    location: str
    before: list[Drive]
    scored: list[Drive]
    origin: tuple[int, int]
    """(row, column) of the first cell"""
    shape: tuple[int, int]
    memory: fusion.Memory
    """after the drives before, in float32"""


# -- drives -------------------------------------------------------------------------------------------------


def render(folder: Path, seed: int) -> Path:
    """Make a data set: two routes of a city of its own, each driven three times."""
    data = folder / f"city-{seed}"
    arguments = ["--seed", seed, "--routes", 2, "--passes", 3, "--weather", "mixed", "--duration", 16]
    arguments += ["--render-scale", 0.22, "--out", data]
    subprocess.run([sys.executable, "-m", "nmp_train.cli", "sim", *map(str, arguments)], check=True)
    return data


@torch.no_grad()
def encoded(network: BEVNetwork, data: Path, scene: Scene, maps: CityMaps) -> Drive:
    """Run the part of the network that needs no prior, and draw the truth."""
    frames = scene_frames(scene)
    bev, truth, poses, stamps = [], [], [], []
    for frame, true in zip(frames.frames, frames.true_poses, strict=True):
        bev.append(network.encode(*network_input(frame, network.config))[0].half())
        city = maps.city(scene.location, local_date(scene.location, frame.stamp_ns))
        place = float(true[0, 3]), float(true[1, 3]), yaw_of(true)
        truth.append(rasterize(city, *place, network.config.layer_grid))
        pose = frame.map_from_base
        poses.append((float(pose[0, 3]), float(pose[1, 3]), yaw_of(pose)))
        stamps.append(frame.stamp_ns)
    return Drive(scene.location, torch.stack(bev), np.stack(truth), poses, stamps)


def read_city(network: BEVNetwork, data: Path, version: str) -> City:
    """Encode all drives of a data set of one city; the last drive of each of its two routes is scored."""
    maps = CityMaps(data)
    scenes = read_scenes(data, version)
    drives = [encoded(network, data, scene, maps) for scene in tqdm(scenes, desc=data.name, unit="drive")]
    cell, side = network.config.prior_cell, window_side(network.config)
    points = np.concatenate([[pose[:2] for pose in drive.poses] for drive in drives])
    # whole tiles, so that what is stored lies on them
    low = np.floor((points.min(0) / cell - side) / TILE).astype(int) * TILE
    high = np.ceil((points.max(0) / cell + side) / TILE).astype(int) * TILE
    shape = int(high[1] - low[1]), int(high[0] - low[0])
    memory = fusion.Memory.empty(1, network.state_channels, *shape)
    city = City(drives[0].location, drives[:-2], drives[-2:], (int(low[1]), int(low[0])), shape, memory)
    for drive in city.before:
        for t in range(len(drive.poses)):
            step(network, city, memory, drive, t, write=True)
    return city


@torch.no_grad()
def step(
    network: BEVNetwork, city: City, memory: fusion.Memory, drive: Drive, t: int, *, write: bool = False
) -> torch.Tensor:
    """Map one frame with what is remembered; return the logits [3, rows, cols]."""
    cell, side = network.config.prior_cell, window_side(network.config)
    x, y, yaw = drive.poses[t]
    window = Window.around(x, y, cell, side, side)
    rows, cols = window.row - city.origin[0], window.col - city.origin[1]
    part = (slice(None), slice(None), slice(rows, rows + side), slice(cols, cols + side))
    pose = torch.tensor([[x - window.col * cell, y - window.row * cell, yaw]])
    before = fusion.Memory(memory.latent[part], memory.evidence[part])
    output, after = network.step(drive.bev[t][None].float(), before, pose, torch.zeros(1, 2))
    if write:
        memory.latent[part], memory.evidence[part] = after.latent, after.evidence
    return output.logits[0]


@torch.no_grad()
def drive_into(network: BEVNetwork, prior: CityPrior, drive: Drive) -> None:
    """Map a drive with a stored prior, as the mapper does."""
    config = network.config
    side = window_side(config)
    region = torch.ones(1, 1, *config.feature_grid.shape)
    cap, network.fusion.cap = network.fusion.cap, math.inf  # the prior caps what it stores
    for t, (x, y, yaw) in enumerate(drive.poses):
        window = Window.around(x, y, config.prior_cell, side, side)
        latent, evidence = prior.read(window)
        stored = torch.from_numpy(latent)[None], torch.from_numpy(evidence.view(np.int16))[None, None]
        pose = torch.tensor([[x - window.col * config.prior_cell, y - window.row * config.prior_cell, yaw]])
        origin = torch.zeros(1, 2)
        output, memory = network.step(drive.bev[t][None].float(), read_quantized(*stored), pose, origin)
        if output.alignment is not None:
            pose = fusion.moved(pose, output.alignment.offset)
        seen = fusion.ego_to_map(region, pose, config.feature_grid, origin, config.prior_cell, side, side) > 0
        codes, weight = (values[0].numpy() for values in quantize(memory))
        prior.write(window, codes, weight[0].view(np.uint16), drive.stamps[t], seen[0, 0].numpy())
    network.fusion.cap = cap


def score(network: BEVNetwork, city: City, memory: fusion.Memory, stride: int, meter: IouMeter) -> None:
    """Count the frames of the drives that are scored, with a prior that stays as it is."""
    for drive in city.scored:
        for t in range(0, len(drive.poses), stride):
            meter.add((step(network, city, memory, drive, t) > 0).numpy(), drive.truth[t])


# -- settings -----------------------------------------------------------------------------------------------


def four(values: NDArray[Any]) -> NDArray[Any]:
    """Return [..., rows, cols] as [..., rows / 2, 2, cols / 2, 2]."""
    return values.reshape(*values.shape[:-2], HALF, 2, HALF, 2)


def coarser(tiles: dict[Key, Cells]) -> dict[Key, Cells]:
    """Return tiles of cells twice as long, each the weighted mean of four."""
    out: dict[Key, Cells] = {}
    for (row, col), cells in tiles.items():
        new = out.setdefault((row // 2, col // 2), Cells(len(cells.latent)))
        part = tuple(slice(i % 2 * HALF, i % 2 * HALF + HALF) for i in (row, col))
        weight = four(cells.evidence.astype(np.float64)).sum((-3, -1))
        sums = four(cells.latent * cells.evidence.astype(np.float64)).sum((-3, -1))
        new.latent[:, part[0], part[1]] = np.rint(sums / np.maximum(weight, 1))
        new.evidence[part] = np.minimum(weight / 4, 65535)
        new.last_seen_s[part] = four(cells.last_seen_s).max((-3, -1))
        new.traversals[part] = four(cells.traversals).max((-3, -1))
    return out


def rounded(tiles: dict[Key, Cells], bits: int) -> dict[Key, Cells]:
    """Return copies on the grid of so many bits."""
    out = {key: cells.copy() for key, cells in tiles.items()}
    for cells in out.values():
        cells.latent[...] = on_grid(cells.latent, bits) * (cells.evidence > 0)
    return out


def publish(ledger: Ledger, tiles: dict[Key, Cells], first_ns: int, drives: tuple[str, ...] = ()) -> Record:
    """Write tiles as a drive of a city, or as its base (``drives``)."""

    def describe(rows: list[tuple[int, int, int, int]]) -> Record:
        return Record(ledger.location, ledger.spec, "", first_ns, first_ns, tile_table(rows), drives)

    return ledger.publish(describe, tiles, lambda keys: {key: tiles[key].copy() for key in keys})


def reloaded(folder: Path, city: City, spec: PriorSpec, scale: int) -> fusion.Memory:
    """Return the cells of a stored city, over the area of its drives; they are ``scale`` times the network's."""
    rows, cols = (size // scale for size in city.shape)
    window = Window(city.origin[0] // scale, city.origin[1] // scale, rows, cols)
    with CityPrior.open(folder, city.location, spec, read_only=True) as prior:
        latent, evidence = prior.read(window)
    latent, evidence = latent.repeat(scale, 1).repeat(scale, 2), evidence.repeat(scale, 0).repeat(scale, 1)
    return read_quantized(torch.from_numpy(latent)[None], torch.from_numpy(evidence.view(np.int16))[None, None])


# -- bytes along recorded trajectories ----------------------------------------------------------------------


def length_km(scenes: Sequence[dict[str, Any]]) -> float:
    """Return how far all scenes were driven."""
    paths = [scene["poses_xyyaw"] for scene in scenes]
    return sum(math.dist(a[:2], b[:2]) for path in paths for a, b in zip(path, path[1:], strict=False)) / 1e3


@torch.no_grad()
def glance(network: BEVNetwork, cities: list[City]) -> torch.Tensor:
    """Return the weight [1, 1, rows, cols] that a frame has on average at each place around the car."""
    total = torch.zeros(1, 1, *network.config.feature_grid.shape)
    frames = [frame for city in cities for drive in city.before for frame in drive.bev[::4]]
    for frame in frames:
        total += network.fusion.observe(frame[None].float())[1]
    return total / len(frames)


def touched(
    scenes: Sequence[dict[str, Any]], network: BEVNetwork, weight: torch.Tensor, cell: float
) -> dict[str, dict[Key, NDArray[np.uint16]]]:
    """Return by city and tile the evidence [64, 64] that all scenes leave; places that scenes share are there once."""
    found: dict[str, dict[Key, NDArray[np.uint16]]] = {}
    grid = network.config.feature_grid
    side = math.ceil(window_side(network.config) * network.config.prior_cell / cell)
    for location in sorted({scene["location"] for scene in scenes}):
        poses = np.concatenate([scene["poses_xyyaw"] for scene in scenes if scene["location"] == location])
        low = np.floor((poses[:, :2].min(0) - 60) / cell / TILE).astype(int)
        size = np.ceil((poses[:, :2].max(0) + 60) / cell / TILE).astype(int) - low
        city = np.zeros((size[1] * TILE, size[0] * TILE), np.float32)
        for x, y, yaw in poses.tolist():
            window = Window.around(x, y, cell, side, side)
            pose = torch.tensor([[x - window.col * cell, y - window.row * cell, yaw]])
            seen = fusion.ego_to_map(weight, pose, grid, torch.zeros(1, 2), cell, side, side)[0, 0].numpy()
            row, col = window.row - low[1] * TILE, window.col - low[0] * TILE
            city[row : row + side, col : col + side] += seen
        tiles = city.reshape(size[1], TILE, size[0], TILE)
        steps = np.minimum(tiles, network.config.evidence_cap) * fusion.EVIDENCE_SCALE
        places = np.argwhere((steps >= 1).any((1, 3))).tolist()
        found[location] = {(r + int(low[1]), c + int(low[0])): steps[r, :, c].astype(np.uint16) for r, c in places}
    return found


def pasted(evidence: dict[Key, NDArray[np.uint16]], sources: list[Cells]) -> dict[Key, Cells]:
    """Return tiles with this evidence, filled with the content of others in turn."""
    out = {}
    for number, key in enumerate(sorted(evidence)):
        cells = sources[number % len(sources)].copy()
        cells.evidence[...] = evidence[key] * (cells.evidence > 0)
        known = cells.evidence > 0
        for values in (cells.last_seen_s, cells.traversals, cells.latent):
            values *= known
        out[key] = cells
    return out


def stored_mb(
    folder: Path,
    cities: dict[str, dict[Key, NDArray[np.uint16]]],
    sources: list[Cells],
    spec: PriorSpec,
    every: int,
) -> tuple[float, float, int]:
    """Return what cities take in MB, in bytes and on a disk with blocks of 4 KiB, folders included, and their tiles."""
    size, blocks, count = 0.0, 0.0, 0
    for location, masks in cities.items():
        storage = Storage(folder / location)
        create(storage, location, spec)
        ledger = Ledger.open(storage)
        files = {key: (key[0] // ledger.shard, key[1] // ledger.shard) for key in masks}
        chosen = set(sorted(set(files.values()))[::every])
        some = {key: masks[key] for key, file in files.items() if file in chosen}
        base = publish(ledger, rounded(pasted(some, sources), spec.bits), 1, ("0" * 32,))
        ledger.change_head(lambda head, base=base: replace(head, base=base.id))
        share = len(masks) / len(some)
        for_some = on_disk_mb(folder / location)
        size, blocks = size + for_some[0] * share, blocks + for_some[1] * share
        count += len(masks)
    return size, blocks, count


def apart_mb(
    folder: Path,
    scenes: list[dict[str, Any]],
    network: BEVNetwork,
    weight: torch.Tensor,
    sources: list[Cells],
    spec: PriorSpec,
) -> tuple[float, float]:
    """Return what scenes take in MB where each is a drive of its own, in bytes and on a disk, folders included."""
    for location in sorted({scene["location"] for scene in scenes}):
        create(Storage(folder / location), location, spec)
    for number, scene in enumerate(scenes):
        ledger = Ledger.open(Storage(folder / scene["location"]))
        [masks] = touched([scene], network, weight, spec.cell).values()
        publish(ledger, rounded(pasted(masks, sources), spec.bits), 10**9 * (number + 1))
    return on_disk_mb(folder)


def on_disk_mb(folder: Path) -> tuple[float, float]:
    """Return the MB of all files below a folder, and what they take in blocks of 4 KiB, folders included."""
    found = [(path.stat().st_size, path.is_dir()) for path in folder.rglob("*")]
    size = sum(size for size, is_folder in found if not is_folder)
    blocks = sum(4096 if is_folder else -(-size // 4096) * 4096 for size, is_folder in found)
    return size / 1e6, blocks / 1e6


# -- all of it ----------------------------------------------------------------------------------------------


def measure(weights: str, data: list[Path], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all settings with one set of weights."""
    every = json.loads(options.trajectories.read_text())
    km = length_km(every)
    with OnlineMapper(Path(weights), folder / "none", use_prior=False, precision="fp32") as mapper:
        network, plain = mapper.network, replace(mapper.city_spec, coding=None)
    cities = [read_city(network, path, options.version) for path in data]
    tested = cities[:-1] if len(cities) > 1 else cities
    drives: list[list[dict[Key, Cells]]] = []
    for number, city in enumerate(tqdm(cities, desc="writing", unit="city")):
        for drive in city.before:
            with CityPrior.open(folder / f"written-{number}", city.location, plain, flush_interval_s=1e6) as prior:
                drive_into(network, prior, drive)
        ledger = Ledger.open(Storage(folder / f"written-{number}" / city.location), read_only=True)
        drives.append([ledger.load(record, digests(record)) for record in ledger.drives()])
    final = State(ledger, ledger.active())
    samples = list(final.load(final.keys()).values())
    weight = glance(network, cities)
    reference, nothing, eight = IouMeter(), IouMeter(), replace(plain, bits=8)
    for city in tested:
        score(network, city, city.memory, options.stride, reference)
        empty = fusion.Memory.empty(1, network.state_channels, *city.shape)
        score(network, city, empty, options.stride, nothing)
    settings = [(f"{bits} bits", replace(eight, bits=bits)) for bits in options.bits]
    for step_size in options.steps:
        settings.append(
            (f"step {step_size:g}", replace(plain, coding=make_coding(samples, reads_of(network), step_size)))
        )
    if (coding := coding_of(read_description(weights))) is not None:
        settings.append(("shipped", replace(plain, coding=coding)))
    rows = []
    own = network.config.prior_cell
    scales = [(cell, scale) for cell in options.cells for scale in (1, 2) if math.isclose(cell, scale * own)]
    if not scales:
        raise SystemExit(f"--cells {options.cells}: {weights} has cells of {own:g} m, give {own:g} or {2 * own:g}")
    for cell, scale in scales:
        masks = touched(every, network, weight, cell)
        for name, spec in settings:
            spec = replace(spec, cell=cell)
            meter, sources = IouMeter(), []
            for number, city in enumerate(tested):
                place = folder / f"{name}-{cell}-{number}"
                create(Storage(place / city.location), city.location, spec)
                ledger = Ledger.open(Storage(place / city.location))
                for count, tiles in enumerate(drives[number]):
                    publish(ledger, rounded(coarser(tiles) if scale > 1 else tiles, spec.bits), 10**9 * (count + 1))
                base = compact(ledger)
                assert base is not None
                found = ledger.load(base, digests(base)).values()
                sources += [cells for cells in found if (cells.evidence > 0).mean() > FULL - 0.2 * (scale > 1)]
                score(network, city, reloaded(place, city, spec, scale), options.stride, meter)
            size, blocks, count = stored_mb(folder / f"all-{name}-{cell}", masks, sources, spec, options.every)
            some = every[:: options.every]
            apart = apart_mb(folder / f"apart-{name}-{cell}", some, network, weight, sources, spec)
            apart_km = length_km(some)
            score_now = meter.percent()
            rows.append(
                {
                    "setting": name,
                    "channels": plain.channels,
                    "cell_m": cell,
                    "components": spec.coding.components if spec.coding else plain.channels,
                    "mb_per_km": round(size / km, 3),
                    "mb_per_km_in_disk_blocks": round(blocks / km, 3),
                    "apart_mb_per_km": round(apart[0] / apart_km, 3),
                    "apart_mb_per_km_in_disk_blocks": round(apart[1] / apart_km, 3),
                    "tiles": count,
                    "miou": round(score_now["miou"], 2),
                    "below_float32": round(reference.percent()["miou"] - score_now["miou"], 2),
                    "iou": {key: round(value, 2) for key, value in score_now.items() if key != "miou"},
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "weights": weights,
        "channels": plain.channels,
        "fingerprint": plain.fingerprint,
        "trained": read_description(Path(weights)).get("training", {}).get("device", ""),
        "frames_scored": reference.frames,
        "km": round(km, 3),
        "float32": {key: round(value, 2) for key, value in reference.percent().items()},
        "no_prior": {key: round(value, 2) for key, value in nothing.percent().items()},
        "settings": rows,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the settings as a Markdown table."""
    lines = [
        "| weights | channels | cell | setting | MB/km | in disk blocks | apart | mIoU | below float32 |",
        "|---" * 9 + "|",
    ]
    for result in results:
        for row in result["settings"]:
            lines.append(
                f"| {Path(result['weights']).stem} | {row['channels']} | {row['cell_m']} m | {row['setting']} "
                f"| {row['mb_per_km']:.2f} | {row['mb_per_km_in_disk_blocks']:.2f} "
                f"| {row['apart_mb_per_km_in_disk_blocks']:.2f} | {row['miou']:.1f} "
                f"| {row['below_float32']:+.2f} |"
            )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw what is lost over what is stored."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        for cell in sorted({row["cell_m"] for row in result["settings"]}):
            for kind, mark in (("bits", "s"), ("step", "o")):
                rows = [row for row in result["settings"] if row["cell_m"] == cell and kind in row["setting"]]
                points = sorted((row["mb_per_km"], row["below_float32"]) for row in rows)
                name = f"{Path(result['weights']).stem}, {cell} m, {'by blocks' if kind == 'step' else 'bits'}"
                axes.plot(*zip(*points, strict=True), f"{mark}-", markersize=4, label=name) if points else None
    axes.axvline(0.3, color="grey", linewidth=0.8)
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="MB per km of road driven", ylabel="mIoU below float32")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", default=["cpu_default"])
    parser.add_argument("--data", type=Path, nargs="+", help="data sets of one city each, rendered before")
    parser.add_argument("--version", default="v1.0-mini")
    parser.add_argument("--steps", type=float, nargs="*", default=[96, 128, 192, 256, 384])
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 6, 4, 3, 2])
    parser.add_argument("--cells", type=float, nargs="+", default=[0.3, 0.6], help="m; the network's own, or twice")
    parser.add_argument("--stride", type=int, default=3, help="score every so many frames")
    parser.add_argument("--every", type=int, default=4, help="write every so many of the files of tiles")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--plot", type=Path, help="also draw a picture (.png)")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        data = options.data or [render(Path(temporary), seed) for seed in SEEDS]
        for number, weights in enumerate(options.weights):
            results.append(measure(weights, data, options, Path(temporary) / str(number)))
            if options.out:  # whatever comes later, this is measured
                options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    print(table(results))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
