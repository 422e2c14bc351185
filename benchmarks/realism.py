"""How simulated images compare with real ones, measured at the same places with the same cameras.

python benchmarks/realism.py --frames DATAROOT

DATAROOT is a nuScenes folder with real keyframes and the map expansion. Every keyframe is simulated on its own map,
at its own poses and calibrations, in four kinds of weather. Writes docs/realism.md, docs/pictures/realism_* and the
numbers (docs/pictures/realism.json). Of the real images only measurements are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from shapely.geometry import LineString, Point

from nmp.citymap import CityMap, load_with_tables
from nmp.errors import NmpError
from nmp.frame import CAMERAS, Camera
from nmp.geometry import inverse, transform_from, yaw_of
from nmp_train.sim.boxes import Boxes, nearest
from nmp_train.sim.drive import Trajectory
from nmp_train.sim.make import make_renderer
from nmp_train.sim.render import Ground
from nmp_train.sim.scenery import make_scenery
from nmp_train.sim.surface import paint_surface
from nmp_train.sim.traffic import make_traffic

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

Array = NDArray[np.float64]
Image = NDArray[np.uint8]

WEATHERS = ("day", "rain", "night", "night rain")
BANDS_M = ((5, 10), (10, 20), (20, 30))
ROW_BANDS, BINS = 30, 32
SEEN = 0.08
"""a marking counts as seen when it is brighter than the road beside it by this share"""
BESIDE_M, SHIFT_M = 0.4, 0.35
VIEW_M = 120.0
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Shot:
    """One real image and where it was taken."""

    camera: Camera
    """for images of the measured size"""
    map_from_camera: Array
    """[4, 4]"""
    image: Image
    """[height, width, 3] RGB"""


@dataclass(frozen=True)
class Keyframe:
    """One real sample with its six images."""

    name: str
    location: str
    date: str
    map_from_base: Array
    """[4, 4] ego pose of the front camera"""
    shots: tuple[Shot, ...]


def read_keyframes(dataroot: Path, width: int) -> list[Keyframe]:
    """Read all samples of a nuScenes folder, their images reduced to ``width`` pixels."""
    from nuscenes.nuscenes import NuScenes

    versions = sorted(p.name for p in dataroot.glob("v1.0-*") if p.is_dir())
    if not versions:
        raise NmpError(f"{dataroot} has no v1.0-* folder: give the data root of a nuScenes data set with --frames")
    data = NuScenes(versions[0], str(dataroot), verbose=False)
    out = []
    for sample in data.sample:
        scene = data.get("scene", sample["scene_token"])
        log = data.get("log", scene["log_token"])
        shots, poses = [], []
        for name in CAMERAS:
            row = data.get("sample_data", sample["data"][name.upper()])
            sensor, ego = (data.get(table, row[f"{table}_token"]) for table in ("calibrated_sensor", "ego_pose"))
            base_from_camera, map_from_base = _transform(sensor), _transform(ego)
            path = dataroot / row["filename"]
            full = cv2.imread(str(path))
            if full is None:
                raise NmpError(f"cannot read {path}: unpack the images of the data set again")
            camera = Camera(name, row["width"], row["height"], np.array(sensor["camera_intrinsic"]), base_from_camera)
            small = _resized(camera, width)
            reduced = cv2.resize(full, (small.width, small.height), interpolation=cv2.INTER_AREA)
            image = np.asarray(cv2.cvtColor(reduced, cv2.COLOR_BGR2RGB), dtype=np.uint8)
            shots.append(Shot(small, map_from_base @ base_from_camera, image))
            poses.append(map_from_base)
        out.append(Keyframe(scene["name"], log["location"], log["date_captured"], poses[0], tuple(shots)))
    if not out:
        raise NmpError(f"{dataroot} has no samples: give a data root with keyframes")
    return out


def _transform(row: dict[str, Any]) -> Array:
    w, x, y, z = row["rotation"]
    return transform_from(np.array(row["translation"]), np.array([x, y, z, w]))


def _resized(camera: Camera, width: int) -> Camera:
    """Return the camera for images of another size; whole pixel coordinates are pixel centres."""
    scale = width / camera.width
    height = round(camera.height * scale)
    k = camera.intrinsics.copy()
    k[:2, :2] *= scale
    k[:2, 2] = (k[:2, 2] + 0.5) * scale - 0.5
    return replace(camera, width=width, height=height, intrinsics=k)


def simulate(
    frame: Keyframe, city: CityMap, tables: dict[str, Any], seed: int, draws: int
) -> dict[str, list[list[Image]]]:
    """Return images by weather, one list of six for each of ``draws`` draws of light, traffic and noise."""
    x, y = frame.map_from_base[:2, 3]
    bounds = (x - VIEW_M, y - VIEW_M, x + VIEW_M, y + VIEW_M)
    wider = (bounds[0] - 10, bounds[1] - 10, bounds[2] + 10, bounds[3] + 10)  # its cut edges stay out of sight
    ground = Ground.of([paint_surface(city.within(wider), bounds, seed)])
    scenery = make_scenery(tables, seed)
    # The car drives slowly through the place.
    times = np.arange(-2.0, 2.01, 0.5)
    heading = yaw_of(frame.map_from_base)
    way = np.column_stack([x + 3 * times * np.cos(heading), y + 3 * times * np.sin(heading), np.full(9, heading)])
    drive = Trajectory(frame.location, frame.date, times, way)
    width, height = frame.shots[0].camera.width, frame.shots[0].camera.height
    out: dict[str, list[list[Image]]] = {weather: [] for weather in WEATHERS}
    for draw in range(draws):
        boxes = nearest(Boxes.joined([make_traffic(tables, drive, seed + draw).at(0.0), scenery]), way[4], VIEW_M, 2000)
        call = make_renderer(ground, seed + draw)
        for weather in WEATHERS if draw == 0 else WEATHERS[:1]:
            images = call(
                np.stack([s.camera.intrinsics for s in frame.shots]),
                np.stack([s.map_from_camera for s in frame.shots]),
                boxes,
                size=(width, height),
                weather=weather,
                seed=0,
            )
            out[weather].append([_through_jpeg(image) for image in images])
    return out


def _through_jpeg(image: Image) -> Image:
    """Compress like a data set on disk, and read again."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return np.asarray(cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))


