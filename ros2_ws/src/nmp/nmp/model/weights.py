"""Weights on disk: safetensors for the numbers, JSON for what they mean. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.model.config import NetworkConfig
from nmp.model.fusion import Exactness
from nmp.model.network import BEVNetwork

FORMAT = "nmp-weights"
FORMAT_VERSION = 5
SHIPPED = Path(__file__).parent.parent / "weights"
DEFAULT_WEIGHTS = SHIPPED / "cpu_default.safetensors"


def save_network(
    network: BEVNetwork,
    path: Path,
    training: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write ``path`` (.safetensors) and the JSON beside it; each is replaced as a whole or not at all.

    :param training: how the weights came about (data, command, metrics); kept for the reader, not interpreted
    :param dtype: of the numbers on disk; a tensor that holds values beyond its range is written in float32
    :param extra: more keys for the JSON, for the reader
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: _stored(value, dtype) for name, value in network.state_dict().items()}
    config = network.config
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "classes": list(CLASSES),
        "network": config.to_dict(),
        # All of it follows from the network: for readers that are not nmp.
        "input": {
            "width": config.input_width,
            "height": config.input_height,
            "mean": list(config.mean),
            "std": list(config.std),
        },
        "prior": {"channels": network.state_channels, "cell_m": config.prior_cell},
        **_search(network),
        **(extra or {}),
        "training": training,
    }
    # Not safetensors' own file writer: it makes files that only their owner can read.
    _replace(path, tensors_to_bytes(state))
    _replace(path.with_suffix(".json"), (json.dumps(description, indent=2) + "\n").encode())


def _search(network: BEVNetwork) -> dict[str, Any]:
    aligner = network.fusion.aligner
    return {} if aligner is None else {"search": aligner.exactness._asdict()}


def put_beside(weights: Path | str, values: dict[str, Any]) -> Path:
    """Add to the JSON beside weights, one level deep, and replace it as a whole; return the file.

    The weights and their fingerprint stay as they are. Raises :class:`NmpError` when it cannot be read or written.
    """
    description = read_description(weights)
    for key, value in values.items():
        description[key] = {**description.get(key, {}), **value}
    path = weights_file(weights).with_suffix(".json")
    _replace(path, (json.dumps(description, indent=2) + "\n").encode())
    return path


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    small = value.to(dtype)
    return small if torch.isfinite(small).all() else value.float()


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise NmpError(f"cannot write {path} ({error.strerror}): free some space or choose another folder") from error


def read_description(given: Path | str | None) -> dict[str, Any]:
    """Return the JSON that belongs to weights, see :func:`weights_file`.

    Raises :class:`NmpError` when either file is missing, or when the JSON does not describe weights of this format
    and of this nmp's classes.
    """
    path = weights_file(given)
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
    if not isinstance(description.get("network"), dict):
        raise NmpError(f"{sidecar} has no network configuration: write the weights again with 'nmp-train fit'")
    return description


def fill(network: BEVNetwork, state: dict[str, Tensor], *, misfit: str, remedy: str, damage: str) -> None:
    """Put tensors into a network, by name.

    Raises :class:`NmpError` when names or shapes are other ones (``misfit``, the tensors, ``remedy``), and when a
    value is not finite (``damage``).
    """
    expected = network.state_dict()
    wrong = sorted(set(expected) ^ set(state)) + sorted(
        n for n in set(expected) & set(state) if expected[n].shape != state[n].shape
    )
    if wrong:
        raise NmpError(f"{misfit} ({len(wrong)} tensors differ, first {wrong[0]}): {remedy}")
    if any(not torch.isfinite(v).all() for v in state.values() if v.is_floating_point()):
        raise NmpError(damage)
    network.load_state_dict({n: v.to(expected[n].dtype) for n, v in state.items()})


def weights_file(given: Path | str | None) -> Path:
    """Return the file that is meant: None for the default, the name of shipped weights (``gpu_default``), or a path."""
    if given is None:
        return DEFAULT_WEIGHTS
    shipped = SHIPPED / f"{given}.safetensors"
    return shipped if shipped.parent == SHIPPED and shipped.is_file() else Path(given).expanduser()


def load_network(path: Path | str | None = None, device: torch.device | str = "cpu") -> tuple[BEVNetwork, str]:
    """Load a network in float32, in evaluation mode, and return it with its fingerprint.

    The fingerprint (hex digest of weights and configuration, as they are on disk) names the model in every prior
    that it writes. ``None`` loads the weights that come with nmp, see :func:`weights_file`. Raises :class:`NmpError`
    for anything that is not a complete, matching pair of files.

    :param device: where the network shall be
    """
    path = weights_file(path)
    description = read_description(path)
    config = NetworkConfig.from_dict(description["network"])
    data = path.read_bytes()
    try:
        state = load_tensors(data)
    except SafetensorError as error:
        raise NmpError(f"{path} is not a readable safetensors file ({error}): copy it again") from error
    network = BEVNetwork(config)
    fill(
        network,
        state,
        misfit=f"{path} does not fit the network that {path.with_suffix('.json').name} describes",
        remedy="the two files do not belong together",
        damage=f"{path} holds NaN or infinite weights: use an earlier file",
    )
    aligner = network.fusion.aligner
    if aligner is not None and "search" in description:  # it is no weight: priors do not depend on it
        aligner.exactness = Exactness.from_dict(description["search"])
    network.to(device).eval()
    digest = hashlib.sha256(data)
    # As it is in the file: a key that a later nmp adds must not orphan the priors of earlier weights.
    digest.update(json.dumps(description["network"], sort_keys=True).encode())
    return network, digest.hexdigest()[:16]
