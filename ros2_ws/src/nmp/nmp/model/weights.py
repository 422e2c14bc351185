"""Weights on disk: safetensors for the numbers, JSON for what they mean. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.model.config import NetworkConfig
from nmp.model.network import BEVNetwork

FORMAT = "nmp-weights"
FORMAT_VERSION = 1
DEFAULT_WEIGHTS = Path(__file__).parent.parent / "weights" / "cpu_default.safetensors"


def save_network(network: BEVNetwork, path: Path, training: dict[str, Any]) -> None:
    """Write ``path`` (.safetensors, half precision) and the JSON beside it.

    :param training: how the weights came about (data, command, metrics); kept for the reader, not interpreted
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().cpu().half() if value.is_floating_point() else value.detach().cpu()
        for name, value in network.state_dict().items()
    }
    save_file({name: value.contiguous() for name, value in state.items()}, str(path))
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "classes": list(CLASSES),
        "network": network.config.to_dict(),
        "training": training,
    }
    path.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")


def load_network(path: Path | None = None) -> tuple[BEVNetwork, str]:
    """Load a network in float32, in evaluation mode, and return it with its fingerprint.

    The fingerprint (hex digest of weights and configuration) names the model in every prior that it writes.
    ``None`` loads the weights that come with nmp. Raises :class:`NmpError` for anything that is not a complete,
    matching pair of files.
    """
    path = Path(path) if path is not None else DEFAULT_WEIGHTS
    sidecar = path.with_suffix(".json")
    for needed in (path, sidecar):
        if not needed.is_file():
            raise NmpError(f"weights file {needed} is missing: give a .safetensors file with its .json beside it")
    try:
        description = json.loads(sidecar.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NmpError(f"{sidecar} is not valid JSON ({error}): write them again with 'nmp-train fit'") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise NmpError(f"{sidecar} does not describe nmp weights: give a file written by 'nmp-train fit'")
    if description.get("format_version") != FORMAT_VERSION:
        raise NmpError(
            f"{sidecar} has weights format {description.get('format_version')}, this nmp reads {FORMAT_VERSION}: "
            "update nmp or train again"
        )
    if description.get("classes") != list(CLASSES):
        raise NmpError(f"{path} was trained for classes {description.get('classes')}, nmp maps {list(CLASSES)}")
    config = NetworkConfig.from_dict(description.get("network", {}))
    data = path.read_bytes()
    try:
        state = load_tensors(data)
    except SafetensorError as error:
        raise NmpError(f"{path} is not a readable safetensors file ({error}): copy it again") from error
    network = BEVNetwork(config)
    expected = network.state_dict()
    wrong = sorted(set(expected) ^ set(state)) + sorted(
        n for n in set(expected) & set(state) if expected[n].shape != state[n].shape
    )
    if wrong:
        raise NmpError(
            f"{path} does not fit the network that {sidecar.name} describes ({len(wrong)} tensors differ, first "
            f"{wrong[0]}): the two files do not belong together"
        )
    if any(not torch.isfinite(v).all() for v in state.values() if v.is_floating_point()):
        raise NmpError(f"{path} holds NaN or infinite weights: use an earlier file")
    network.load_state_dict({n: v.to(expected[n].dtype) for n, v in state.items()})
    network.eval()
    digest = hashlib.sha256(data)
    digest.update(json.dumps(config.to_dict(), sort_keys=True).encode())
    return network, digest.hexdigest()[:16]
