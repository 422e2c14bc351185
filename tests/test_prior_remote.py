"""A city behind a URL: TensorStore's drivers for S3 and Google's store against servers on this machine."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmp import cli
from nmp.errors import NmpError
from nmp.nodes import prior_jobs
from nmp.prior import CityPrior, PriorSpec, Window
from nmp.prior.storage import Storage, place_of

moto_server = pytest.importorskip("moto.server", reason="the stand-in for S3 is in the extra dev")
boto3 = pytest.importorskip("boto3")

CITY = "boston-seaport"
SPEC = PriorSpec(3, 0.3, "abc123", evidence_cap=4096)
AREA = Window(-40, -40, 120, 120)
SECOND = 1_000_000_000


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty bucket, with the variables that lead to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        serve = _s3 if request.param == "s3" else _gcs
        yield from serve(patch)


def _s3(patch: pytest.MonkeyPatch) -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    patch.setenv("AWS_ENDPOINT_URL", address)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_REGION", "eu-central-1")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        patch.delenv(name, raising=False)
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket="fleet", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    yield "s3://fleet"
    server.stop()


def _gcs(patch: pytest.MonkeyPatch) -> Iterator[str]:
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    download = objects.download

    # What TensorStore asks of Google's server, and this one does not know: names from one to another, the last bytes of
    # a file, and with every file the number of its version.
    def list_objects(request: Any, response: Any, storage: Any, *_: Any, **__: Any) -> None:
        first, end = (request.query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
        found, _ = storage.get_file_list(request.params["bucket_name"])
        items = [item for item in found if first <= item["name"] and not (end and item["name"] >= end)]
        response.json({"kind": "storage#objects", "prefixes": [], "items": items})

    def get_bytes(request: Any, response: Any, storage: Any, *_: Any, **__: Any) -> None:
        name, asked = (request.params["bucket_name"], request.params["object_id"]), request.get_header("range", "")
        with contextlib.suppress(objects.NotFound, KeyError):
            about = storage.get_file_obj(*name)
            size, last = int(about["size"]), asked.removeprefix("bytes=-")
            if last.isdecimal():
                request.get_header = lambda *_: f"bytes={max(0, size - int(last))}-{size - 1}"
            response["x-goog-generation"] = about["generation"]
        download(request, response, storage)

    patch.setattr(objects, "ls", list_objects)
    patch.setattr(objects, "download", get_bytes)
    patch.delitem(sys.modules, "gcp_storage_emulator.server", raising=False)  # it would hold the other one
    server = importlib.import_module("gcp_storage_emulator.server").create_server(
        "127.0.0.1", 0, in_memory=True, default_bucket="fleet"
    )
    server.start()
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server._api._httpd.server_address[1]}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "test")
    yield "gs://fleet"
    server.stop()


def drive(place: Path | str, seed: int) -> str:
    """Drive once through the city and return the id of the drive."""
    rng = np.random.default_rng(seed)
    with CityPrior.open(place, CITY, SPEC, flush_interval_s=1e6, vehicle=f"car {seed}") as prior:
        for frame in range(2):
            window = Window(*rng.integers(-40, 10, 2).tolist(), 60, 60)
            _, evidence = prior.read(window)
            seen = rng.integers(-127, 128, (3, *window.shape)).astype(np.int8)
            prior.write(window, seen, evidence + np.uint16(200), (1000 * seed + frame) * SECOND)
        record = prior.close()
    assert record is not None
    return record.id


def content(place: Path | str) -> list[np.ndarray]:
    """Everything that a reader sees of the city."""
    with CityPrior.open(place, CITY, SPEC, read_only=True) as prior:
        return [*prior.read(AREA), prior.last_seen(AREA), prior.traversals(AREA)]


def test_a_city_behind_a_url_is_the_one_in_a_folder(bucket: str, tmp_path: Path) -> None:
    there, here = f"{bucket}/same", tmp_path / "here"
    assert [drive(there, seed) for seed in (1, 2)] == [drive(here, seed) for seed in (1, 2)]
    for a, b in zip(content(there), content(here), strict=True):
        np.testing.assert_array_equal(a, b)
    names = [name for name in Storage(f"{here}/{CITY}").keys() if not name.endswith("lock")]
    assert Storage(f"{there}/{CITY}").keys() == names


def test_a_car_drives_on_its_own_disk_and_merges_later(bucket: str, tmp_path: Path) -> None:
    """What docs/prior.md tells to do where there is no network: every command takes the URL."""
    shared = f"{bucket}/later/{CITY}"
    cars = []
    for seed in (1, 2, 3):
        drive(tmp_path / str(seed), seed)
        cars.append(str(tmp_path / str(seed) / CITY))
    assert cli.main(["prior", "merge", shared, *cars]) == 0
    assert cli.main(["prior", "merge", shared, cars[0]]) == 0  # known: it changes nothing
    assert cli.main(["prior", "merge", str(tmp_path / "all" / CITY), *reversed(cars)]) == 0
    for a, b in zip(content(f"{bucket}/later"), content(tmp_path / "all"), strict=True):
        np.testing.assert_array_equal(a, b)
    before = content(f"{bucket}/later")
    newest = drive(f"{bucket}/later", 9)
    assert cli.main(["prior", "rollback", shared, "--drop", newest[:12]]) == 0
    assert cli.main(["prior", "compact", shared, "--older-than", "0"]) == 0
    for a, b in zip(content(f"{bucket}/later"), before, strict=True):
        np.testing.assert_array_equal(a, b)
    for command in (["log"], ["show"], ["verify"], ["export", "--out", str(tmp_path / "city.zip")]):
        assert cli.main(["prior", command[0], shared, *command[1:]]) == 0
    assert prior_jobs.load_version(f"{bucket}/later", CITY, "") == 1


def test_damage_is_found_and_mended_from_another_copy(bucket: str, tmp_path: Path) -> None:
    drive(tmp_path, 1)
    shared = f"{bucket}/damage/{CITY}"
    assert cli.main(["prior", "merge", shared, str(tmp_path / CITY)]) == 0
    storage = Storage(shared)
    tile = next(name for name in storage.keys() if "/c/0/" in name)
    content_of_tile = bytearray(storage.get(tile) or b"")
    content_of_tile[len(content_of_tile) // 2] ^= 1
    storage.put(tile, bytes(content_of_tile))
    assert cli.main(["prior", "verify", shared]) == 2
    assert cli.main(["prior", "verify", shared, "--repair", "--from", str(tmp_path / CITY)]) == 0
    assert cli.main(["prior", "verify", shared]) == 0


def test_two_processes_writing_one_city_lose_nothing(bucket: str, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from test_prior_remote import drive
        for seed in (int(number) for number in sys.argv[2:]):
            drive(sys.argv[1], seed)
        """
    )
    there = f"{bucket}/both"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    running = [
        subprocess.Popen([sys.executable, "-c", script, there, *seeds], env={**os.environ, "PYTHONPATH": paths})
        for seeds in (("1", "2"), ("3", "4"))
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    traversals = content(there)[3]
    assert len([name for name in Storage(f"{there}/{CITY}/commits").keys()]) == 4
    assert traversals.max() >= 3


def test_a_store_that_does_not_answer_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with pytest.raises(NmpError, match="s3://fleet/none/boston-seaport/city.json"):
        CityPrior.open("s3://fleet/none", CITY, SPEC)


def test_the_mapper_takes_a_url(bucket: str) -> None:
    from nmp.mapper import OnlineMapper  # brings torch, which the other processes need not wait for

    with OnlineMapper(prior_dir=place_of(f"{bucket}/mapped")) as mapper:
        assert mapper.city(CITY).extent() is None
    assert Storage(f"{bucket}/mapped/{CITY}").get("city.json")
    assert place_of("~/prior") == Path.home() / "prior"
