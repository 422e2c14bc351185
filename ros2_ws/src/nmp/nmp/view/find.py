"""Which drives there are to look at: bags, and the layers that were made of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nmp import topics
from nmp.bags.reader import BagReader
from nmp.errors import NmpError
from nmp.frame import CLASSES

STORAGE = (".mcap", ".db3")
_GRID = "nav_msgs/msg/OccupancyGrid"
_INSIDE = ("*", "*/*")
"""how deep folders are searched: ``out/demo`` holds ``bags/scene-0001`` and ``layers/first_pass``"""


@dataclass(frozen=True)
class Recording:
    """A bag with layers that were made of it."""

    bag: Path
    layers: Path
    """a folder, or the bag itself where the layers were recorded along with the rest"""
    number: int = 1
    """counts those that would have the same name otherwise"""

    @property
    def name(self) -> str:
        """What people call it: the bag, then the layers where they have another name."""
        layers = self.layers.resolve().stem
        name = self.bag.stem if layers == self.bag.stem else f"{self.bag.stem}, {layers.replace('_', ' ')}"
        return name if self.number == 1 else f"{name} ({self.number})"

    @property
    def slug(self) -> str:
        """A name of its own for addresses and folders."""
        text = f"{self.bag.stem}.{self.layers.resolve().stem}" + (f".{self.number}" if self.number > 1 else "")
        return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in text)


def find_recordings(places: Sequence[Path]) -> list[Recording]:
    """Return the recordings in bags, folders of layers, and folders that hold such; the one to show comes first.

    A bag may hold its layers itself. One bag and one folder of layers belong together as they are. Of more, those
    belong together whose times overlap. Raises :class:`NmpError` for a place that holds neither, and when nothing goes
    together.
    """
    bags: list[Path] = []
    layers: list[Path] = []
    for place in places:
        if not place.exists():
            raise NmpError(f"{place} does not exist: give a bag and the layers of 'nmp map', or the folder of a demo")
        inside = [place] + ([p for depth in _INSIDE for p in sorted(place.glob(depth))] if place.is_dir() else [])
        # the file within a bag's folder is that bag
        found_bags = [p for p in inside if _is_bag(p) and (p == place or not _is_bag(p.parent))]
        found_layers = [p for p in inside if _is_layers(p)]
        if not found_bags and not found_layers:
            raise NmpError(
                f"{place} holds neither a bag nor layers: give a bag and the layers that 'nmp map' made of it"
            )
        bags += [p for p in found_bags if p not in bags]
        layers += [p for p in found_layers if p not in layers]
    if not bags:
        raise NmpError(f"{layers[0]} holds layers only: give the bag, too, that they were made of")
    own = [Recording(bag, bag) for bag in bags if _holds_layers(bag)]
    if not layers and not own:
        raise NmpError(
            f"no layers were recorded of {bags[0]}: make them (nmp map {bags[0]} --prior CITY --out LAYERS) and give "
            "their folder, too"
        )
    if len(bags) == len(layers) == 1:
        return _named_apart([Recording(bags[0], layers[0]), *own])
    found = [*own, *_by_time(bags, layers)]
    if not found:
        raise NmpError("no layers are of the time of any bag: give a bag and the layers that were made of it")
    return _named_apart(_first_what_was_driven_last(found, places))


def _named_apart(recordings: Iterable[Recording]) -> list[Recording]:
    counts: Counter[str] = Counter()
    out = []
    for recording in recordings:
        counts[recording.slug] += 1
        out.append(replace(recording, number=counts[recording.slug]))
    return out


def layer_topics(reader: BagReader) -> dict[str, str]:
    """Return the topics of a mapping node's layers in a bag, by class; nothing where not all of them were recorded.

    Of several nodes the first by name.
    """
    grids = {name for name, topic in reader.topics.items() if topic.count and topic.msgtype == _GRID}
    ending = topics.layer_topic(CLASSES[0]).removeprefix("~")
    for node in sorted(name.removesuffix(ending) for name in grids if name.endswith(ending)):
        of_node = {name: topics.layer_topic(name).replace("~", node) for name in CLASSES}
        if grids.issuperset(of_node.values()):
            return of_node
    return {}


def _holds_layers(bag: Path) -> bool:
    with BagReader(bag) as reader:
        return bool(layer_topics(reader))


def _is_bag(path: Path) -> bool:
    if path.is_file():
        return path.suffix in STORAGE
    return (path / "metadata.yaml").is_file() or any(p.is_file() for s in STORAGE for p in path.glob(f"*{s}"))


def _is_layers(path: Path) -> bool:
    return path.is_dir() and any(p.stem.isdigit() for p in path.glob("*.npz"))


def _by_time(bags: Iterable[Path], layers: Iterable[Path]) -> list[Recording]:
    stamps = {folder: [int(p.stem) for p in folder.glob("*.npz") if p.stem.isdigit()] for folder in layers}
    out = []
    for bag in bags:
        with BagReader(bag) as reader:
            begin, end = reader.start_ns, reader.end_ns
        out += [Recording(bag, f) for f, times in stamps.items() if any(begin <= t <= end for t in times)]
    return out


def _first_what_was_driven_last(found: list[Recording], places: Sequence[Path]) -> list[Recording]:
    """Sort so that the last of a demo's drives comes first; its ``metrics.json`` names them in order."""
    order: list[str] = []
    for place in places:
        try:
            order += json.loads((place / "metrics.json").read_text())["drives"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no demo
    return sorted(found, key=lambda r: order.index(r.layers.name) if r.layers.name in order else -1, reverse=True)