def luminance(image: Image) -> Array:
    """Return [height, width] in 0..1 for an RGB image, as displayed."""
    return np.asarray(image @ np.array([0.299, 0.587, 0.114]) / 255)


def noise_level(grey: Array) -> float:
    """Return the standard deviation of the finest grain of [height, width] luminance; edges hardly count.

    From the median of the diagonal differences in blocks of two by two pixels, as in wavelet denoising.
    """
    rows, cols = (n // 2 * 2 for n in grey.shape)
    g = grey[:rows, :cols]
    diagonal = (g[::2, ::2] - g[::2, 1::2] - g[1::2, ::2] + g[1::2, 1::2]) / 2
    return float(np.median(np.abs(diagonal)) / 0.6745)


def spectrum(grey: Array, bins: int = 24) -> tuple[Array, Array]:
    """Return (frequencies [bins] in cycles per pixel, mean log10 of the power there) of a luminance image."""
    window = np.outer(np.hanning(grey.shape[0]), np.hanning(grey.shape[1]))
    power = np.abs(np.fft.rfft2((grey - grey.mean()) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(grey.shape[0])[:, None], np.fft.rfftfreq(grey.shape[1])[None])
    edges = np.geomspace(0.01, 0.45, bins + 1)
    place = np.digitize(radius.ravel(), edges) - 1
    good = (place >= 0) & (place < bins)
    total = np.bincount(place[good], power.ravel()[good], bins)
    count = np.bincount(place[good], minlength=bins)
    return np.sqrt(edges[:-1] * edges[1:]), np.log10(total / np.maximum(count, 1) + 1e-12)


def slope(frequency: Array, power: Array) -> float:
    """Return the exponent of a power law fitted to a spectrum between 0.02 and 0.35 cycles per pixel."""
    inside = (frequency > 0.02) & (frequency < 0.35)
    return float(np.polyfit(np.log10(frequency[inside]), power[inside], 1)[0])


def painted_lines(city: CityMap, xy: Array, reach: float) -> list[LineString]:
    """Return the dividers and the outlines of crossings within ``reach`` m of a place."""
    near = Point(xy).buffer(reach)
    found = [*city.road_dividers.near(near), *city.lane_dividers.near(near)]
    found += [c.exterior for c in city.crossings.near(near)]
    cut = [part for line in found for part in shapely.get_parts(line.intersection(near))]
    return [part for part in cut if part.geom_type == "LineString" and part.length > 1]


def marking_contrast(grey: Array, camera: Camera, map_from_camera: Array, lines: Sequence[LineString]) -> Array:
    """Return [N, 3] of the places along lines that an image shows: distance (m), contrast there, best contrast nearby.

    The contrast is (on the line - ``BESIDE_M`` to its sides) / beside; "nearby" means that the line may lie up to
    ``SHIFT_M`` to either side, as the maps of real cities are that exact.
    """
    offsets = np.arange(-0.8, 0.801, 0.05)
    rows = []
    for line in lines:
        s = np.arange(0.25, line.length, 0.5)
        if not len(s):
            continue
        at, ahead = (shapely.get_coordinates(line.interpolate(s + d)) for d in (-0.1, 0.1))
        along = ahead - at
        along /= np.maximum(np.hypot(*along.T), 1e-9)[:, None]
        normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
        points = ((at + ahead) / 2)[:, None] + offsets[None, :, None] * normal[:, None]  # [S, O, 2]
        flat = np.concatenate([points, np.zeros_like(points[..., :1]), np.ones_like(points[..., :1])], axis=-1)
        seen = flat @ inverse(map_from_camera).T  # [S, O, 4]
        pixel = seen[..., :3] @ camera.intrinsics.T
        depth = pixel[..., 2]
        uv = pixel[..., :2] / np.maximum(depth, 0.1)[..., None]
        inside = (depth > 1) & (uv > 1).all(axis=-1) & (uv < [camera.width - 2, camera.height - 2]).all(axis=-1)
        kept = inside.all(axis=1)
        if not kept.any():
            continue
        profile = map_coordinates(grey, uv[kept][..., ::-1].reshape(-1, 2).T, order=1).reshape(-1, len(offsets))
        contrast = _contrasts(profile, offsets)
        distance = np.hypot(*((at[kept] - map_from_camera[:2, 3]).T))
        middle = contrast.shape[1] // 2
        rows.append(np.column_stack([distance, contrast[:, middle], contrast.max(axis=1)]))
    return np.concatenate(rows) if rows else np.zeros((0, 3))


def _contrasts(profile: Array, offsets: Array) -> Array:
    """Contrast [S, D] of profiles [S, O] for lines that lie 0.05 m apart around the middle."""
    step = offsets[1] - offsets[0]
    beside, reach = round(BESIDE_M / step), round(SHIFT_M / step)
    middle = len(offsets) // 2
    smooth = (profile[:, :-2] + profile[:, 1:-1] + profile[:, 2:]) / 3  # a line is wider than one step
    places = np.arange(middle - reach, middle + reach + 1) - 1
    on = smooth[:, places]
    off = (smooth[:, np.maximum(places - beside, 0)] + smooth[:, np.minimum(places + beside, smooth.shape[1] - 1)]) / 2
    return np.asarray((on - off) / np.maximum(off, 0.02))


def measure(images: Sequence[Image], contrasts: Sequence[Array]) -> dict[str, Any]:
    """Return the measurements of some images; ``contrasts`` are their marking contrasts."""
    greys = [luminance(image) for image in images]
    colours = [cv2.cvtColor(image, cv2.COLOR_RGB2HSV) for image in images]
    edges = [cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 60, 150) > 0 for image in images]
    everything = np.concatenate([g.ravel() for g in greys])
    saturation = np.stack([c[..., 1] / 255 for c in colours])

    def by_row(values: NDArray[Any]) -> list[float]:
        return [round(float(part.mean()), 4) for part in np.array_split(np.mean(values, axis=(0, 2)), ROW_BANDS)]

    spectra = [spectrum(g) for g in greys]
    power = np.mean([p for _, p in spectra], axis=0)
    places = np.concatenate([np.zeros((0, 3)), *contrasts])
    marking = {}
    for low, high in BANDS_M:
        inside = places[(places[:, 0] >= low) & (places[:, 0] < high)]
        if len(inside):
            marking[f"{low}-{high} m"] = {
                "places": len(inside),
                "contrast": round(float(inside[:, 1].mean()), 3),
                "best_nearby": round(float(np.median(inside[:, 2])), 3),
                "seen": round(float((inside[:, 2] > SEEN).mean()), 3),
            }
    return {
        "images": len(images),
        "brightness": round(float(everything.mean()), 4),
        "horizon_brightness": round(float(np.mean([g[int(0.42 * len(g)) : int(0.6 * len(g))] for g in greys])), 4),
        "brightness_spread": round(float(np.mean([g.std() for g in greys])), 4),
        "dark_5": round(float(np.quantile(everything, 0.05)), 4),
        "bright_95": round(float(np.quantile(everything, 0.95)), 4),
        "clipped": round(float((everything > 0.985).mean()), 4),
        "saturation": round(float(saturation.mean()), 4),
        "edges": round(float(np.mean(edges)), 4),
        "spectrum_slope": round(slope(spectra[0][0], power), 3),
        "noise": round(float(np.mean([noise_level(g) for g in greys])), 5),
        "marking": marking,
        "curves": {
            "brightness_histogram": (np.histogram(everything, BINS, (0, 1))[0] / len(everything)).round(5).tolist(),
            "saturation_histogram": (np.histogram(saturation, BINS, (0, 1))[0] / saturation.size).round(5).tolist(),
            "brightness_by_row": by_row(np.stack(greys)),
            "saturation_by_row": by_row(saturation),
            "edges_by_row": by_row(np.stack(edges)),
            "frequency": spectra[0][0].round(4).tolist(),
            "power": power.round(3).tolist(),
        },
    }


def compare(frames: Sequence[Keyframe], dataroot: Path, seed: int, draws: int, pictures: Path) -> dict[str, Any]:
    """Simulate and measure the keyframes; write a sheet of simulated images for each."""
    images: dict[str, list[Image]] = {name: [] for name in ("real", *WEATHERS)}
    contrasts: dict[str, list[Array]] = {name: [] for name in images}
    for frame in frames:
        city, tables = load_with_tables(dataroot, frame.location, repair=True)
        tables = {**tables, "location": frame.location}
        lines = painted_lines(city, frame.map_from_base[:2, 3], 33.0)
        made = simulate(frame, city, tables, seed, draws)
        for name, sets in {"real": [[s.image for s in frame.shots]], **made}.items():
            for shown in sets:
                for shot, image in zip(frame.shots, shown, strict=True):
                    images[name].append(image)
                    contrasts[name].append(marking_contrast(luminance(image), shot.camera, shot.map_from_camera, lines))
        _write_sheet(pictures / f"realism_{frame.name}.jpg", made)
    return {name: measure(images[name], contrasts[name]) for name in images}


def _write_sheet(path: Path, made: dict[str, list[list[Image]]], width: int = 300) -> None:
    order = [CAMERAS.index(name) for name in ("cam_front_left", "cam_front", "cam_front_right")]
    order += [CAMERAS.index(name) for name in ("cam_back_left", "cam_back", "cam_back_right")]
    strips = []
    for weather in WEATHERS:
        small = [made[weather][0][k] for k in order]
        height = round(width * small[0].shape[0] / small[0].shape[1])
        strip = np.concatenate([cv2.resize(i, (width, height), interpolation=cv2.INTER_AREA) for i in small], axis=1)
        cv2.putText(strip, weather, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(strip, weather, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (255, 255, 255), 1, cv2.LINE_AA)
        strips.append(strip)
    sheet = cv2.cvtColor(np.concatenate(strips), cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(path), sheet, [cv2.IMWRITE_JPEG_QUALITY, 80]):
        raise NmpError(f"cannot write {path}: is the disk full?")


def write_curves(numbers: dict[str, Any], path: Path) -> None:
    """Draw the distributions of real and simulated images over each other."""
    colours = {"real": "black", "day": "tab:blue", "rain": "tab:cyan", "night": "tab:purple", "night rain": "tab:pink"}
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), dpi=80)
    middle, rows = (np.arange(BINS) + 0.5) / BINS, (np.arange(ROW_BANDS) + 0.5) / ROW_BANDS
    panels = (
        ("brightness_histogram", middle, "brightness", "share of pixels"),
        ("saturation_histogram", middle, "colour saturation", "share of pixels"),
        ("power", None, "cycles per pixel", "log10 power"),
        (None, None, "distance", "contrast of markings (best nearby)"),
        ("brightness_by_row", rows, "image row, top to bottom", "brightness"),
        ("saturation_by_row", rows, "image row, top to bottom", "colour saturation"),
        ("edges_by_row", rows, "image row, top to bottom", "edge pixels"),
        (None, None, "distance", "markings seen"),
    )
    for axis, (key, x, below, beside) in zip(axes.ravel(), panels, strict=True):
        for name, colour in colours.items():
            row = numbers[name]
            width = 2.2 if name in ("real", "day") else 1.0
            if key:
                axis.plot(row["curves"]["frequency"] if x is None else x, row["curves"][key], color=colour, lw=width)
            else:
                field = "seen" if beside.endswith("seen") else "best_nearby"
                bands = list(row["marking"])
                axis.plot(bands, [row["marking"][b][field] for b in bands], "o-", color=colour, lw=width, label=name)
        if key == "power":
            axis.set_xscale("log")
        elif key and key.startswith("saturation_h"):
            axis.set_yscale("log")
        axis.set_xlabel(below)
        axis.set_ylabel(beside)
        axis.grid(alpha=0.3)
    axes[0, 3].legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


