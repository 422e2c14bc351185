"""Weights for the node: what inference needs of a training run, checked, with a JSON that says what it is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmp.errors import NmpError
from nmp.evaluation import nan_as_null
from nmp.model import BEVNetwork, NetworkConfig, load_network, save_network
from nmp.model.runner import Runner, example_inputs, output_difference, window_side
from nmp.model.weights import fill, put_beside, read_description
from nmp.prior.coding import Coding, coding_of
from nmp_train import checkpoint
from nmp_train.score import Scores

HELP = """\
Write the weights of a training run for the mapping node: a .safetensors file with a .json beside it. Optimiser, moving
averages and the rest of a checkpoint stay behind. What was written is loaded again and has to give the same layers and
the same prior as before, but for the rounding of half precision.

  nmp-train export out/my_run --out my.safetensors --metrics scores.json
  nmp-train export out/my_run/network.safetensors --out my.safetensors --dtype float --max-mib 200"""

DTYPES = {"half": torch.float16, "float": torch.float32}
TOLERANCE = {"half": 2e-2, "float": 1e-5}
"""largest difference of the outputs, relative to their norm; half precision keeps 11 bits of every weight"""


def export(
    source: Path,
    out: Path,
    *,
    metrics: list[Path] | None = None,
    dtype: str = "half",
    max_mib: float = 16.0,
    vectors: bool = True,
) -> dict[str, Any]:
    """Write ``out`` and the JSON beside it; return what was written and how exact it is.

    :param source: output folder of ``nmp-train fit``, or weights
    :param metrics: JSON files, as ``nmp-train eval`` writes them, to keep in the JSON under their names, beside the
        scores that are there
    :param dtype: half or float, of the numbers on disk
    :param max_mib: largest size of the file, MiB
    :param vectors: False leaves out the heads for instances and directions
    :return: ``file``, ``fingerprint``, ``mib`` and, under ``difference``, ||delta|| / ||before|| of the outputs for a
        frame of noise: of the class logits, of the latents and of the evidence that are stored

    Raises :class:`NmpError` for a source that is damaged or of other classes, metrics that are not JSON, a file that
    becomes too large, and outputs that differ. Nothing is left behind then.
    """
    if out.suffix != ".safetensors":
        raise NmpError(f"--out {out} must end in .safetensors")
    network, training, known, coding = _read(source)
    if not vectors:
        network = _without_vectors(network, source)
    extra = described(training, known | {path.stem: _metrics(path) for path in metrics or []})
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".nmp-export-", dir=out.parent) as folder:
        written = Path(folder, out.name)
        save_network(network, written, training, dtype=DTYPES[dtype], extra=extra)
        if coding is not None:
            put_beside(written, {"prior": {"coding": coding.to_dict()}})
        mib = written.stat().st_size / 2**20
        if mib > max_mib:
            raise NmpError(
                f"the weights take {mib:.1f} MiB, more than {max_mib:g}: allow it with --max-mib {int(mib) + 1}, "
                "or choose a smaller network"
            )
        again, fingerprint = load_network(written)
        side = window_side(network.config)
        inputs = example_inputs(network, side, seed=0)
        before, after = (Runner(n, side=side).outputs(inputs) for n in (network, again))
        difference = output_difference(after, before)
        if not max(difference.values()) <= TOLERANCE[dtype]:
            worst = ", ".join(f"{name} {value:.2g}" for name, value in difference.items())
            raise NmpError(
                f"the outputs of the written weights differ from those of {source} by {worst} of their norm, more than "
                f"{TOLERANCE[dtype]:g}: use --dtype float"
            )
        for path in (written, written.with_suffix(".json")):
            os.replace(path, out.with_suffix(path.suffix))
    return {"file": str(out), "fingerprint": fingerprint, "mib": round(mib, 2), "difference": difference}


def described(training: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what else the JSON beside weights says, for the reader: what they learned from, and their scores.

    :param training: what is known of the run, with its ``config``
    :param metrics: by name, each as ``nmp-train eval`` writes them
    """
    config = training.get("config") or {}
    return {
        "training_set": {key: config[key] for key in ("data", "worlds") if config.get(key) is not None},
        "metrics": metrics,
    }


