"""What is shown, for Foxglove: channels of its own message types, to a browser or into an MCAP file.

Message types: https://docs.foxglove.dev/docs/sdk/schemas. The SDK is an extra of this package (``view``).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp import topics
from nmp.draw import CLASS_COLOURS, opacity
from nmp.errors import NmpError
from nmp.frame import CAMERAS, CLASSES, LocalMap
from nmp.geometry import Array, flatten_to_plane, quaternion_of, transform_from_xyyaw
from nmp.layers import occupancy
from nmp.vectors.raster import Overview
from nmp.view.server import cannot_listen, in_address, warn_if_open
from nmp.view.sink import Elements, Mounting, Note, Pose, Sink

try:
    import foxglove
    from foxglove import channels, messages
    from foxglove.websocket import Capability, ServerListener, WebSocketServer
except ImportError as missing:
    raise NmpError(
        f"Foxglove needs the package foxglove-sdk ({missing}): pip install 'neural-map-prior[view]', or leave "
        "--foxglove and --mcap out"
    ) from missing

LAYOUT = "foxglove.json"
"""in this package; to be imported in Foxglove"""
LINE_WIDTH_M = 0.25
LEVELS = {1: messages.LogLevel.Warning, 2: messages.LogLevel.Error, 3: messages.LogLevel.Error}
_FIELDS = ("red", "green", "blue", "alpha", *CLASSES)
"""of a cell, a byte each; the classes in percent, 255 where nothing was ever seen"""


def image_channel(camera: str) -> str:
    """Return the channel of a camera's images."""
    return f"/{camera}/image"


LAYERS, CITY, VECTORS, POSE, TRANSFORMS, LOG = "/layers", "/city", "/vectors", "/pose", "/tf", "/log"


class FoxgloveSink(Sink):
    """Publishes into a context, from where a server and MCAP files take it."""

    def __init__(self) -> None:
        self.context = foxglove.Context()
        kind = channels
        self._images = {c: kind.CompressedImageChannel(image_channel(c), context=self.context) for c in CAMERAS}
        self._layers = kind.GridChannel(LAYERS, context=self.context)
        self._city = kind.GridChannel(CITY, context=self.context)
        self._vectors = kind.SceneUpdateChannel(VECTORS, context=self.context)
        self._pose = kind.PoseInFrameChannel(POSE, context=self.context)
        self._transforms = kind.FrameTransformsChannel(TRANSFORMS, context=self.context)
        self._log = kind.LogChannel(LOG, context=self.context)

    def wants_image(self, camera: str) -> bool:
        """Whether anybody takes a camera's images."""
        return bool(self._images[camera].has_sinks())

    def wants_city(self) -> bool:
        """Whether anybody takes the city."""
        return bool(self._city.has_sinks())

    def image(self, camera: str, stamp_ns: int, data: bytes) -> None:
        """Publish a foxglove.CompressedImage."""
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        message = messages.CompressedImage(
            timestamp=_time(stamp_ns), frame_id=topics.optical_frame(camera), data=data, format=kind
        )
        self._images[camera].log(message, log_time=stamp_ns)

    def pose(self, pose: Pose) -> None:
        """Publish a foxglove.PoseInFrame, and the transform map to base_link."""
        stamp, place = pose.stamp_ns, pose.map_from_base
        message = messages.PoseInFrame(timestamp=_time(stamp), frame_id=topics.MAP_FRAME, pose=_pose(place))
        self._pose.log(message, log_time=stamp)
        self._transform(stamp, [Mounting(topics.MAP_FRAME, topics.BASE_FRAME, place)])

    def mountings(self, stamp_ns: int, mountings: Sequence[Mounting]) -> None:
        """Publish foxglove.FrameTransforms."""
        self._transform(stamp_ns, mountings)

    def _transform(self, stamp_ns: int, mountings: Sequence[Mounting]) -> None:
        transforms = []
        for m in mountings:
            x, y, z = (float(v) for v in m.parent_from_child[:3, 3])
            transforms.append(
                messages.FrameTransform(
                    timestamp=_time(stamp_ns),
                    parent_frame_id=m.parent,
                    child_frame_id=m.child,
                    translation=messages.Vector3(x=x, y=y, z=z),
                    rotation=_rotation(m.parent_from_child),
                )
            )
        self._transforms.log(messages.FrameTransforms(transforms=transforms), log_time=stamp_ns)

    def layers(self, local_map: LocalMap) -> None:
        """Publish the layers around the car as a foxglove.Grid."""
        grid = local_map.grid
        corner = flatten_to_plane(local_map.map_from_base)
        corner = corner @ transform_from_xyyaw(-grid.length / 2, -grid.width / 2, 0.0)
        seen = local_map.evidence > 0
        message = _grid(local_map.stamp_ns, corner, grid.resolution, local_map.probabilities, seen)
        self._layers.log(message, log_time=local_map.stamp_ns)

    def city(self, stamp_ns: int, overview: Overview) -> None:
        """Publish the city so far as a foxglove.Grid."""
        corner = transform_from_xyyaw(*overview.corner, 0.0)
        message = _grid(stamp_ns, corner, overview.resolution, overview.probabilities, overview.seen > 0)
        self._city.log(message, log_time=stamp_ns)

    def elements(self, elements: Elements) -> None:
        """Publish a foxglove.SceneUpdate: a line for every element, a deletion for every one that is gone."""
        stamp = _time(elements.stamp_ns)
        entities = []
        for line in elements.lines:
            red, green, blue = (v / 255 for v in CLASS_COLOURS[line.name])
            drawn = messages.LinePrimitive(
                type=messages.LinePrimitiveLineType.LineStrip,
                thickness=LINE_WIDTH_M,
                points=[messages.Point3(x=float(x), y=float(y), z=0.05) for x, y in line.points],
                color=messages.Color(r=red, g=green, b=blue, a=0.3 + 0.7 * line.confidence),
            )
            known = [messages.KeyValuePair(key="confidence", value=f"{line.confidence:.3f}")]
            entities.append(
                messages.SceneEntity(
                    timestamp=stamp,
                    frame_id=topics.MAP_FRAME,
                    id=_entity(line.name, line.id),
                    lines=[drawn],
                    metadata=known,
                )
            )
        kind = messages.SceneEntityDeletionType
        deletions = [
            messages.SceneEntityDeletion(timestamp=stamp, type=kind.MatchingId, id=_entity(*e)) for e in elements.gone
        ]
        if elements.afresh:
            deletions = [messages.SceneEntityDeletion(timestamp=stamp, type=kind.All)]
        self._vectors.log(messages.SceneUpdate(deletions=deletions, entities=entities), log_time=elements.stamp_ns)

    def note(self, note: Note) -> None:
        """Publish a foxglove.Log."""
        message = messages.Log(
            timestamp=_time(note.stamp_ns),
            level=LEVELS.get(note.level, messages.LogLevel.Info),
            message=note.text,
            name="nmp",
        )
        self._log.log(message, log_time=note.stamp_ns)


