"""What a mapping node has done so far: counts, causes, latency."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Any

import numpy as np


class RunStatistics:
    """Counts of one run, from any thread. Latency runs from a frame's last message to its published layers, s."""

    def __init__(self) -> None:
        self.received = 0
        """images of the anchor camera: so many frames were asked for"""
        self.answered = 0
        self._lock = threading.Lock()
        self._drops: Counter[str] = Counter()
        self._last_error: dict[str, str] = {}
        self._latencies: deque[float] = deque(maxlen=100_000)

    def answer(self, latency_s: float) -> None:
        """Count one frame whose layers are out."""
        with self._lock:
            self.answered += 1
            self._latencies.append(latency_s)

    def drop(self, cause: str, text: str) -> None:
        """Count one lost frame."""
        with self._lock:
            self._drops[cause] += 1
            self._last_error[cause] = text

    @property
    def drops(self) -> Counter[str]:
        """Frames lost after they were complete, by cause; a copy."""
        with self._lock:
            return self._drops.copy()

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

    def summary(self, assembly_drops: Counter[str]) -> dict[str, Any]:
        """Return everything as JSON-ready values; latency is None when nothing was answered."""
        drops = self.drops + assembly_drops
        out: dict[str, Any] = {
            "frames_received": self.received,
            "frames_answered": self.answered,
            "dropped": sum(drops.values()),
            "drops": dict(sorted(drops.items())),
        }
        for name, percent in (("median", 50), ("p95", 95), ("max", 100)):
            out[f"latency_{name}_s"] = round(self.latency(percent), 4) if self.answered else None
        return out
