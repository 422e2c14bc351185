"""Training data: groups of frames in the order of time, of simulated worlds or of a recorded data set."""

from __future__ import annotations

from nmp_train.data.augment import augment
from nmp_train.data.batch import Batch, GroupLoader, Source
from nmp_train.data.group import Drawn, Group, collate
from nmp_train.data.recorded import RecordedGroups, RecordedSource
from nmp_train.data.sampler import Places, StepSampler, Targets, geographic_lanes
from nmp_train.data.simulated import SimulatedGroups, SimulatedSource, make_worlds

__all__ = [
    "Batch",
    "Drawn",
    "Group",
    "GroupLoader",
    "Places",
    "RecordedGroups",
    "RecordedSource",
    "SimulatedGroups",
    "SimulatedSource",
    "Source",
    "StepSampler",
    "Targets",
    "augment",
    "collate",
    "geographic_lanes",
    "make_worlds",
]
