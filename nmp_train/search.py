"""How exact a network's search for the pose is: measured on a data set, kept beside the weights."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nmp.errors import NmpError
from nmp.frame import Frame
from nmp.geometry import Array, transform_from_xyyaw, yaw_of
from nmp.mapper import OnlineMapper
from nmp.model.fusion import Exactness
from nmp.model.fusion.align import ALIKE
from nmp.model.weights import put_beside
from nmp_train.alignment import motion_between
from nmp_train.evaluate import add_weights_and_data, at_pose, read_scenes, scene_frames

ERRORS = (0.3, 0.3, 0.02)
"""of the poses that are tried, standard deviations: x, y (m), yaw (rad)"""
AXES = ("forward", "left", "turn")
FEWEST = 50
"""frames of which less says nothing"""
RAW = Exactness((1.0, 1.0, 1.0), (1e-4, 1e-4, 1e-5), (1 / ALIKE, 1 / ALIKE, 1 / ALIKE))
"""with it a search gives what it finds as it is"""
HELP = """\
Measure how exact the search for the pose is, and put it into the JSON beside the weights: the poses of a car are then
weighed rightly against it. The scenes are mapped at their true poses, and every frame is looked for from a pose that is
wrong by 0.3 m and 0.02 rad. The weights and their fingerprint stay as they are. A few hundred frames along
streets that are driven more than once are enough.

  nmp-train sim --out data/search --seed 503 --routes 2 --passes 3 --render-scale 0.22
  nmp-train search my.safetensors --dataroot data/search"""


def fit(weights: Path, dataroot: Path, version: str, seed: int = 0) -> Exactness:
    """Map the scenes of a data set, and return how exact the search is there.

    Raises :class:`NmpError` for weights or data that do not load, for weights without a search, and where it finds too
    little.
    """
    rng = np.random.default_rng(seed)
    rows: list[Array] = []
    with tempfile.TemporaryDirectory(prefix="nmp-search-") as folder, OnlineMapper(weights, Path(folder)) as mapper:
        aligner = mapper.network.fusion.aligner
        if aligner is None:
            raise NmpError(f"{weights} have no search for the pose: train them with network.align=true")
        for listed in tqdm(read_scenes(dataroot, version), desc="mapping", unit="scene", disable=None):
            scene = scene_frames(listed)
            for believed, pose in zip(scene.frames, scene.true_poses, strict=True):
                frame = at_pose(believed, pose, 0.0, 0.0)
                off = rng.normal(size=3) * ERRORS
                aligner.exactness = RAW
                found = mapper.measure(misplaced(frame, off))
                aligner.exactness = Exactness()  # whatever was measured before has no part in it
                assert found is not None
                true = torch.tensor([[0.0, 0.0, yaw_of(pose)]], dtype=torch.float64)
                back = motion_between(true + torch.from_numpy(off), true)[0].numpy()
                rows.append(np.stack([back, *found[2:].astype(np.float64)]))
                mapper.update(frame)
            mapper.close()
    return exactness_of(np.stack(rows) if rows else np.empty((0, 3, 3)))


def misplaced(frame: Frame, off: Array) -> Frame:
    """Return a frame whose pose is wrong by ``off``: x, y (m) and yaw (rad) in the map frame."""
    pose = transform_from_xyyaw(0.0, 0.0, float(off[2])) @ frame.map_from_base
    pose[:2, 3] = frame.map_from_base[:2, 3] + off[:2]
    return at_pose(frame, pose, ERRORS[0], ERRORS[2])


def exactness_of(rows: Array) -> Exactness:
    """Return scale, standard deviation and its growth by axis, from what was found of known errors.

    :param rows: [N, 3, 3] of N frames by axis: the true motion, the one that was found, and how vague the comparison
        was (standard deviation, infinite where it said nothing)

    Raises :class:`NmpError` where too few frames were found, and where what is found does not follow the truth.
    """
    axes = []
    for axis, name in enumerate(AXES):
        true, found, vague = rows[np.isfinite(rows[:, 2, axis])][:, :, axis].T
        if len(true) < FEWEST:
            raise NmpError(
                f"the search found {len(true)} of {len(rows)} frames on the map, {FEWEST} are needed: give scenes "
                "along streets that are driven more than once"
            )
        share = float((found * true).sum() / (true**2).sum())
        if share < 0.1:
            raise NmpError(
                f"the search finds {share:.0%} of how far a pose is off ({name}): it is not trained. Train a stage "
                "with alignment_only=true"
            )
        axes.append((1 / share, *_spread_of(found / share - true, vague)))
    return Exactness(*(tuple(column) for column in zip(*axes, strict=True)))


def _spread_of(error: Array, vague: Array) -> tuple[float, float]:
    """Return the standard deviation of errors [N] where nothing is vague, and how it grows with it.

    They are the ones under which the errors are most likely as of a Laplace distribution, in which a few that are far
    off, where the search took one line for another, have little say.
    """
    size = float(np.median(np.abs(error)))
    std = size * np.geomspace(0.2, 3.0, 40)
    growth = np.geomspace(0.02, 2.0, 40)
    spread = np.sqrt(std[:, None, None] ** 2 + (growth[:, None] * vague) ** 2)
    cost = (np.log(spread) + math.sqrt(2) * np.abs(error) / spread).sum(axis=2)
    row, col = np.unravel_index(cost.argmin(), cost.shape)
    return float(std[row]), float(growth[col])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp-train search``."""
    add_weights_and_data(parser, HELP)
    parser.add_argument("--seed", type=int, default=0, help="of the errors that are tried (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp-train search``."""
    exactness = fit(args.weights, args.dataroot, args.version, args.seed)
    path = put_beside(args.weights, {"search": exactness._asdict()})
    for name, scale, std, growth, unit in zip(AXES, *exactness, ("m", "m", "rad"), strict=True):
        print(f"{name}: what is found times {scale:.2f} is off by {std:.3g} {unit} + {growth:.2f} of how vague it is")
    print(f"written to {path}")
