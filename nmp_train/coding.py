"""How the prior of a network is written: a coding made from cells that the network wrote, kept beside its weights."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nmp.errors import NmpError
from nmp.mapper import OnlineMapper
from nmp.model.fusion import EvidenceFusion
from nmp.model.network import BEVNetwork
from nmp.model.weights import put_beside
from nmp.prior.cells import Cells
from nmp.prior.coding import Coding, make_coding
from nmp.prior.ledger import Ledger, State
from nmp.prior.storage import Storage
from nmp_train.evaluate import add_weights_and_data, read_scenes, scene_frames

STEP = 192.0
"""of what is stored, in steps of int8 of an average channel: see docs/prior.md for what others cost"""
HELP = """\
Make the coding with which cities are written that these weights begin, from what they make of a data set, and put it
into the JSON beside them. The weights and their fingerprint stay as they are; cities that exist keep their own coding.
A few hundred frames along different streets are enough. A larger step makes the prior smaller and less exact.

  nmp-train sim --out data/coding --seed 503 --routes 2 --passes 3 --render-scale 0.22
  nmp-train coding my.safetensors --dataroot data/coding"""


def reads_of(network: BEVNetwork) -> NDArray[np.float64]:
    """Return the first thing that a network makes of trust x latent [outputs, channels], a linear map.

    Raises :class:`NmpError` for a network whose cells are no means: they are written channel by channel.
    """
    if not isinstance(network.fusion, EvidenceFusion):
        raise NmpError("cells of this network's fusion are written channel by channel: it needs no coding")
    weight = network.fusion.prior_in.weight.detach().float().cpu()
    return weight[:, :-1, 0, 0].numpy().astype(np.float64)


def fit(weights: Path, dataroot: Path, version: str, step: float = STEP) -> Coding:
    """Map the scenes of a data set, and return the coding for the cells that come out.

    Raises :class:`NmpError` for weights or data that do not load, and for too little data.
    """
    tiles: list[Cells] = []
    with tempfile.TemporaryDirectory(prefix="nmp-coding-") as folder:
        with OnlineMapper(weights, Path(folder), coded=False) as mapper:
            reads = reads_of(mapper.network)
            scenes = read_scenes(dataroot, version)
            for scene in tqdm(scenes, desc="mapping", unit="scene", disable=None):
                for frame in scene_frames(scene).frames:
                    mapper.update(frame)
                mapper.close()
        for location in Storage(folder).children():
            ledger = Ledger.open(Storage(folder).below(location), read_only=True)
            state = State(ledger, ledger.active())
            tiles += state.load(state.keys()).values()
    return make_coding(tiles, reads, step)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp-train coding``."""
    add_weights_and_data(parser, HELP)
    parser.add_argument("--step", type=float, default=STEP, help="of what is stored (default: %(default)g)")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp-train coding``."""
    coding = fit(args.weights, args.dataroot, args.version, args.step)
    path = put_beside(args.weights, {"prior": {"coding": coding.to_dict()}})
    print(f"{path}: coding {coding.name}, {coding.components} components of {coding.channels} channels")
