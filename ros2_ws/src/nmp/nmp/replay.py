"""Replay without DDS: a recorded drive through the same core as the node, as fast as it goes.

Same bag, same prior, same weights: the same bytes out, whatever the machine's load.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nmp import topics
from nmp.assembly import FrameAssembler
from nmp.bags.reader import BagReader
from nmp.defaults import STALE_DAYS
from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA, CAMERAS, Frame, LocalMap
from nmp.layers import LayerWriter
from nmp.pipeline import ahead
from nmp.prior.storage import place_of
from nmp.process import prepare_process

if TYPE_CHECKING:
    from nmp.mapper import OnlineMapper

THREADS = 2
"""Fixed, because the order of a sum, and with it the last bit, may depend on the number of threads."""

REFUSED = "refused by the mapper"
WAITING = 3
"""layers that may wait to be written, where that is done beside the mapper"""


@dataclass
class ReplaySummary:
    """What became of a bag's frames."""

    frames: int = 0
    seconds: float = 0.0
    """wall time of reading, mapping and writing, without loading the network"""
    drops: Counter[str] = field(default_factory=Counter)
    """frames and messages that could not be used, by cause"""
    reasons: dict[str, str] = field(default_factory=dict)
    """the latest text for each cause"""

    def __str__(self) -> str:
        rate = self.frames / self.seconds if self.seconds > 0 else 0.0
        drops = ", ".join(f"{count} {cause}" for cause, count in sorted(self.drops.items())) or "none"
        return f"{self.frames} frames in {self.seconds:.1f} s ({rate:.1f} frames/s), dropped: {drops}"


def topics_of(reader: BagReader) -> dict[str, tuple[str, str]]:
    """Return the bag's input topics as {topic: (kind, camera)}.

    Kinds are image, camera_info, odom, tf_static and location. A camera's compressed images are preferred to its
    raw ones. Raises :class:`NmpError` when a camera is missing altogether.
    """
    available = {name for name, topic in reader.topics.items() if topic.count}
    chosen = {
        topics.absolute(topics.ODOM): ("odom", ""),
        topics.TF_STATIC: ("tf_static", ""),
        topics.absolute(topics.LOCATION): ("location", ""),
    }
    for camera in CAMERAS:
        images = [topics.absolute(topics.image_topic(camera, t)) for t in ("compressed", "raw")]
        image = next((name for name in images if name in available), None)
        if image is None:
            raise NmpError(f"bag {reader.path} has no images on {images[0]} or {images[1]}: record that camera")
        chosen[image] = ("image", camera)
        chosen[topics.absolute(topics.camera_info_topic(camera))] = ("camera_info", camera)
    for name, (kind, _) in chosen.items():
        # the location can also be given by the user
        if kind != "location" and name not in available:
            raise NmpError(f"bag {reader.path} has no messages on {name}: record or remap that topic")
    return {name: use for name, use in chosen.items() if name in available}


def keyframes_of(reader: BagReader) -> int:
    """Return how many frames a bag can give at most: the images of its anchor camera."""
    names = [topics.absolute(topics.image_topic(ANCHOR_CAMERA, t)) for t in ("compressed", "raw")]
    return max((reader.topics[n].count for n in names if n in reader.topics), default=0)


def recording_of(reader: BagReader) -> str:
    """Return a hash that tells an open bag's recording from others: 128 bits, in hexadecimal.

    It covers the input topics with their counts, when the recording began and ended (ns), the first pose and the first
    image of the anchor camera: a copy has the same, and nothing else of the bag is read.
    """
    uses = topics_of(reader)
    counts = sorted((name, reader.topics[name].msgtype, reader.topics[name].count) for name in uses)
    digest = hashlib.sha256(json.dumps([counts, reader.start_ns, reader.end_ns]).encode())
    for topic, use in sorted(uses.items()):
        if use in (("odom", ""), ("image", ANCHOR_CAMERA)):
            digest.update(next(reader.raw_messages([topic]))[2])
    return digest.hexdigest()[:32]


def frames_of(reader: BagReader, assembler: FrameAssembler, location: str = "") -> Iterator[Frame]:
    """Yield the frames of an open bag in time order.

    :param location: the city, where the bag names none or the wrong one
    """
    uses = topics_of(reader)
    if location:
        assembler.set_location(location)
    for message in reader.messages(uses):
        kind, camera = uses[message.topic]
        if kind == "image":
            assembler.add_image(camera, message.message)
        elif kind == "camera_info":
            assembler.add_camera_info(camera, message.message)
        elif kind == "odom":
            assembler.add_pose(message.message)
        elif kind == "tf_static":
            assembler.add_static_transforms(message.message)
        elif not location:
            assembler.set_location(message.message.data)
        yield from assembler.pop_frames()
    yield from assembler.flush()