def metrics_of(scores: Scores) -> dict[str, Any]:
    """Return the scores of a stage of training as ``nmp-train eval`` writes them, by system (``no prior``, ...)."""
    metrics: dict[str, Any] = nan_as_null(
        {
            system: {**parts.get("all", {}), "breakdown": {part: row for part, row in parts.items() if part != "all"}}
            for system, parts in scores.items()
        }
    )
    return metrics


def _read(source: Path) -> tuple[BEVNetwork, dict[str, Any], dict[str, Any], Coding | None]:
    """Return the network in evaluation mode, what is known of its training, its scores by name, and its coding."""
    weights = source / "network.safetensors" if source.is_dir() else source
    if weights.name == checkpoint.NAME or not weights.is_file():
        found = checkpoint.load_checkpoint(weights.parent)
        if found is not None:
            return *_from_checkpoint(found, weights.parent / checkpoint.NAME), {}, None
        if source.is_dir():
            raise NmpError(f"{source} has no network.safetensors: give the output folder of 'nmp-train fit'")
    network, _ = load_network(weights)
    description = read_description(weights)
    training, metrics = (dict(description.get(key) or {}) for key in ("training", "metrics"))
    return network, training, metrics, coding_of(description)


def _from_checkpoint(found: checkpoint.Checkpoint, path: Path) -> tuple[BEVNetwork, dict[str, Any]]:
    progress = found.progress
    config = progress.get("config") or {}
    network = BEVNetwork(NetworkConfig.from_dict(config.get("network") or {}))
    expected = network.state_dict()
    average = {name.removeprefix("module."): value for name, value in found.part("average").items()}
    state = {name: value for name, value in (average or found.part("network")).items() if name in expected}
    fill(
        network,
        state,
        misfit=f"{path} does not fit the network that its configuration describes",
        remedy="train again",
        damage=f"{path} holds NaN or infinite weights: use an earlier run",
    )
    known: dict[str, Any] = {key: progress[key] for key in ("config", "stage", "step") if key in progress}
    known |= progress.get("about") or {}
    return network.eval(), known


def _without_vectors(network: BEVNetwork, source: Path) -> BEVNetwork:
    if not network.config.vector_heads:
        raise NmpError(f"{source} has no heads for instances and directions: leave out --no-vectors")
    small = BEVNetwork(dataclasses.replace(network.config, vector_heads=False)).eval()
    state: dict[str, Tensor] = network.state_dict()
    expected = small.state_dict()
    if any(name not in state or state[name].shape != value.shape for name, value in expected.items()):
        raise NmpError(f"{source}: the layers depend on the heads for instances and directions: keep them")
    small.load_state_dict({name: state[name] for name in expected})
    return small


def _metrics(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NmpError(f"--metrics {path} cannot be read as JSON ({error}): give a file of 'nmp-train eval'") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp-train export``."""
    parser.description = HELP
    parser.add_argument("source", type=Path, help="output folder of 'nmp-train fit', or its weights")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write")
    parser.add_argument("--metrics", type=Path, nargs="+", metavar="JSON", help="scores to keep in the .json beside it")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="half", help="of the numbers (default: %(default)s)")
    parser.add_argument("--max-mib", type=float, default=16.0, help="largest file, MiB (default: %(default)g)")
    parser.add_argument("--no-vectors", action="store_true", help="leave out the heads for instances and directions")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp-train export``."""
    done = export(
        args.source,
        args.out,
        metrics=args.metrics,
        dtype=args.dtype,
        max_mib=args.max_mib,
        vectors=not args.no_vectors,
    )
    difference = ", ".join(f"{name} {value:.1e}" for name, value in done["difference"].items())
    print(f"{done['file']}: {done['mib']:.1f} MiB, fingerprint {done['fingerprint']}")
    print(f"outputs differ from those before by (relative to their norm): {difference}")
