"""Divisions of a data set's scenes into training and validation, by where they drive."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nmp.errors import NmpError
from nmp.evaluation import write_json
from nmp_train.sim.drive import Trajectory
from nmp_train.sim.overlap import NEAR_M, format_overlaps, overlaps, read_drives
from nmp_train.sim.rig import KEYFRAME_PERIOD_S

HELP = """\
Divide the scenes of a data set into training and validation, and show how the streets of both overlap:

  original   the division that comes with the data set: its splits.json, or that of the official devkit
  city       whole cities apart: nothing that is validated was near anything that was trained
  overlap    every street of a validation scene was driven in training scenes, mostly before it (Xiong et al., CVPR
             2023, make such a division of Boston): what a map of earlier drives is worth

Training takes the file with data.splits=FILE and scoring with --splits FILE, or it takes the place of
<version>/splits.json of the data set, where they look otherwise. The same drives give the same file.

  nmp-train splits --dataroot ~/nuscenes --version v1.0-trainval --kind overlap --out splits.json"""

KINDS = ("original", "city", "overlap")
PATH_HZ = 10.0
"""drives are compared at this rate"""
COVERED_M = NEAR_M[1]
"""a street was driven where a drive came this near"""
VAL_SHARE = 0.2

Array = NDArray[np.float64]
Splits = dict[str, list[str]]


def city_split(drives: Sequence[Trajectory], share: float = VAL_SHARE) -> Splits:
    """Part whole cities: those whose scenes come nearest to a share of all are for validation.

    Raises :class:`NmpError` for drives of one city only.
    """
    counts = {p: sum(d.location == p for d in drives) for p in sorted({d.location for d in drives})}
    if len(counts) < 2:
        raise NmpError(f"all scenes are in {next(iter(counts), 'no city')}: a split by city needs two cities or more")
    choices = [c for n in range(1, len(counts)) for c in itertools.combinations(counts, n)]
    chosen = min(choices, key=lambda c: (abs(sum(counts[p] for p in c) - share * len(drives)), c))
    return _parted(drives, {d.name for d in drives if d.location in chosen})


def overlap_split(drives: Sequence[Trajectory], share: float = VAL_SHARE) -> Splits:
    """Choose scenes for validation whose streets were all driven in training scenes.

    In every city the latest scenes first, up to a share of its scenes: each is taken if all of its path, and that of
    the ones taken before, stays within 10 m of a training scene. Cities where no street is driven twice are all for
    training.

    Raises :class:`NmpError` when no scene can be chosen.
    """
    chosen: set[str] = set()
    for place in sorted({d.location for d in drives}):
        here = sorted((d for d in drives if d.location == place), key=lambda d: (d.started, d.name), reverse=True)
        paths = [d.resampled(PATH_HZ).poses_xyyaw[:, :2] for d in here]
        trees = [cKDTree(path) for path in paths]
        near = [
            np.stack([tree.query(path, distance_upper_bound=COVERED_M)[0] < COVERED_M for tree in trees], axis=1)
            for path in paths
        ]  # [points, scenes] of each scene: who came by
        training = np.ones(len(here), dtype=bool)
        for k in range(len(here)):
            if len(here) - training.sum() + 1 > share * len(here) + 0.5:
                break
            training[k] = False
            if not all(near[v][:, training].any(axis=1).all() for v in np.flatnonzero(~training)):
                training[k] = True
        chosen |= {d.name for d, kept in zip(here, training, strict=True) if not kept}
    if not chosen:
        raise NmpError("no scene drives only where others drove: a split by overlap needs streets driven twice or more")
    return _parted(drives, chosen)


def read_splits(dataroot: Path, version: str) -> tuple[Splits, str]:
    """Return the scenes by split that come with a data set, and where they were found.

    From its ``splits.json``, else from the official devkit. Raises :class:`NmpError` where that is not installed.
    """
    path = dataroot / version / "splits.json"
    if not path.is_file():
        try:
            from nuscenes.utils.splits import create_splits_scenes
        except ImportError as error:
            raise NmpError(
                f"{path} is missing, and the official splits need nuscenes-devkit: install it, or write the file "
                "with 'nmp-train splits'"
            ) from error
        return create_splits_scenes(), "nuScenes"
    try:
        found = {str(name): [str(s) for s in scenes] for name, scenes in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise NmpError(f"{path} holds no lists of scenes by split ({error}): write them again") from error
    return found, str(path)


def original_split(drives: Sequence[Trajectory], dataroot: Path, version: str) -> Splits:
    """Return the division that comes with a data set, of the scenes that are there.

    Raises :class:`NmpError` where no scene is in any split.
    """
    known, where = read_splits(dataroot, version)
    names = {d.name for d in drives}
    out = {split: sorted(names & set(scenes)) for split, scenes in known.items()}
    if not any(out.values()):
        raise NmpError(f"no scene of {dataroot} is in a split of {where}: choose another kind of split")
    return {split: scenes for split, scenes in out.items() if scenes}


def _parted(drives: Sequence[Trajectory], validation: set[str]) -> Splits:
    names = sorted(d.name for d in drives)
    return {
        "train": [n for n in names if n not in validation],
        "val": [n for n in names if n in validation],
    }


def coverage(drives: Sequence[Trajectory], train: Sequence[str], val: Sequence[str]) -> tuple[float, ...]:
    """Return the shares of the keyframes of ``val`` within 5, 10 and 15 m of the path of any scene of ``train``."""
    apart: list[Array] = []
    for place in sorted({d.location for d in drives}):
        here = [d for d in drives if d.location == place]
        points = [d.resampled(1 / KEYFRAME_PERIOD_S).poses_xyyaw[:, :2] for d in here if d.name in set(val)]
        paths = [d.resampled(PATH_HZ).poses_xyyaw[:, :2] for d in here if d.name in set(train)]
        for xy in points:
            apart.append(cKDTree(np.concatenate(paths)).query(xy)[0] if paths else np.full(len(xy), np.inf))
    distance = np.concatenate(apart) if apart else np.zeros(0)
    return tuple(float((distance < m).mean()) if len(distance) else float("nan") for m in NEAR_M)


def describe(drives: Sequence[Trajectory], splits: Splits) -> str:
    """Return the table of how training and validation overlap, each in itself and one with the other."""
    sides = {name: [d for d in drives if d.name in set(splits.get(name, ()))] for name in ("train", "val")}
    lines = [format_overlaps({name: overlaps(side) for name, side in sides.items() if side})]
    shares = coverage(drives, splits.get("train", ()), splits.get("val", ()))
    near = ", ".join(f"{100 * s:.1f} % within {m:g} m" for s, m in zip(shares, NEAR_M, strict=True))
    lines.append(
        f"{len(sides['train'])} scenes to train on, {len(sides['val'])} to validate. "
        f"Keyframes of val near the path of a train scene: {near}."
    )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp-train splits``."""
    parser.description = HELP
    parser.add_argument(
        "--dataroot", type=Path, required=True, help="nuScenes folder, or trajectories as for 'nmp-train sim'"
    )
    parser.add_argument("--version", help="its tables (default: the only ones there)")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--share", type=float, default=VAL_SHARE, help="of the scenes for validation (default: 0.2)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp-train splits``."""
    if not 0 < args.share < 1:
        raise NmpError(f"--share {args.share:g} is out of range: choose more than 0 and less than 1")
    drives = read_drives(args.dataroot, args.version)
    if args.kind == "city":
        splits = city_split(drives, args.share)
    elif args.kind == "overlap":
        splits = overlap_split(drives, args.share)
    else:
        tables = sorted(args.dataroot.glob("*/scene.json"))
        splits = original_split(drives, args.dataroot, args.version or (tables[0].parent.name if tables else ""))
    write_json(args.out, splits)
    print(describe(drives, splits))