def replay(
    bag: Path,
    mapper: OnlineMapper,
    out: Path,
    *,
    location: str = "",
    pictures: bool = False,
    progress: bool = True,
) -> ReplaySummary:
    """Map every frame of a bag and write the layers to ``out``.

    A frame that cannot be used is counted, like in the node. Raises :class:`NmpError` when the bag gives no frame
    at all, naming the reason.
    """
    writer = LayerWriter(out)
    summary = ReplaySummary()
    maps = maps_of(bag, mapper, summary, location=location, progress=progress)
    # on a CPU both would take the cores from each other
    for local_map in maps if mapper.device.type == "cpu" else ahead(maps, WAITING):
        writer.write(local_map)
        if pictures:
            _write_picture(out, local_map)
    return summary


def maps_of(
    bag: Path, mapper: OnlineMapper, summary: ReplaySummary, *, location: str = "", progress: bool = True
) -> Iterator[LocalMap]:
    """Map every frame of a bag, and yield the layers; ``summary`` is filled in on the way.

    Raises :class:`NmpError` like :func:`replay`.
    """
    from tqdm import tqdm

    from nmp.source import Ended, Source, made_ready

    refused: Counter[str] = Counter()
    with BagReader(bag) as reader:
        topics_of(reader)  # a bag that lacks something shows before a process is started for it
        total = keyframes_of(reader)
    begin = time.monotonic()
    source = Source(bag, location, mapper.config, mapper.min_cameras)
    items = made_ready(source, beside=mapper.device.type != "cpu")
    with tqdm(total=total, unit="frame", desc=bag.name, disable=None if progress else True) as bar:
        for item in items:
            if isinstance(item, Ended):
                summary.drops = refused + item.drops
                summary.reasons |= item.reasons
                if item.error:
                    raise NmpError(item.error)
                break
            bar.update()
            try:
                if item.decoded is None:
                    raise NmpError(item.error)
                local_map = mapper.update(item.frame, item.decoded)
            except NmpError as error:
                refused[REFUSED] += 1
                summary.reasons[REFUSED] = str(error)
                continue
            yield local_map
            summary.frames += 1
    mapper.flush()
    summary.seconds = time.monotonic() - begin
    if not summary.frames:
        raise NmpError(_why_nothing(bag, total, summary))


def _why_nothing(bag: Path, total: int, summary: ReplaySummary) -> str:
    if not summary.drops:
        return f"no frame could be made of bag {bag} ({total} images of {ANCHOR_CAMERA}): check its stamps"
    # The cause of most drops; everything else usually follows from it.
    cause, count = summary.drops.most_common(1)[0]
    return f"no frame could be made of bag {bag} ({count} x {cause}): {summary.reasons.get(cause, cause)}"


def _write_picture(out: Path, local_map: LocalMap) -> None:
    from nmp.draw import bev_picture, save_png

    save_png(out / "bev" / f"{local_map.stamp_ns}.png", bev_picture(local_map))


# --------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp map``."""
    parser.add_argument("bag", type=Path, metavar="BAG", help="bag folder, .mcap or .db3 file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the layers, one a keyframe")
    parser.add_argument(
        "--prior",
        type=place_of,
        metavar="DIR",
        help="stored city prior, a folder or URL (s3://bucket/prefix): read, and updated by this drive",
    )
    parser.add_argument("--no-prior", action="store_true", help="every frame on its own; nothing is read or stored")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help=".safetensors file, or cpu_default (which it is without) or gpu_default",
    )
    parser.add_argument("--location", default="", help="the city, if the bag names none (e.g. boston-seaport)")
    parser.add_argument("--bev", action="store_true", help="also write a picture per keyframe to DIR/bev")
    parser.add_argument(
        "--stale-days",
        type=float,
        default=STALE_DAYS,
        help="days without a visit after which what is stored counts for less; 0: it never does (default: %(default)g)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=THREADS,
        help="CPU threads; the same number gives the same bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="what computes the network: cpu, cuda, cuda:1 or auto, a GPU where there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the network for the GPU: a minute at the start, then faster frames",
    )


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp map``."""
    if args.no_prior and args.prior:
        raise NmpError("--prior and --no-prior exclude each other: leave one out")
    if not args.no_prior and not args.prior:
        raise NmpError("no prior folder: give --prior DIR (it may be new), or --no-prior to map without one")
    if not args.stale_days >= 0:
        raise NmpError(f"--stale-days is {args.stale_days:g}: give days, or 0 for never")
    if args.threads < 1:
        raise NmpError(f"--threads is {args.threads}: give at least 1")
    if any(args.out.glob("*.npz")):
        raise NmpError(f"{args.out} already holds layers: remove them or choose another --out")
    with BagReader(args.bag) as reader:  # a wrong path shows before the network is loaded
        recording = recording_of(reader)

    prepare_process()
    import torch

    from nmp.mapper import OnlineMapper

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with OnlineMapper(
        args.weights,
        args.prior,
        use_prior=not args.no_prior,
        stale_days=args.stale_days,
        device=args.device,
        compiled=args.compile,
    ) as mapper:
        summary = replay(args.bag, mapper, args.out, location=args.location, pictures=args.bev)
        mapper.close(recording)
    print(f"wrote {args.out}: {summary}")
    for cause in sorted(summary.drops):
        print(f"  {cause}: {summary.reasons.get(cause, '')}")
    for cause, count in mapper.gates.counts.items():
        if count:
            print(f"  {cause}: {count}; last: {mapper.gates.last_text or 'stored again at once'}")
