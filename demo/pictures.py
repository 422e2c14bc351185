"""The demo's pictures, made of a bag, layers on disk and the true map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nmp import draw
from nmp.assembly import FrameAssembler
from nmp.bags.reader import BagReader
from nmp.evaluation import CityMaps
from nmp.frame import Frame, LocalMap
from nmp.layers import read_layers
from nmp.replay import frames_of


def spread(count: int, wanted: int) -> list[int]:
    """Return up to ``wanted`` positions spread evenly over ``count``, the ends left out where possible."""
    wanted = min(wanted, count)
    return sorted({int((i + 0.5) * count / wanted) for i in range(wanted)})


def city_map(layers: Path, maps: CityMaps, title: str) -> tuple[draw.Picture, draw.Picture]:
    """Return the map that a drive saw, and the true map of the same places."""
    seen = list(read_layers(layers))
    true = [
        LocalMap(m.stamp_ns, m.location, m.map_from_base, m.grid, maps.truth_of(m).astype(np.float32), m.evidence)
        for m in seen
    ]
    return draw.city_picture(seen, title), draw.city_picture(true, "The true map of the same places")


def _keyframes(bag: Path, layers: Path, count: int) -> list[tuple[Frame, LocalMap]]:
    maps = {m.stamp_ns: m for m in read_layers(layers)}
    with BagReader(bag) as reader:
        frames = [f for f in frames_of(reader, FrameAssembler()) if f.stamp_ns in maps]
    return [(frames[i], maps[frames[i].stamp_ns]) for i in spread(len(frames), count)]


def film(bag: Path, systems: Mapping[str, Path], maps: CityMaps, title: str, count: int = 3) -> draw.Picture:
    """Show a few keyframes: cameras with the last system's layers painted in, every system's layers, the truth."""
    *others, (shown, layers) = systems.items()
    by_stamp = {name: {m.stamp_ns: m for m in read_layers(folder)} for name, folder in others}
    strips, captions = [], []
    first = min(m.stamp_ns for m in read_layers(layers))
    for frame, predicted in _keyframes(bag, layers, count):
        panels = [draw.Panel.of(n, found[frame.stamp_ns]) for n, found in by_stamp.items() if frame.stamp_ns in found]
        panels += [draw.Panel.of(shown, predicted), draw.Panel("true map", maps.truth_of(predicted))]
        strips.append(draw.film_strip(frame, panels, predicted.grid, painted=predicted.probabilities))
        captions.append(f"{(frame.stamp_ns - first) * 1e-9:.1f} s into the drive; layers of the {shown} in the cameras")
    return draw.film_sheet(strips, title, captions)


def real_film(scenes: Mapping[str, tuple[Path, Path]], maps: CityMaps, title: str, count: int = 4) -> draw.Picture:
    """Show keyframes of scenes {name: (bag, layers)}: predicted layers beside the true ones, in the cameras too."""
    strips, captions = [], []
    each = max(1, count // len(scenes))
    for name, (bag, layers) in scenes.items():
        for frame, predicted in _keyframes(bag, layers, each):
            sides: dict[str, draw.Layers] = {"predicted": predicted.probabilities, "true map": maps.truth_of(predicted)}
            strips.append(draw.comparison(frame, sides, predicted.grid))
            captions.append(f"{name}, {frame.location}")
    return draw.film_sheet(strips, title, captions)
