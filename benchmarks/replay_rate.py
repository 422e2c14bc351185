"""How many frames a second a bag is mapped at without DDS, with the messages' conversions on, and where the time goes.

    python benchmarks/replay_rate.py [BAG] [--weights gpu_default --device cuda] [--frames 300] [--out rate.json]

Bytes in: the serialised messages of the bag, turned into messages and put together to frames as the node does. Bytes
out: the layers as serialised OccupancyGrids. In between are decoding (six JPEGs, in threads), reading the prior, the
network and writing the prior, all as in the node. Without BAG, one is made of random pictures of 1600 x 900. The bag is
played from the start again, an hour later each time, until there are so many frames.

On a GPU the steps run side by side for several frames, up to reading and decoding in processes of their own, as in
`nmp map`; each of these reads all of the bag, and the time for that is the time of one of them.
Messages are those of rclpy where it is installed, else of rosbags, which does the same in Python alone (`--messages`
chooses). rosbags is needed in any case;
where there is no package index, carry its wheels there and install them with `pip install --no-index`:

    pip download --only-binary :all: -d wheels rosbags

Prints (and writes) JSON: frames a second, and for each step the milliseconds that it works on a frame (wall clock, in
its own thread, the waits for others not counted) and its share of all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from nmp.process import prepare_process

prepare_process()  # before torch is loaded

# ruff: noqa: E402
import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from nmp import topics
from nmp.assembly import FrameAssembler
from nmp.bags.nuscenes_to_bag import Shot, write_bag
from nmp.bags.reader import STORE, BagReader
from nmp.errors import NmpError
from nmp.frame import CAMERAS, CLASSES, Frame, LocalMap
from nmp.geometry import flatten_to_plane, transform_from_xyyaw, yaw_of
from nmp.layers import to_occupancy
from nmp.mapper import OnlineMapper
from nmp.messages import NS, STAMP_END, stamp_of_cdr
from nmp.pipeline import ahead
from nmp.replay import WAITING, topics_of
from nmp.source import Ended, Source, made_ready

WIDTH, HEIGHT = 1600, 900
HEADINGS = dict(zip(CAMERAS, (0, -55, -110, 180, 110, 55), strict=True))
WARM_UP = 10
"""frames that are mapped before the clock starts"""
TIMES = "times"


class Stopwatch:
    """Adds up what steps take."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, step: str, action: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        try:
            return action()
        finally:
            self.seconds[step] += time.perf_counter() - begin


def rclpy_messages() -> tuple[Callable[[bytes, str], Any], Callable[[LocalMap], list[bytes]]]:
    """Return what turns bytes of a type into messages and local maps into bytes, by rclpy."""
    from rclpy.serialization import deserialize_message, serialize_message

    from nmp.nodes.conversions import to_occupancy_grids
    from nmp.nodes.player_node import message_class

    return (
        lambda data, kind: deserialize_message(data, message_class(kind)),
        lambda local_map: [serialize_message(grid) for grid in to_occupancy_grids(local_map).values()],
    )


def rosbags_messages() -> tuple[Callable[[bytes, str], Any], Callable[[LocalMap], list[bytes]]]:
    """Return the same by rosbags."""

    def to_bytes(local_map: LocalMap) -> list[bytes]:
        t, grid = STORE.types, local_map.grid
        corner = flatten_to_plane(local_map.map_from_base) @ transform_from_xyyaw(
            -grid.length / 2, -grid.width / 2, 0.0
        )
        stamp = t["builtin_interfaces/msg/Time"](*divmod(local_map.stamp_ns, NS))
        x, y, z, w = Rotation.from_euler("z", yaw_of(corner)).as_quat().tolist()
        origin = t["geometry_msgs/msg/Pose"](
            t["geometry_msgs/msg/Point"](float(corner[0, 3]), float(corner[1, 3]), 0.0),
            t["geometry_msgs/msg/Quaternion"](x, y, z, w),
        )
        rows, cols = grid.shape
        info = t["nav_msgs/msg/MapMetaData"](stamp, grid.resolution, cols, rows, origin)
        header = t["std_msgs/msg/Header"](stamp, topics.MAP_FRAME)
        messages = (t["nav_msgs/msg/OccupancyGrid"](header, info, cells.ravel()) for cells in to_occupancy(local_map))
        return [bytes(STORE.serialize_cdr(m, "nav_msgs/msg/OccupancyGrid")) for m in messages]

    return STORE.deserialize_cdr, to_bytes


MESSAGES = {"rclpy": rclpy_messages, "rosbags": rosbags_messages}


