"""When the pose of a frame is too doubtful for the prior: what is read then counts less, and nothing is written.

What is stored at a wrong place stays wrong for many drives, while a frame that is not stored is soon replaced by the
next. Doubt therefore always closes the way into the prior, and never the way out to the layers.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.frame import Frame
from nmp.geometry import yaw_of

UNCERTAIN = "not stored, and read with less weight: pose uncertain"
SETTLING = "not stored: pose jumped"
JUMPS = "pose jumps"
CONFIRMED = "pose jumps confirmed by the stored map"
CAUSES = (UNCERTAIN, SETTLING, JUMPS, CONFIRMED)


@dataclass(frozen=True)
class GateLimits:
    """What a pose may be like without being doubted."""

    position_m: float = 1.2
    """standard deviation of the position up to which frames are stored, m: the pose search covers three of it"""
    yaw_rad: float = 0.04
    """of the heading, rad: the search covers 6.25 degrees"""
    blind_position_m: float = 3.6
    """standard deviation from which nothing is read, m; between the two the weight falls in proportion"""
    blind_yaw_rad: float = 0.11
    """of the heading, rad"""
    speed: float = 60.0
    """fastest that a car drives, m/s"""
    turn_rate: float = 1.5
    """fastest that it turns, rad/s"""
    acceleration: float = 6.0
    """hardest that it brakes or leaves a bend, m/s^2"""
    turn_acceleration: float = 2.0
    """fastest change of the turn rate, rad/s^2"""
    slack_m: float = 0.5
    """what any localisation jitters between two frames, m"""
    slack_rad: float = 0.05
    """of the heading, rad"""
    deviations: float = 4.0
    """a motion is a jump when it is further off than this many of its standard deviations, beyond the above"""
    memory_s: float = 2.0
    """after so long without a frame the last motion says nothing about the next, s"""
    settle_frames: int = 5
    """consistent frames after a jump before frames are stored again"""
    agreed_m: float = 0.6
    """the stored map confirms a pose when the search is as sure as this (standard deviation), and finds it no further
    off than twice this, m"""
    agreed_rad: float = 0.0218
    """of the heading, rad: 1.25 degrees, a step of the search"""

    def __post_init__(self) -> None:
        for near, far in (("position_m", "blind_position_m"), ("yaw_rad", "blind_yaw_rad")):
            if not getattr(self, near) < getattr(self, far):
                raise NmpError(
                    f"{far} of the gate is {getattr(self, far):g}, {near} {getattr(self, near):g}: it is read up "
                    "to the first, and written up to the second, which must be less"
                )


class _Pose(NamedTuple):
    stamp_ns: int
    x: float
    y: float
    yaw: float
    position_std: float
    yaw_std: float


class _Motion(NamedTuple):
    """How a car moves, in its own frame: its heading half way through."""

    forward: float
    left: float
    turn: float
    """m, m, rad; per second where it is a rate"""
    seconds: float
    """the time that it was measured over"""
    position_std: float
    yaw_std: float
    """of the pose at its start"""


class PoseGate:
    """Judges the poses of one drive, frame by frame.

    A pose is judged by its own standard deviations, and by the motion that leads to it: a car goes on much as it went
    before. A pose that it cannot have reached is a jump or a relocalisation; from then on nothing is stored until the
    poses were consistent for a while, or until what is seen fits the stored map there.
    """

    def __init__(self, limits: GateLimits | None = None) -> None:
        self.limits = limits or GateLimits()
        # All from the start: another thread reads them, and sees that there is such a gate.
        self.counts = Counter({cause: 0 for cause in CAUSES})
        """frames that were gated, and jumps, by cause; over all drives"""
        self.text = ""
        """why the last frame was gated; empty when it was not"""
        self.last_text = ""
        """why a frame was last gated; empty when none ever was"""
        self._now = _Pose(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self._weight = 1.0
        self.restart()

    def restart(self) -> None:
        """Forget the motion: another drive begins."""
        self._last: _Pose | None = None
        self._location = ""
        self._rate: _Motion | None = None
        self._jump = ""
        self._settling = 0

    def check(self, frame: Frame) -> float:
        """Judge the pose of a frame; return the weight in 0..1 with which the prior is read.

        Whether the frame may be stored is asked of :meth:`may_store`, once the network has answered.
        """
        now = _Pose(
            frame.stamp_ns,
            float(frame.map_from_base[0, 3]),
            float(frame.map_from_base[1, 3]),
            yaw_of(frame.map_from_base),
            frame.position_std,
            frame.yaw_std,
        )
        self._follow(now, frame.location)
        limits = self.limits
        self._now = now
        self._weight = min(
            _falling(now.position_std, limits.position_m, limits.blind_position_m),
            _falling(now.yaw_std, limits.yaw_rad, limits.blind_yaw_rad),
        )
        return self._weight

    @property
    def doubts_motion(self) -> bool:
        """Whether the pose jumped, so that what it says of its own exactness is not believed."""
        return self._settling > 0

    def may_store(self, found: NDArray[np.float32] | None) -> bool:
        """Tell whether the frame that was checked last may be stored.

        :param found: [4, 3] what the pose search found, as in :class:`nmp.model.runner.Answer`; None without a search
        """
        if self._settling and found is not None and self._agrees(found):
            self._settling = 0
            self.counts[CONFIRMED] += 1
        self.text = self._doubt()
        self.last_text = self.text or self.last_text
        return not self.text

    def _doubt(self) -> str:
        """Say why the frame is not stored; empty when it is."""
        limits = self.limits
        if self._weight < 1:
            self.counts[UNCERTAIN] += 1
            return (
                f"pose is known to {self._now.position_std:.2f} m and {math.degrees(self._now.yaw_std):.1f} degrees "
                f"only: nothing is stored beyond {limits.position_m:g} m, {math.degrees(limits.yaw_rad):.1f} degrees, "
                f"the prior counts {self._weight:.0%}: check the localisation"
            )
        if self._settling:
            self.counts[SETTLING] += 1
            return f"{self._jump}: nothing is stored until the pose was consistent for {self._settling} more frames"
        return ""

    # -- motion ---------------------------------------------------------------------------------------------

    def _follow(self, now: _Pose, location: str) -> None:
        """Compare a pose with the last ones."""
        last = self._last
        if last is None or location != self._location or now.stamp_ns < last.stamp_ns:
            self.restart()
        else:
            motion = _motion(last, now)
            jump = self._impossible(motion, now)
            if jump:
                self.counts[JUMPS] += 1
                self._jump, self._settling = jump, self.limits.settle_frames
                # A car that is told that it is elsewhere drives on as before: its rate stays.
            else:
                self._settling = max(0, self._settling - 1)
                if motion.seconds > 0:
                    self._rate = _per_second(motion)
        self._last, self._location = now, location

    def _impossible(self, motion: _Motion, now: _Pose) -> str:
        """Say how a motion is beyond what a car can do; empty when it is not."""
        limits, dt = self.limits, motion.seconds
        far = math.hypot(motion.forward, motion.left)
        spread = math.hypot(motion.position_std, now.position_std)
        spread_yaw = math.hypot(motion.yaw_std, now.yaw_std)
        if far > limits.speed * dt + limits.slack_m + limits.deviations * spread:
            return f"pose jumped by {far:.1f} m within {dt:.2f} s"
        if abs(motion.turn) > limits.turn_rate * dt + limits.slack_rad + limits.deviations * spread_yaw:
            return f"pose turned by {math.degrees(abs(motion.turn)):.0f} degrees within {dt:.2f} s"
        rate = self._rate
        if rate is None or max(dt, rate.seconds) > limits.memory_s:
            return ""
        # The rate is that of half an interval ago, and so is what follows from it.
        change = dt * (dt + rate.seconds) / 2
        off = math.hypot(motion.forward - rate.forward * dt, motion.left - rate.left * dt)
        off_yaw = abs(motion.turn - rate.turn * dt)
        # The error of the pose between both motions counts in both.
        share = dt / rate.seconds
        spread = _length(now.position_std, (1 + share) * motion.position_std, share * rate.position_std)
        spread_yaw = _length(now.yaw_std, (1 + share) * motion.yaw_std, share * rate.yaw_std)
        if off > limits.acceleration * change + limits.slack_m + limits.deviations * spread:
            return f"pose jumped by {off:.1f} m against its motion"
        if off_yaw > limits.turn_acceleration * change + limits.slack_rad + limits.deviations * spread_yaw:
            return f"pose turned by {math.degrees(off_yaw):.0f} degrees against its motion"
        return ""

    def _agrees(self, found: NDArray[np.float32]) -> bool:
        """Tell whether the stored map shows that the pose is right: only where something is stored can it be sure."""
        limits = self.limits
        step = np.array([limits.agreed_m, limits.agreed_m, limits.agreed_rad])
        return bool((np.abs(found[0]) <= 2 * step).all() and (found[1] <= step).all())


def doubted(evidence: NDArray[np.uint16], weight: float, scale: float) -> NDArray[np.uint16]:
    """Return evidence [rows, cols] of the prior, lowered so that a network trusts its cells by ``weight`` in 0..1.

    A network weighs a cell of evidence e by t = e / (e + 1) (:meth:`nmp.model.fusion.EvidenceFusion.fuse`); what has
    the weight w t is w e / (1 + (1 - w) e). The paper's fusion only asks whether there is any.

    :param scale: steps of the stored evidence in one unit
    """
    e = evidence.astype(np.float32)
    return np.rint(weight * e / (1 + (1 - weight) * e / scale)).astype(np.uint16)


def _motion(start: _Pose, end: _Pose) -> _Motion:
    turn = math.remainder(end.yaw - start.yaw, 2 * math.pi)
    middle = start.yaw + turn / 2
    c, s, dx, dy = math.cos(middle), math.sin(middle), end.x - start.x, end.y - start.y
    seconds = (end.stamp_ns - start.stamp_ns) / 1e9
    return _Motion(c * dx + s * dy, c * dy - s * dx, turn, seconds, start.position_std, start.yaw_std)


def _per_second(motion: _Motion) -> _Motion:
    dt = motion.seconds
    return motion._replace(forward=motion.forward / dt, left=motion.left / dt, turn=motion.turn / dt)


def _falling(value: float, full: float, none: float) -> float:
    """Return 1 up to ``full``, 0 from ``none``, and a straight line between."""
    return min(1.0, max(0.0, (none - value) / (none - full)))


def _length(*parts: float) -> float:
    return math.sqrt(sum(part * part for part in parts))
