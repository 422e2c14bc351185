"""Plays a recorded drive to whoever shows it, at any speed, from any moment."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from nmp.errors import NmpError
from nmp.nodes.city import CitySoFar
from nmp.vectors.tracker import ElementTracker
from nmp.view.drive import RecordedDrive
from nmp.view.sink import Elements, Note, Sink

TICK_S = 0.05
"""the time is told so often"""
SETTLE_S = 0.2
"""a subscription is told of before it takes effect, and panels come several at a time"""
CITY_EVERY = 4
"""keyframes; in between the city hardly changes, and it is large"""


class _Event(NamedTuple):
    stamp_ns: int
    kind: str
    number: int
    camera: str = ""


class Story:
    """A drive as events in the order of time. Not for several threads at once."""

    def __init__(self, drive: RecordedDrive, sink: Sink) -> None:
        self._drive, self._sink = drive, sink
        events = [_Event(p.stamp_ns, "pose", i) for i, p in enumerate(drive.poses)]
        events += [_Event(k.stamp_ns, "layers", i) for i, k in enumerate(drive.keyframes)]
        events += [_Event(n.stamp_ns, "note", i) for i, n in enumerate(drive.notes)]
        events += [_Event(s.stamp_ns, "image", i, c) for c, shots in drive.shots.items() for i, s in enumerate(shots)]
        # what comes first at a moment is where the car is: the rest is drawn there
        order = ("pose", "image", "layers", "note")
        self._events = sorted(events, key=lambda e: (e.stamp_ns, order.index(e.kind), e.camera))
        self._stamps = [e.stamp_ns for e in self._events]
        self._city, self._upto = CitySoFar(), 0  # keyframes that the city is made of
        self._tracker = ElementTracker()
        self._place = 0

    @property
    def next_ns(self) -> int | None:
        """When the next event is, None after the last."""
        return self._stamps[self._place] if self._place < len(self._stamps) else None

    def advance(self, to_ns: int) -> None:
        """Show everything up to a moment."""
        while (due := self.next_ns) is not None and due <= to_ns:
            self._show(self._events[self._place])
            self._place += 1

    def jump(self, to_ns: int) -> None:
        """Go on from a moment, and show what is to be seen there: the latest of everything."""
        self._place = bisect_right(self._stamps, to_ns)
        self._tracker = ElementTracker()
        latest: dict[tuple[str, str], _Event] = {}
        for event in self._events[: self._place]:
            if event.kind != "note":
                latest[event.kind, event.camera] = event
        for event in sorted(latest.values(), key=lambda e: e.stamp_ns):
            self._show(event, afresh=True)

    def _show(self, event: _Event, afresh: bool = False) -> None:
        match event.kind:
            case "pose":
                self._sink.pose(self._drive.poses[event.number])
            case "image" if self._sink.wants_image(event.camera):
                self._show_image(event)
            case "note":
                self._sink.note(self._drive.notes[event.number])
            case "layers":
                self._show_layers(event.number, afresh)

    def _show_image(self, event: _Event) -> None:
        try:
            image = self._drive.image(event.camera, event.number)
        except NmpError as error:  # the rest of the drive can be seen all the same
            self._sink.note(Note(event.stamp_ns, 2, str(error)))
            return
        self._sink.image(event.camera, event.stamp_ns, image)

    def _show_layers(self, index: int, afresh: bool) -> None:
        local_map = self._drive.layers(index)
        self._sink.layers(local_map)
        tracked = Elements.of(self._tracker.update(local_map))
        self._sink.elements(Elements(tracked.stamp_ns, tracked.lines, tracked.gone, afresh))
        # again and again: who comes later needs them, too
        self._sink.mountings(local_map.stamp_ns, self._drive.mountings)
        count = len(self._drive.keyframes)
        told = f"keyframe {index + 1} of {count}"
        if (scores := self._drive.scores) is not None and (miou := scores[index][-1]) is not None:
            told += f": {miou:.1f} mIoU so far"
        self._sink.note(Note(local_map.stamp_ns, 0, told))
        last = index == count - 1
        if self._sink.wants_city() and (afresh or last or index % CITY_EVERY == 0):
            self._show_city(index)

    def _show_city(self, index: int) -> None:
        if self._upto > index:
            self._city.clear()
            self._upto = 0
        for missing in range(self._upto, index + 1):
            self._city.add(self._drive.layers(missing))
        self._upto = index + 1
        self._sink.city(self._drive.keyframes[index].stamp_ns, self._city.overview())

    def close(self) -> None:
        """Remove temporary files."""
        self._city.close()


@dataclass(frozen=True)
class Moment:
    """How the playing stands."""

    at_ns: int
    playing: bool
    speed: float
    ended: bool
    jumped: bool
    """since the last time that it was told"""


class Player:
    """Plays a story in a thread of its own, over and over until somebody takes control."""

    def __init__(self, story: Story, begin_ns: int, end_ns: int, tell: Callable[[Moment], None]) -> None:
        """:param tell: called in the thread, with the time every ``TICK_S`` and with every change at once."""
        self._story, self._begin, self._end, self._tell = story, begin_ns, end_ns, tell
        self._changed = threading.Condition()
        self._at, self._since = begin_ns, time.monotonic()  # the moment shown, and when it was that
        self._playing, self._speed, self._looping = True, 1.0, True
        self._jump: int | None = begin_ns
        self._again_s = math.inf  # when what is to be seen is shown once more (monotonic clock)
        self._stopped = False
        self.ended = threading.Event()
        self.failure: Exception | None = None
        """what ended the thread before its time"""
        self._thread = threading.Thread(target=self._run, name="player", daemon=True)

    def start(self) -> None:
        """Begin to play."""
        self._since = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10.0)
        self._story.close()

    def control(self, *, play: bool, speed: float, seek_ns: int | None) -> Moment:
        """Do what somebody wants, who from then on decides when it begins again."""
        with self._changed:
            self._at, self._since = self._now(), time.monotonic()
            self._looping = False
            self._speed = min(max(speed, 0.01), 100.0) if math.isfinite(speed) else 1.0
            if seek_ns is not None:
                self._jump = self._at = min(max(seek_ns, self._begin), self._end)
            elif play and not self._playing and self._at >= self._end:
                self._jump = self._at = self._begin
            self._playing = play
            self._changed.notify()
            return self._moment(seek_ns is not None)

    def refresh(self) -> None:
        """Show what is to be seen once more where it stands still: somebody has just come, or wants to see more."""
        with self._changed:
            if not self._playing:
                self._again_s = time.monotonic() + SETTLE_S
                self._changed.notify()

    def _now(self) -> int:
        if not self._playing or self._jump is not None:
            return self._at
        return min(self._at + round((time.monotonic() - self._since) * self._speed * 1e9), self._end)

    def _moment(self, jumped: bool) -> Moment:
        at = self._now()
        return Moment(at, self._playing, self._speed, at >= self._end and not self._playing, jumped)

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._turn()
        except Exception as error:
            self.failure = error
        finally:
            self.ended.set()

    def _turn(self) -> None:
        with self._changed:
            jump, self._jump = self._jump, None
            if jump is not None:
                self._at, self._since = jump, time.monotonic()
            now = self._now()
            again = time.monotonic() >= self._again_s
            if again:
                self._again_s = math.inf
        if jump is not None or again:
            if jump is not None:
                self._tell(Moment(jump, self._playing, self._speed, False, True))
            self._story.jump(now)
            with self._changed:
                if self._jump is None:  # drawing the first picture takes no time of the drive
                    self._since = time.monotonic()
            return
        self._story.advance(now)
        with self._changed:
            if self._playing and self._jump is None and now >= self._end:
                if self._looping:
                    self._jump = self._begin
                else:
                    self._playing, self._at = False, self._end
            moment = self._moment(False)
        self._tell(moment)
        with self._changed:
            if self._jump is None and not self._stopped:
                self._changed.wait(TICK_S if self._playing or self._again_s < math.inf else 1.0)


def replay(story: Story, begin_ns: int, end_ns: int, step: Callable[[int], object]) -> None:
    """Show a whole drive as fast as it goes.

    :param step: is told how many more ns were shown
    """
    story.jump(begin_ns)
    at = begin_ns
    while (due := story.next_ns) is not None and due <= end_ns:
        story.advance(due)
        step(due - at)
        at = due
