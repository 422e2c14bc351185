"""Reading bags without DDS, whole and damaged ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rosbags.rosbag2 import StoragePlugin, Writer

from nmp.bags.nuscenes_to_bag import STORE, TYPES, offered_qos
from nmp.bags.reader import BagReader
from nmp.errors import NmpError
from nmp.topics import LATCHED
from tests.bag_fixtures import bag_messages, make_bag


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bag(tmp_path_factory.mktemp("bag"))


@pytest.fixture
def copy(drive: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drive, tmp_path / "drive"))


def test_round_trip(drive: Path) -> None:
    messages = bag_messages(drive)
    with BagReader(drive) as reader:
        assert reader.message_count == len(messages) == 2 + 3 * 6 * 4
        assert (reader.start_ns, reader.end_ns) == (messages[0].stamp_ns, messages[-1].stamp_ns)
        chosen = list(reader.messages(["/odom"]))
        assert {m.topic for m in chosen} == {"/odom"} and len(chosen) == 18
        raw = list(reader.raw_messages(["/location"]))
        assert STORE.deserialize_cdr(raw[0][2], "std_msgs/msg/String").data == "singapore-onenorth"  # type: ignore[attr-defined]
        assert list(reader.messages([])) == []


def test_storage_file_alone(drive: Path) -> None:
    with BagReader(drive / "drive.mcap") as reader:
        assert reader.topics["/location"].qos.latched
        assert len(list(reader.messages())) == 74


def test_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "bag"
    with Writer(path, version=9, storage_plugin=StoragePlugin.SQLITE3) as writer:
        c = writer.add_connection(
            "/location", "std_msgs/msg/String", typestore=STORE, offered_qos_profiles=[offered_qos(LATCHED)]
        )
        writer.write(c, 5, STORE.serialize_cdr(TYPES["std_msgs/msg/String"](data="x"), "std_msgs/msg/String"))
    assert [(m.topic, m.stamp_ns, m.message.data) for m in bag_messages(path)] == [("/location", 5, "x")]
    (path / "bag.db3").write_bytes((path / "bag.db3").read_bytes()[:3000])
    with pytest.raises(NmpError, match="bag.db3 is truncated or damaged"):
        bag_messages(path)


def test_missing(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(NmpError, match="nothing does not exist"):
        BagReader(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NmpError, match="is not a bag"):
        BagReader(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(NmpError, match="is not a bag"):
        BagReader(tmp_path / "notes.txt")
    (copy / "metadata.yaml").unlink()
    with pytest.raises(NmpError, match=r"no metadata.yaml.*reindex"):
        BagReader(copy)


def test_storage_gone(copy: Path) -> None:
    (copy / "drive.mcap").unlink()
    with pytest.raises(NmpError, match="incomplete.*drive.mcap"):
        bag_messages(copy)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1, -20, -400])
def test_truncated(copy: Path, keep: int) -> None:
    data = (copy / "drive.mcap").read_bytes()
    (copy / "drive.mcap").write_bytes(data[:keep])
    with pytest.raises(NmpError, match="drive.mcap is truncated or damaged.*recover"):
        bag_messages(copy)


def test_damaged_inside(copy: Path) -> None:
    data = bytearray((copy / "drive.mcap").read_bytes())
    middle = len(data) // 3
    data[middle : middle + 40_000] = b"\xff" * 40_000
    (copy / "drive.mcap").write_bytes(data)
    with pytest.raises(NmpError, match="drive.mcap is truncated or damaged"):
        bag_messages(copy)


@pytest.mark.parametrize("text", ["", "{", "rosbag2_bagfile_information: {version: 99}", "- 1"])
def test_bad_metadata(copy: Path, text: str) -> None:
    (copy / "metadata.yaml").write_text(text)
    with pytest.raises(NmpError, match="drive"):
        bag_messages(copy)


def test_unknown_type(tmp_path: Path) -> None:
    path = tmp_path / "bag"
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        c = writer.add_connection("/odd", "own_msgs/msg/Odd", msgdef="uint8 x", rihs01="RIHS01_00")
        writer.write(c, 1, b"\0\1\0\0\7")
    assert bag_messages(path) == []
    with BagReader(path) as reader, pytest.raises(NmpError, match="/odd .* unknown type own_msgs/msg/Odd"):
        list(reader.messages(["/odd"]))
