"""What a mapping node has done so far: counts, causes, latency."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np

RECENT = 100
"""frames over which the latency of the stages is told"""


class RunStatistics:
    """Counts of one run, from any thread.

    Latency runs from the moment at which a frame's last message is taken from the middleware to its published layers,
    s. What that message took to get there is the stage "transport".
    """

    def __init__(self) -> None:
        self.received = 0
        """images of the anchor camera: so many frames were asked for"""
        self.answered = 0
        self.keyframes = 0
        """keyframes whose layers are out"""
        self._begin_s: float | None = None
        self._end_s = 0.0
        self._lock = threading.Lock()
        self._drops: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()
        self._last_error: dict[str, str] = {}
        self._latencies: deque[float] = deque(maxlen=100_000)
        self._stages: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def answer(self, latency_s: float, stages_s: Mapping[str, float], keyframe: bool = True) -> None:
        """Count one frame whose layers are out, with the time that each stage of it took (s)."""
        with self._lock:
            self.answered += 1
            self.keyframes += keyframe
            self._end_s = time.monotonic()
            if self._begin_s is None:
                self._begin_s = self._end_s
            self._latencies.append(latency_s)
            for stage, seconds in stages_s.items():
                self._stages[stage].append(seconds)

    def drop(self, cause: str, text: str, count: int = 1) -> None:
        """Count lost frames."""
        with self._lock:
            if count:
                self._drops[cause] += count
                self._last_error[cause] = text

    def skip(self, cause: str, count: int) -> None:
        """Count frames that were left alone because somebody wanted it so."""
        with self._lock:
            self._skips[cause] += count

    @property
    def drops(self) -> Counter[str]:
        """Frames lost after they were complete, by cause; a copy."""
        with self._lock:
            return self._drops.copy()

    @property
    def skips(self) -> Counter[str]:
        """Frames left alone, by cause; a copy."""
        with self._lock:
            return self._skips.copy()

    @property
    def last_error(self) -> dict[str, str]:
        """The latest text for each cause; a copy."""
        with self._lock:
            return dict(self._last_error)

    def latency(self, percent: float, newest: int = 0) -> float:
        """Return a percentile of the latency, s; of the ``newest`` frames only when given; nan without frames."""
        with self._lock:
            values = list(self._latencies)[-newest:]
        return float(np.percentile(values, percent)) if values else float("nan")

    def stages(self) -> dict[str, float]:
        """Return the median time of each stage over the last frames, s, in the order of the stages."""
        with self._lock:
            return {stage: float(np.median(values)) for stage, values in self._stages.items()}

    def summary(self, assembly_drops: Counter[str], unasked: int = 0) -> dict[str, Any]:
        """Return everything as JSON-ready values; latency is None when nothing was answered.

        :param unasked: images of the anchor camera that were left alone because of ``max_rate``
        """
        drops = self.drops + assembly_drops
        out: dict[str, Any] = {
            "frames_received": self.received,
            "frames_answered": self.answered,
            "keyframes_answered": self.keyframes,
            "seconds": round(self._end_s - self._begin_s, 3) if self._begin_s is not None else 0.0,
            "dropped": sum(drops.values()),
            "drops": dict(sorted(drops.items())),
            "skips": dict(sorted((self.skips + Counter({"max_rate": unasked})).items())),
        }
        for name, percent in (("median", 50), ("p95", 95), ("p99", 99), ("max", 100)):
            out[f"latency_{name}_s"] = round(self.latency(percent), 4) if self.answered else None
        out["stages_s"] = {stage: round(seconds, 5) for stage, seconds in self.stages().items()}
        return out
