"""The ablation table: every row is trained from the same first stage, with its own parts of the fusion."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from training_fixtures import TINY_NETWORK, ColouredSource

from nmp.model import load_network
from nmp_train.cli import main
from nmp_train.config import load_config

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "ablation.py"


@pytest.fixture
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    network = json.loads(json.dumps(asdict(TINY_NETWORK))) | {"fusion": "paper"}
    stage = {"seconds": 0, "steps": 1, "batch": 2, "learning_rate": 0.01}
    stages = [stage, stage | {"group": 2, "radius_m": 4.0, "freeze_images": True}]
    path.write_text(yaml.safe_dump({"workers": 0, "network": network, "stages": stages, "data": {"dataroot": "~/d"}}))
    return path


def test_all_rows_are_trained_and_scored_once(
    ablation: ModuleType,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("nmp_train.fit._sources", lambda config, *_: (ColouredSource(config), None))
    scored: list[list[str]] = []

    def call(command: list[str]) -> int:
        arguments = command[command.index("nmp_train.cli") + 1 :]
        if arguments[0] == "fit":
            return main([*arguments, "--device", "cpu"])
        scored.append(arguments)
        Path(arguments[-1]).write_text(
            json.dumps(dict.fromkeys(("divider", "crossing", "boundary", "miou"), len(scored)))
        )
        return 0

    monkeypatch.setattr("subprocess.call", call)
    out = tmp_path / "table"
    monkeypatch.setattr(sys, "argv", ["ablation.py", str(config), "--out", str(out), "seed=3"])
    ablation.main()
    table = capsys.readouterr().out
    first = load_network(out / "first" / "network.safetensors")[0]
    for number, (name, parts) in enumerate(ablation.ROWS.items(), 1):
        folder = out / name.replace(" ", "_")
        network = load_network(folder / "network.safetensors")[0]
        net = network.config
        assert (net.prior_attention, net.prior_gru, net.prior_position) == parts
        assert load_config(folder / "config.yaml", []).seed == 3
        # backbone and neck are those of the one first stage
        for key, value in first.backbone.state_dict().items():
            assert (network.backbone.state_dict()[key] == value).all(), (name, key)
        assert f"{name:15} | {number:7.2f}" in table
    assert len(scored) == 6 and "~" not in " ".join(scored[0])
    ablation.main()
    assert len(scored) == 6  # all of it is there


def test_other_configurations_are_refused(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1")
    monkeypatch.setattr(sys, "argv", ["ablation.py", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="ablation: error: .*needs network.fusion: paper"):
        ablation.main()
