"""Layers on disk, and scores made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nmp.cli import main
from nmp.errors import NmpError
from nmp.frame import CLASSES, LocalMap
from nmp.geometry import BevGrid, transform_from_xyyaw
from nmp.layers import LayerWriter, read_layers, to_occupancy
from tests.test_truth import square_map

GRID = BevGrid()


def local_map(stamp_ns: int = 5, probability: float = 0.8, x: float = 0.0) -> LocalMap:
    """Layers with one known half and one unknown half."""
    probabilities = np.full((3, *GRID.shape), probability, np.float32)
    evidence = np.zeros(GRID.shape, np.float32)
    evidence[:, 200:] = 1.0
    return LocalMap(stamp_ns, "boston-seaport", transform_from_xyyaw(x, 0.0, 0.2), GRID, probabilities, evidence)


def test_round_trip(tmp_path: Path) -> None:
    written = local_map(stamp_ns=1_532_402_927_612_460_000)
    LayerWriter(tmp_path / "new" / "layers").write(written)
    [read] = read_layers(tmp_path / "new" / "layers")
    assert (read.stamp_ns, read.location, read.grid) == (written.stamp_ns, written.location, written.grid)
    assert np.array_equal(read.map_from_base, written.map_from_base)
    assert np.array_equal(read.evidence, written.evidence)
    assert np.allclose(read.probabilities[:, :, 200:], 0.8, atol=0.005)
    assert not read.probabilities[:, :, :200].any()  # unknown is not a guess
    assert np.array_equal(to_occupancy(read), to_occupancy(written))


def test_occupancy_range() -> None:
    assert set(np.unique(to_occupancy(local_map(probability=1.0)))) == {-1, 100}
    assert set(np.unique(to_occupancy(local_map(probability=0.0)))) == {-1, 0}


def test_same_layers_give_the_same_bytes_and_time_order(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        writer = LayerWriter(tmp_path / folder)
        for stamp in (20, 100, 3):  # as text, 100 would come before 20
            writer.write(local_map(stamp))
    assert [m.stamp_ns for m in read_layers(tmp_path / "a")] == [3, 20, 100]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_bad_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="no layers in"):
        list(read_layers(tmp_path))
    writer = LayerWriter(tmp_path)
    writer.write(local_map())
    data = (tmp_path / "5.npz").read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"not a zip"):
        (tmp_path / "5.npz").write_bytes(damaged)
        with pytest.raises(NmpError, match="5.npz is not a layer file"):
            list(read_layers(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(NmpError, match="choose another --out"):
        LayerWriter(tmp_path / "file" / "below")


# ------------------------------------------------------------------------------------------------------ nmp eval


@pytest.fixture
def dataroot(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "maps" / "expansion"
    folder.mkdir(parents=True)
    (folder / "boston-seaport.json").write_text(json.dumps(square_map()))
    return tmp_path / "data"


def _write_drive(folder: Path, dataroot: Path, *, perfect: bool) -> None:
    from nmp.evaluation import CityMaps

    maps, writer = CityMaps(dataroot), LayerWriter(folder)
    for stamp in range(3):
        m = local_map(stamp, x=4.0 * stamp)
        known = np.ones(GRID.shape, np.float32)
        probabilities = maps.truth_of(m).astype(np.float32) if perfect else np.zeros_like(m.probabilities)
        writer.write(LocalMap(m.stamp_ns, m.location, m.map_from_base, GRID, probabilities, known))


def test_eval_prints_the_table_and_writes_json(
    dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_drive(tmp_path / "good", dataroot, perfect=True)
    _write_drive(tmp_path / "bad", dataroot, perfect=False)
    out = tmp_path / "scores" / "scores.json"
    folders = [f"no prior={tmp_path / 'bad'}", str(tmp_path / "good")]
    assert main(["eval", *folders, "--maps", str(dataroot), "--json", str(out)]) == 0
    header, bad, good = capsys.readouterr().out.splitlines()
    assert header.endswith("| Divider | Crossing | Boundary | All(mIoU)")
    assert bad.startswith("no prior |") and bad.split()[-1] == "0.00"
    assert good.startswith("good ") and good.split()[-1] == "100.00"
    perfect = {name: 100.0 for name in (*CLASSES, "miou")}
    assert json.loads(out.read_text())["good"] == {**perfect, "frames": 3}


def test_eval_names_one_folder_and_writes_undefined_scores_as_null(dataroot: Path, tmp_path: Path) -> None:
    writer = LayerWriter(tmp_path / "layers")
    nothing = np.zeros((3, *GRID.shape), np.float32)
    pose = transform_from_xyyaw(-2000.0, 0.0, 0.0)  # off the map: neither predicted nor true
    writer.write(LocalMap(1, "boston-seaport", pose, GRID, nothing, np.ones(GRID.shape, np.float32)))
    out = tmp_path / "scores.json"
    arguments = [str(tmp_path / "layers"), "--maps", str(dataroot), "--name", "mine", "--json", str(out)]
    assert main(["eval", *arguments]) == 0
    assert json.loads(out.read_text())["mine"] == {n: None for n in (*CLASSES, "miou")} | {"frames": 1}


def test_eval_errors(dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_drive(tmp_path / "layers", dataroot, perfect=True)
    layers = str(tmp_path / "layers")

    def said(*arguments: str) -> str:
        assert main(["eval", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("nmp: error: ") and error.count("\n") == 1
        return error

    assert "no layers in" in said(str(tmp_path / "nothing"), "--maps", str(dataroot))
    assert "does not exist" in said(layers, "--maps", str(tmp_path / "nothing"))
    assert "no map expansion for boston-seaport" in said(layers, "--maps", str(tmp_path))
    assert "two folders are named layers" in said(layers, layers, "--maps", str(dataroot))
    assert "NAME=DIR" in said(layers, f"b={layers}", "--maps", str(dataroot), "--name", "x")
    assert "cannot write" in said(layers, "--maps", str(dataroot), "--json", f"{layers}/0.npz/scores.json")
