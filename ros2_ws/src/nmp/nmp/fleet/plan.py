"""Which drives have to wait for which, and which of the others go first.

What a drive adds to the city depends on what lies there: its pose is corrected by it. Drives that can touch the same
tile are therefore mapped one after the other, in the order of time; all others cannot notice each other. Whatever the
number of workers, each drive meets the city as it would if all were mapped one by one.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence, Set
from graphlib import TopologicalSorter


class Plan:
    """An order of jobs that are given in the order of time.

    :param touched: what each job can read or write
    :param costs: how long each takes, in any unit

    The ready job at the head of the longest chain of waiting jobs comes first (the critical path: T. Adam, K. Chandy,
    J. Dickson, "A comparison of list schedules for parallel processing systems", CACM 17 (12), 1974).
    """

    def __init__(self, touched: Sequence[Set[Hashable]], costs: Sequence[float]) -> None:
        waits = predecessors(touched)
        self._chain = list(costs)
        """cost of the longest chain that begins with each job"""
        for job in reversed(range(len(waits))):
            for before in waits[job]:
                self._chain[before] = max(self._chain[before], costs[before] + self._chain[job])
        self.speedup = sum(costs) / max(self._chain, default=1.0) if costs else 1.0
        """how many times faster than one worker any number of them can be"""
        self._sorter = TopologicalSorter(dict(enumerate(waits)))
        self._sorter.prepare()
        self._ready: list[tuple[float, int]] = []
        self._collect()

    def _collect(self) -> None:
        for job in self._sorter.get_ready():
            heapq.heappush(self._ready, (-self._chain[job], job))

    @property
    def ready(self) -> bool:
        """Tell whether a job waits for no other."""
        return bool(self._ready)

    def take(self) -> int:
        """Return the job to do next, by its position."""
        return heapq.heappop(self._ready)[1]

    def done(self, job: int) -> None:
        """Let the jobs go on that wait for this one."""
        self._sorter.done(job)
        self._collect()


def predecessors(touched: Sequence[Set[Hashable]]) -> list[set[int]]:
    """Return, for every job, the nearest earlier ones that touch something of the same; others follow from these."""
    latest: dict[Hashable, int] = {}
    waits: list[set[int]] = []
    for job, things in enumerate(touched):
        waits.append({latest[thing] for thing in things if thing in latest})
        latest.update(dict.fromkeys(things, job))
    return waits
