"""What ``/diagnostics`` says of the mapping node, once a second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from nmp import topics
from nmp.assembly import FrameAssembler
from nmp.nodes.statistics import RunStatistics


@dataclass
class Condition:
    """How the node is, at the moment of a report."""

    state: str
    """of the lifecycle: active, inactive ..."""
    failure: str = ""
    """why the last transition, or the last frame, failed"""
    prior_error: str = ""
    gate: str = ""
    """why the pose of the last frame was doubted"""
    gates: Mapping[str, int] = field(default_factory=dict)
    """frames whose pose was doubted, by cause"""
    paused: bool = False
    waiting: int = 0
    silent: Sequence[str] = ()
    received: Mapping[str, int] = field(default_factory=dict)
    """messages, by topic"""
    prior: Mapping[str, int] = field(default_factory=dict)
    """what the prior holds, by kind"""
    damage: str = ""
    """what of the prior is damaged"""
    stamp_age_s: float | None = None


class Reports:
    """Makes one status from what was counted; keeps what the last report said, for rates."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._drops: Counter[str] = Counter()
        self._answered = 0
        self._received: Mapping[str, int] = {}
        self._at_s = time.monotonic()

    def make(self, now: Condition, statistics: RunStatistics, assembler: FrameAssembler) -> DiagnosticStatus:
        """Return the status since the last call."""
        drops = statistics.drops + assembler.drops
        fresh = drops - self._drops
        answered = statistics.answered - self._answered
        seconds = max(time.monotonic() - self._at_s, 1e-3)
        texts = {**assembler.last_error, **statistics.last_error}
        status = DiagnosticStatus(name=f"{self._name}: mapping", hardware_id="nmp")
        status.level, status.message = _judge(now, fresh, texts, answered, assembler)
        status.values = [
            KeyValue(key=key, value=str(value))
            for key, value in {
                "state": now.state + (", paused" if now.paused else ""),
                "frames received": statistics.received,
                "frames answered": statistics.answered,
                "frames waiting": now.waiting,
                **{f"dropped: {cause}": count for cause, count in sorted(drops.items())},
                **{f"skipped: {cause}": count for cause, count in sorted(statistics.skips.items())},
                **({"skipped: max_rate": assembler.skipped} if assembler.skipped else {}),
                **{f"gate: {cause}": count for cause, count in sorted(now.gates.items())},
                "rate frames (Hz)": f"{answered / seconds:.1f}",
                **self._rates(now, seconds),
                "latency median (s)": f"{statistics.latency(50, newest=100):.3f}",
                "latency p95 (s)": f"{statistics.latency(95, newest=100):.3f}",
                **{f"latency {stage} (s)": f"{value:.4f}" for stage, value in statistics.stages().items()},
                **({"stamp age (s)": f"{now.stamp_age_s:.3f}"} if now.stamp_age_s is not None else {}),
                "cameras lost": ", ".join(assembler.lost) or "none",
                "prior location": assembler.location or "none",
                **{f"prior {kind}": count for kind, count in now.prior.items()},
                **({"prior damage": now.damage} if now.damage else {}),
                "silent topics": ", ".join(now.silent) or "none",
            }.items()
        ]
        self._drops, self._answered, self._received = drops, statistics.answered, dict(now.received)
        self._at_s = time.monotonic()
        return status

    def _rates(self, now: Condition, seconds: float) -> dict[str, str]:
        """Messages a second of images and poses, by topic."""
        return {
            f"rate {topic} (Hz)": f"{max(count - self._received.get(topic, 0), 0) / seconds:.1f}"
            for topic, count in now.received.items()
            if "image_raw" in topic or topic == topics.ODOM
        }


def _judge(
    now: Condition, fresh: Counter[str], texts: Mapping[str, str], answered: int, assembler: FrameAssembler
) -> tuple[Any, str]:
    """Return the level, and one sentence: the worst that is known."""
    worst = fresh.most_common(1)[0][0] if fresh else ""
    if now.state != "active":
        level = DiagnosticStatus.ERROR if now.failure else DiagnosticStatus.WARN
        return level, now.failure or f"{now.state}: nothing is mapped"
    if now.failure or (worst and not answered):
        return DiagnosticStatus.ERROR, now.failure or f"{worst}: {texts[worst]}"
    if now.prior_error:
        return DiagnosticStatus.ERROR, now.prior_error
    if now.gate:
        return DiagnosticStatus.WARN, now.gate
    if now.damage:
        return DiagnosticStatus.WARN, f"the prior is damaged: {now.damage}"
    if now.silent:
        return DiagnosticStatus.WARN, f"nothing comes from {', '.join(now.silent)}"
    if worst:
        return DiagnosticStatus.WARN, f"{worst}: {texts[worst]}"
    if assembler.lost:
        why = next(iter(assembler.lost.values()))
        return DiagnosticStatus.WARN, f"mapping without {', '.join(assembler.lost)}: {why}"
    if assembler.notes:
        return DiagnosticStatus.WARN, next(iter(assembler.notes.values()))
    if now.paused:
        return DiagnosticStatus.OK, "paused: nothing is mapped"
    return DiagnosticStatus.OK, f"{answered} frames in the last second"