@contextmanager
def mcap_file(sink: FoxgloveSink, path: Path) -> Iterator[None]:
    """Write everything that is published meanwhile into a new file; nothing is left of one that fails.

    Raises :class:`NmpError` when there is a file already, or none can be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = foxglove.open_mcap(path, context=sink.context)
    except FileExistsError as error:
        raise NmpError(f"--mcap {path} is there already: choose another name, or remove it") from error
    except OSError as error:
        raise NmpError(f"cannot write {path} ({error.strerror or error}): choose another --mcap") from error
    try:
        with writer:
            yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def serve(
    sink: FoxgloveSink,
    name: str,
    host: str,
    port: int,
    *,
    listener: ServerListener | None = None,
    span_ns: tuple[int, int] | None = None,
) -> WebSocketServer:
    """Start a server; raises :class:`NmpError` when the port cannot be opened.

    :param listener: is told when somebody wants to play, pause or seek
    :param span_ns: first and last moment of what can be played
    """
    if not 0 <= port <= 65535:
        raise cannot_listen(host, port, OSError(errno.EINVAL, "no such port"))
    try:
        return foxglove.start_server(
            name=name,
            host=host,
            port=port,
            context=sink.context,
            capabilities=[Capability.Time] if span_ns else [],
            server_listener=listener,
            playback_time_range=span_ns,
        )
    except (OSError, RuntimeError) as error:
        in_use = "in use" in str(error).lower()
        raise cannot_listen(host, port, OSError(errno.EADDRINUSE if in_use else errno.EIO, str(error))) from error


def layout_path() -> Path:
    """Return where the layout lies."""
    return Path(str(resources.files("nmp.view").joinpath(LAYOUT)))


def announce(server: WebSocketServer, host: str) -> None:
    """Say how to look."""
    warn_if_open(host)
    print(f"serving ws://{in_address(host)}:{server.port} (Ctrl-C ends)")
    print("  in Foxglove (desktop, or app.foxglove.dev): Open connection, Foxglove WebSocket, that address")
    print(f"  then Layouts, Import from file: {layout_path()}", flush=True)


def _entity(name: str, number: int) -> str:
    return f"{name} {number}"


def _time(stamp_ns: int) -> Any:
    return messages.Timestamp(stamp_ns // 10**9, stamp_ns % 10**9)


def _pose(transform: Array) -> Any:
    x, y, z = (float(v) for v in transform[:3, 3])
    return messages.Pose(position=messages.Vector3(x=x, y=y, z=z), orientation=_rotation(transform))


def _rotation(transform: Array) -> Any:
    x, y, z, w = (float(v) for v in quaternion_of(transform))
    return messages.Quaternion(x=x, y=y, z=z, w=w)


def _grid(
    stamp_ns: int, corner: Array, resolution: float, probabilities: NDArray[np.float32], seen: NDArray[np.bool_]
) -> Any:
    """Return layers [classes, rows, cols] whose corner lies at a planar pose [4, 4] in ``map``."""
    percent = occupancy(probabilities, seen).view(np.uint8)
    cells = np.concatenate([np.moveaxis(_rgba(probabilities, seen), -1, 0), percent]).transpose(1, 2, 0)
    kind = messages.PackedElementFieldNumericType.Uint8
    fields = [messages.PackedElementField(name=name, offset=i, type=kind) for i, name in enumerate(_FIELDS)]
    rows, cols = seen.shape
    return messages.Grid(
        timestamp=_time(stamp_ns),
        frame_id=topics.MAP_FRAME,
        pose=_pose(corner),
        column_count=cols,
        cell_size=messages.Vector2(x=resolution, y=resolution),
        row_stride=cols * len(_FIELDS),
        cell_stride=len(_FIELDS),
        fields=fields,
        data=np.ascontiguousarray(cells).tobytes(),
    )


def _rgba(probabilities: NDArray[np.float32], seen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the colours [rows, cols, 4] of layers: as opaque as a class is likely, faint ground where none is."""
    alpha = opacity(probabilities) * seen
    colours = np.array([CLASS_COLOURS[name] for name in CLASSES], np.float32)
    strongest = alpha.argmax(axis=0)
    out = np.zeros((*seen.shape, 4), np.uint8)
    out[..., :3] = colours[strongest]
    most = alpha.max(axis=0)
    out[..., 3] = np.rint(255 * most)
    ground = seen & (most < 0.1)
    out[ground] = (120, 130, 145, 40)
    return out
