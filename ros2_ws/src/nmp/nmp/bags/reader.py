"""Read a recorded drive without DDS: any rosbag2 (MCAP or SQLite), a folder or a single storage file."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

from rosbags.interfaces import ConnectionExtRosbag2, QosDurability, QosReliability
from rosbags.rosbag2 import Reader, ReaderError
from rosbags.typesys import Stores, get_typestore

from nmp.errors import NmpError
from nmp.topics import TopicQos

STORE = get_typestore(Stores.ROS2_JAZZY)


class BagMessage(NamedTuple):
    """One message of a bag."""

    topic: str
    stamp_ns: int
    """log time; for bags written by this package also the header stamp"""
    message: Any
    """attributes are named as in the ROS message"""


@dataclass(frozen=True)
class BagTopic:
    """What a bag knows of a topic."""

    name: str
    msgtype: str
    """for instance ``sensor_msgs/msg/CompressedImage``"""
    count: int
    qos: TopicQos
    """as offered by the recorded publisher"""


class BagReader:
    """A bag to iterate over, as a context manager.

    Every failure (missing, truncated or damaged file) is a :class:`NmpError` that names the file.
    """

    def __init__(self, path: Path) -> None:
        """Check that ``path`` (a bag folder, ``.mcap`` or ``.db3`` file) is there; opening comes with ``with``."""
        self.path = Path(path)
        if not self.path.exists():
            raise NmpError(f"bag {self.path} does not exist: check the path")
        if self.path.is_dir() and not (self.path / "metadata.yaml").is_file():
            parts = sorted(p for p in self.path.iterdir() if p.suffix in (".mcap", ".db3"))
            if not parts:
                raise NmpError(f"{self.path} is not a bag (no metadata.yaml, .mcap or .db3 in it): check the path")
            raise NmpError(
                f"bag {self.path} has no metadata.yaml, so its recording did not end properly: "
                f"run 'ros2 bag reindex {self.path}' or open {parts[0]} itself"
            )
        if self.path.is_file() and self.path.suffix not in (".mcap", ".db3"):
            raise NmpError(f"{self.path} is not a bag: give a bag folder, a .mcap or a .db3 file")
        self._reader = Reader(self.path)

    def __enter__(self) -> BagReader:
        try:
            self._reader.open()
        except Exception as exc:  # damaged bytes surface as nearly any type: struct.error, TypeError, ...
            raise self._damaged(exc) from exc
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reader.close()

    @property
    def topics(self) -> dict[str, BagTopic]:
        """Every topic of the bag by name."""
        out: dict[str, BagTopic] = {}
        for c in self._reader.connections:
            count = c.msgcount + (out[c.topic].count if c.topic in out else 0)
            out[c.topic] = BagTopic(c.topic, c.msgtype, count, _qos(cast(ConnectionExtRosbag2, c.ext)))
        return out

    @property
    def start_ns(self) -> int:
        """Log time of the first message."""
        return self._reader.start_time

    @property
    def end_ns(self) -> int:
        """Log time of the last message."""
        return self._reader.end_time - 1

    @property
    def message_count(self) -> int:
        """Messages on all topics together."""
        return self._reader.message_count

    def raw_messages(self, topics: Collection[str] | None = None) -> Iterator[tuple[str, int, bytes]]:
        """Yield (topic, log time in ns, serialised message) in time order; ``topics`` chooses, None is all."""
        wanted = [c for c in self._reader.connections if topics is None or c.topic in topics]
        if not wanted:
            return
        messages = self._reader.messages(wanted)
        while True:
            try:
                connection, stamp_ns, data = next(messages)
            except StopIteration:
                return
            except Exception as exc:  # as in __enter__
                raise self._damaged(exc) from exc
            yield connection.topic, stamp_ns, data

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Yield decoded messages in time order.

        Topics of types that are not part of ROS 2 Jazzy's common interfaces are left out, unless named in
        ``topics``: then they are a :class:`NmpError`.
        """
        types = {c.topic: c.msgtype for c in self._reader.connections if topics is None or c.topic in topics}
        known = {t: m for t, m in types.items() if m in STORE.types}
        if topics is not None and (unknown := sorted(types.keys() - known.keys())):
            raise NmpError(f"{unknown[0]} in {self.path} has the unknown type {types[unknown[0]]}: remap another topic")
        for topic, stamp_ns, data in self.raw_messages(known):
            try:
                message = STORE.deserialize_cdr(data, known[topic])
            except Exception as exc:  # as in __enter__
                raise self._damaged(exc) from exc
            yield BagMessage(topic, stamp_ns, message)

    def messages_at(self, topic: str, stamp_ns: int) -> list[BagMessage]:
        """Return the decoded messages of a topic with exactly this log time (ns), found through the bag's index."""
        wanted = [c for c in self._reader.connections if c.topic == topic]
        try:
            found = [(c, data) for c, _, data in self._reader.messages(wanted, start=stamp_ns, stop=stamp_ns + 1)]
            return [BagMessage(topic, stamp_ns, STORE.deserialize_cdr(data, c.msgtype)) for c, data in found]
        except Exception as exc:  # as in __enter__
            raise self._damaged(exc) from exc

    def _damaged(self, exc: Exception) -> NmpError:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        if isinstance(exc, PermissionError):
            return NmpError(f"bag {self.path} cannot be read (permission denied): check its permissions")
        if isinstance(exc, ReaderError) and "are missing" in reason:
            return NmpError(f"bag {self.path} is incomplete ({reason.rstrip('.')}): copy the whole folder again")
        return NmpError(
            f"bag {self._storage()} is truncated or damaged ({reason.rstrip('.')}): copy it again, "
            "or save what is left with 'mcap recover' or 'ros2 bag reindex'"
        )

    def _storage(self) -> Path:
        """The storage file to name in an error: the only one, or the folder."""
        if self.path.is_file():
            return self.path
        parts = [p for p in self.path.iterdir() if p.suffix in (".mcap", ".db3")]
        return parts[0] if len(parts) == 1 else self.path


def _qos(ext: ConnectionExtRosbag2) -> TopicQos:
    """Fold the recorded publishers' offers into one: latched or reliable when any of them was."""
    offers = ext.offered_qos_profiles
    return TopicQos(
        depth=max((o.depth for o in offers), default=0) or 10,
        reliable=not offers or any(o.reliability != QosReliability.BEST_EFFORT for o in offers),
        latched=any(o.durability == QosDurability.TRANSIENT_LOCAL for o in offers),
    )
