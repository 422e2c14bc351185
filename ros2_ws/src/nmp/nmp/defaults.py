"""Defaults that the mapper, its node and the commands share, in a module that loads nothing."""

from __future__ import annotations

RESIDENT_MB = 256
"""memory for the tiles of a city, MiB"""
STALE_DAYS = 365.0
"""days without a visit after which what is stored counts for less when it is read"""