def make_bag(folder: Path, frames: int, seed: int = 0) -> Path:
    """Write a straight drive at 10 m/s with a keyframe every 0.5 s and images of coloured noise."""
    rng = np.random.default_rng(seed)
    intrinsics = np.array([[1266.0, 0, WIDTH / 2], [0, 1266.0, HEIGHT / 2], [0, 0, 1]])
    optical = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    shots = []
    for frame, camera in itertools.product(range(frames), CAMERAS):
        out = BytesIO()
        coarse = rng.integers(0, 255, (90, 160, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
        path = folder / f"{camera}-{frame}.jpg"
        path.write_bytes(out.getvalue())
        q = (Rotation.from_euler("z", HEADINGS[camera], degrees=True) * optical).as_quat().tolist()
        pose = ([5.0 * frame, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0])
        stamp = 10**18 + frame * NS // 2
        shots.append(Shot(camera, stamp, path, WIDTH, HEIGHT, intrinsics, ([0.9, 0.0, 1.5], q), pose))
    write_bag(shots, "somewhere", folder / "bag")
    return folder / "bag"


class Laps(Source):
    """A bag that is read again and again, its messages put together as the node does it.

    What that took comes as the latest text of the cause :data:`TIMES`, as JSON.
    """

    def __init__(self, bag: Path, mapper: OnlineMapper, messages: str, count: int) -> None:
        super().__init__(bag, "", mapper.config, mapper.min_cameras)
        self.messages = messages
        self.count = count

    def frames(self, assembler: FrameAssembler) -> Iterator[Frame]:
        clock, made = Stopwatch(), 0
        with BagReader(self.bag) as reader:
            for lap in itertools.count():
                for frame in self._lap(reader, assembler, clock, lap * 3600 * NS):
                    yield frame
                    made += 1
                    if made == self.count:
                        assembler.last_error[TIMES] = json.dumps(clock.seconds)
                        return
                if not made:
                    why = "; ".join(assembler.last_error.values()) or "it has no images"
                    raise NmpError(f"no frame could be made of {self.bag} ({why}): take another bag")

    def _lap(self, reader: BagReader, assembler: FrameAssembler, clock: Stopwatch, later_ns: int) -> Iterator[Frame]:
        to_message = MESSAGES[self.messages]()[0]
        kinds = {name: topic.msgtype for name, topic in reader.topics.items()}
        uses = topics_of(reader)
        calibrations: dict[str, bytes] = {}
        messages = reader.raw_messages(uses)
        while (read := clock.timed("reading", lambda: next(messages, None))) is not None:
            topic, _, data = read
            begin = time.perf_counter()
            use, camera = uses[topic]
            fetch = partial(to_message, bytes(data), kinds[topic])
            if use == "image":
                transport = "raw" if kinds[topic].endswith("/Image") else "compressed"
                assembler.add_sealed_image(camera, stamp_of_cdr(data) + later_ns, fetch, transport)
            elif use == "camera_info" and calibrations.get(topic) != data[STAMP_END:]:
                calibrations[topic] = bytes(data[STAMP_END:])
                assembler.add_camera_info(camera, fetch())
            elif use == "odom":
                pose = fetch()
                pose.header.stamp.sec += later_ns // NS
                assembler.add_pose(pose)
            elif use == "tf_static":
                assembler.add_static_transforms(fetch())
            elif use == "location":
                assembler.set_location(fetch().data)
            ready = assembler.pop_frames()
            clock.seconds["messages to frames"] += time.perf_counter() - begin
            yield from ready


def measure(bag: Path, mapper: OnlineMapper, messages: str, frames: int) -> dict[str, Any]:
    """Map so many frames and return the JSON."""
    to_bytes = MESSAGES[messages]()[1]
    on_gpu = mapper.device.type != "cpu"
    before, clock, sent = Stopwatch(), Stopwatch(), 0

    def maps() -> Iterator[LocalMap]:
        for item in made_ready(Laps(bag, mapper, messages, frames + WARM_UP), beside=on_gpu):
            if isinstance(item, Ended):
                if item.error:
                    raise NmpError(item.error)
                before.seconds.update(json.loads(item.reasons[TIMES]))
                return
            if item.decoded is None:
                raise NmpError(item.error)
            local_map = mapper.update(item.frame, item.decoded)
            for step, seconds in mapper.stages_s.items():
                before.seconds[step] += seconds
            yield local_map

    begin = cpu = 0.0
    for number, local_map in enumerate(ahead(maps(), WAITING) if on_gpu else maps()):
        if number == WARM_UP:
            begin, cpu = time.perf_counter(), time.process_time()
            clock.seconds.clear()
        sent += sum(map(len, clock.timed("frames to messages", partial(to_bytes, local_map))))
    wall, used = time.perf_counter() - begin, time.process_time() - cpu
    ms = {step: 1e3 * seconds / (frames + WARM_UP) for step, seconds in before.seconds.items()}
    ms |= {step: 1e3 * seconds / frames for step, seconds in clock.seconds.items()}
    total = sum(ms.values())
    conversions = sum(ms.get(step, 0.0) for step in ("reading", "messages to frames", "frames to messages"))
    return {
        "bag": bag.name,
        "device": torch.cuda.get_device_name(mapper.device) if on_gpu else "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "messages": messages,
        "side_by_side": on_gpu,
        "frames": frames,
        "frames_per_s": round(frames / wall, 2),
        "ms_per_frame": round(1e3 * wall / frames, 3),
        "cpu_ms_per_frame_of_the_mapping_process": round(1e3 * used / frames, 3),
        "bytes_out_per_frame": sent // (frames + WARM_UP),
        "layers": list(CLASSES),
        "steps_ms": {step: round(value, 3) for step, value in ms.items()},
        "steps_share": {step: round(value / total, 4) for step, value in ms.items()},
        "conversions_of_frame_time": round(conversions * frames / (1e3 * wall), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bag", type=Path, nargs="?", help="default: one is made")
    parser.add_argument("--weights", help="file, cpu_default (which it is without) or gpu_default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--messages", choices=("auto", *MESSAGES), default="auto")
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    messages = args.messages
    if messages == "auto":
        messages = "rclpy" if importlib.util.find_spec("rclpy") else "rosbags"
    with tempfile.TemporaryDirectory() as folder:
        bag = args.bag or make_bag(Path(folder), 20)
        mapper = OnlineMapper(
            args.weights, Path(folder) / "prior", device=args.device, precision=args.precision, compiled=args.compile
        )
        with mapper:
            result = measure(bag, mapper, messages, args.frames)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except NmpError as error:
        raise SystemExit(f"replay_rate: error: {error}") from None
