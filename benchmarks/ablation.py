"""The ablation table of Neural Map Prior (Xiong et al., CVPR 2023): its fusion, with parts of it switched off.

    python benchmarks/ablation.py nmp_train/configs/paper.yaml data.dataroot=/data/nuscenes --gpus 8 \\
      --backbone resnet101.safetensors --out out/ablation

The stage without prior is trained once, without any of the parts, and every row of the table goes on from its weights
with a fusion of its own, which is scored on the validation split. What was done before is not done again: after a kill,
start it once more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from nmp.errors import NmpError
from nmp.metrics import format_table
from nmp_train.config import TrainConfig, load_config
from nmp_train.evaluate import PROTOCOLS

ROWS = {
    "moving average": (False, False, False),
    "GRU": (False, True, False),
    "attention": (True, False, False),
    "GRU + PE": (False, True, True),
    "GRU + attention": (True, True, False),
    "all": (True, True, True),
}
"""network.prior_attention, prior_gru and prior_position of each row"""


def commands(options: argparse.Namespace, config: TrainConfig) -> list[list[str]]:
    """Return the arguments of 'nmp-train' that make the table, in order."""
    if config.network.fusion != "paper" or len(config.stages) != 2 or config.data is None:
        raise NmpError(f"{options.config} needs network.fusion: paper, recorded data, and two stages")
    data, first = config.data, options.out / "first"
    fit = ["fit", str(options.config), *options.override, "--resume", "--out"]
    evaluate = ["--dataroot", str(Path(data.dataroot).expanduser()), "--version", data.version]
    evaluate += ["--split", data.validation_split, "--protocol", options.protocol]
    evaluate += ["--splits", str(Path(data.splits).expanduser())] if data.splits else []
    backbone = ["--backbone", str(options.backbone)] if options.backbone else []
    out = [[*fit, str(first), *_switches(False, False, False), "stages.1.steps=0", *backbone]]
    for name, parts in ROWS.items():
        scores = _scores(options.out, name)
        folder = scores.with_suffix("")
        begin = ["--weights", str(first / "network.safetensors"), "--first-stage", "2"]
        out.append([*fit, str(folder), *_switches(*parts), *begin])
        out.append(["eval", str(folder / "network.safetensors"), *evaluate, "--json", str(scores)])
    return out


def _switches(*parts: bool) -> list[str]:
    keys = ("attention", "gru", "position")
    return [f"network.prior_{key}={str(on).lower()}" for key, on in zip(keys, parts, strict=True)]


def _scores(out: Path, name: str) -> Path:
    return out / f"{name.replace(' ', '_')}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("override", nargs="*", help="key=value, as for 'nmp-train fit'")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, help="as for 'nmp-train fit'")
    parser.add_argument("--gpus", type=int, default=1, help="processes of torchrun (default 1: without it)")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default="empty", help="default: %(default)s")
    options = parser.parse_intermixed_args()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    start = [sys.executable, *(torchrun if options.gpus > 1 else []), "-m", "nmp_train.cli"]
    try:
        todo = commands(options, load_config(options.config, options.override))
    except NmpError as error:
        sys.exit(f"ablation: error: {error}")
    for command in todo:
        if command[0] == "eval" and Path(command[-1]).is_file():
            continue
        if code := subprocess.call([*start, *command]):
            sys.exit(code)
    print(format_table({name: json.loads(_scores(options.out, name).read_text()) for name in ROWS}))


if __name__ == "__main__":
    main()