_QUANTITIES = {
    "brightness": "mean brightness (0..1)",
    "horizon_brightness": "mean brightness around the horizon",
    "brightness_spread": "spread of brightness in an image",
    "dark_5": "brightness of the darkest 5 %",
    "bright_95": "brightness of the brightest 5 %",
    "clipped": "share of clipped pixels",
    "saturation": "mean colour saturation",
    "edges": "share of edge pixels",
    "spectrum_slope": "slope of the power spectrum",
    "noise": "finest grain (noise)",
}


def rows_of(numbers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the quantities of the table: by name, then by kind of image."""
    out = {label: {name: row[key] for name, row in numbers.items()} for key, label in _QUANTITIES.items()}
    for low, high in BANDS_M:
        band = f"{low}-{high} m"
        for field, label in (
            ("contrast", "marking contrast at the map's place"),
            ("best_nearby", "marking contrast, best nearby"),
        ):
            out[f"{label}, {band}"] = {n: r["marking"][band][field] for n, r in numbers.items() if band in r["marking"]}
        out[f"markings seen, {band}"] = {
            n: r["marking"][band]["seen"] for n, r in numbers.items() if band in r["marking"]
        }
    return out


def differences(table: dict[str, dict[str, float]], within: float = 1.25) -> tuple[list[str], list[str]]:
    """Return (sentences about what differs by more than a factor of ``within``, worst first, names of the rest)."""
    found, rest = [], []
    for label, row in table.items():
        # Where a real map is off by more than half a line, what lies at its place says nothing about paint.
        if "real" not in row or "day" not in row or "at the map's place" in label:
            continue
        real, day = row["real"], row["day"]
        ratio = (abs(day) + 1e-4) / (abs(real) + 1e-4)
        if 1 / within <= ratio <= within:
            rest.append(label)
            continue
        times = f"{ratio:.1f} times" if ratio >= 1 else f"{100 * ratio:.0f} % of"
        text = f"{label}: {times} the real value ({day:.3g} against {real:.3g})"
        found.append((abs(np.log(ratio)), text))
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])], rest


def write_page(numbers: dict[str, Any], frames: Sequence[Keyframe], path: Path) -> None:
    """Write the page from the numbers."""
    table = rows_of(numbers)
    found, rest = differences(table)
    names = list(numbers)
    lines = [
        "# Simulated and real images",
        "",
        "Written by `python benchmarks/realism.py --frames DATAROOT`, numbers included; do not edit it by hand.",
        "",
        f"{numbers['real']['images']} real images (" + ", ".join(f"{f.name}, {f.location}" for f in frames) + ") and",
        "simulated images of the same places, with the same poses and calibrations, on the same maps. The simulated",
        f"day column is the mean of {numbers['day']['images']} images with other traffic and light each time. The real",
        "images were taken by day and in dry weather, so only the day column should match them; the others show what",
        "the simulated weather does. Real images are measured, not shown.",
        "",
        f"![measurements of real and simulated images]({'pictures/realism_curves.png'})",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for label, row in table.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[n]:.3g}" if n in row else "" for n in names) + " |")
    lines += [
        "",
        "Marking contrast is (brightness on a divider or the outline of a crossing - brightness 0.4 m beside it) / ",
        f'beside, sampled every half metre along the map\'s lines; "best nearby" lets the line lie up to {SHIFT_M} m',
        f"off, as real maps are that exact; a marking is seen when that exceeds {SEEN}. Lines that no paint marks and",
        "lines behind vehicles are counted too, in both. The grain is measured after the images were reduced to",
        f"{frames[0].shots[0].camera.width} pixels of width.",
        "",
        "## What still differs",
        "",
        "Simulated day images against the real ones, worst first:" if found else "Nothing by more than a quarter.",
        "",
        *(f"- {text}" for text in found),
        "",
        *(["Within a quarter: " + "; ".join(rest) + "."] if rest else []),
        "",
        "## The simulated images",
        "",
    ]
    for frame in frames:
        lines += [
            f"At the place of {frame.name}:",
            "",
            f"![{frame.name} simulated](pictures/realism_{frame.name}.jpg)",
            "",
        ]
    path.write_text("\n".join(line.rstrip() for line in lines).rstrip() + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True, help="data root of real keyframes, with map expansion")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write into")
    parser.add_argument("--width", type=int, default=800, help="of the measured images, pixels")
    parser.add_argument("--draws", type=int, default=4, help="how often the day is simulated")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    pictures = arguments.docs / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    frames = read_keyframes(arguments.frames, arguments.width)
    numbers = compare(frames, arguments.frames, arguments.seed, arguments.draws, pictures)
    write_curves(numbers, pictures / "realism_curves.png")
    (pictures / "realism.json").write_text(json.dumps(numbers, indent=1) + "\n")
    write_page(numbers, frames, arguments.docs / "realism.md")
    for text in differences(rows_of(numbers))[0]:
        print(text)


if __name__ == "__main__":
    try:
        main()
    except NmpError as error:
        raise SystemExit(f"realism: error: {error}") from None
