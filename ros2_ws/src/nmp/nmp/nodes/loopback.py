"""DDS on this machine only, for what is started here. Nothing here imports ROS, which reads this when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

RANGE = "ROS_AUTOMATIC_DISCOVERY_RANGE"
PROFILES = "FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"
"""of Fast DDS up to 2 and from 3 on"""
PROFILE = Path(__file__).resolve().parents[1] / "config" / "fastdds_loopback.xml"


def loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that limit DDS to this machine, without those that somebody has set.

    Whoever has set another range wants others to be reached: they are then given no profile that shuts them out.
    """
    if environment.get(RANGE, "LOCALHOST") != "LOCALHOST":
        return {}
    profiles = {} if any(name in environment for name in PROFILES) else dict.fromkeys(PROFILES, str(PROFILE))
    return {name: value for name, value in {RANGE: "LOCALHOST", **profiles}.items() if name not in environment}
