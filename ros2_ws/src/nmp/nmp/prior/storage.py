"""Where bytes are kept: a folder, or by URL whatever else TensorStore reaches (memory://, s3://, gs://)."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import tensorstore as ts

from nmp.errors import NmpError

Place = Path | str
"""a folder, or a URL of TensorStore such as s3://bucket/prefix"""
_RETRIES = {"max_retries": 4, "initial_delay": "200ms", "max_delay": "1s"}
CONTEXT = ts.Context(
    {
        # saving shares the machine with the network: one thread compresses, and no second cache of tiles
        "data_copy_concurrency": {"limit": 1},
        "file_io_concurrency": {"limit": 4},
        "cache_pool": {"total_bytes_limit": 0},
        # every write goes to a file of its own name, is synced and renamed; the default would begin with what a
        # crash left of an earlier write, and keep the rest of it where the new content is shorter
        "file_io_locking": {"mode": "none"},
        # when the network is gone a car should know within seconds; the default tries for minutes
        "s3_request_retries": _RETRIES,
        "gcs_request_retries": _RETRIES,
    }
)
ASIDE = ".corrupt"


class Storage:
    """Named blobs below one folder or URL. A write replaces a blob as a whole, or not at all.

    Methods raise :class:`NmpError` that names the blob when it cannot be reached.
    """

    def __init__(self, place: Place) -> None:
        text = str(place)
        if "://" in text:
            try:
                self.spec: dict[str, Any] = _from_environment(ts.KvStore.Spec(text.rstrip("/") + "/").to_json())
            except ValueError as error:
                raise NmpError(f"prior at {text}: {reason_of(error)}") from error
            self.name = text.rstrip("/")
        else:
            path = Path(text).expanduser().absolute()
            self.spec = {"driver": "file", "path": f"{path}/"}
            self.name = str(path)
        self._connect()

    def _connect(self) -> None:
        file = self.spec["driver"] == "file"
        self.local: Path | None = Path(self.spec["path"]) if file else None
        """the folder, where it is one"""
        try:
            self._kv = ts.KvStore.open(self.spec, context=CONTEXT).result()
        except (ValueError, OSError) as error:
            raise NmpError(f"cannot open {self.name} ({reason_of(error)}): check the --prior folder") from error

    @classmethod
    def of_zip(cls, file: Path) -> Storage:
        """Return the read-only content of a zip file."""
        storage = cls.__new__(cls)
        storage.name = str(file)
        storage.spec = {"driver": "zip", "base": {"driver": "file", "path": str(file.absolute())}, "path": ""}
        storage._connect()
        return storage

    def below(self, path: str) -> Storage:
        """Return what lies below a folder of this one."""
        storage = Storage.__new__(Storage)
        storage.name = f"{self.name}/{path}"
        storage.spec = {**self.spec, "path": f"{self.spec['path']}{path}/"}
        storage._connect()
        return storage

    def get(self, key: str) -> bytes | None:
        """Return a blob, None when it is not there."""
        try:
            found = self._kv.read(key).result()
        except (ValueError, OSError) as error:
            raise NmpError(
                f"cannot read {self.name}/{key} ({reason_of(error)}): check the disk and the permissions of the "
                "--prior folder"
            ) from error
        return bytes(found.value) if found.state == "value" else None

    def make_room(self, key: str) -> None:
        """Make the folder of a blob where it is missing. Raises OSError.

        TensorStore would make it as well, but the power may fail before a disk knows of a new folder, and what was
        synced in it is gone then.
        """
        if self.local is not None:
            make_folder((self.local / key).parent)

    def put(self, key: str, content: bytes) -> None:
        """Write a blob; it is synced to disk when this returns."""
        try:
            self.make_room(key)
            self._kv.write(key, content).result()
        except (ValueError, OSError) as error:
            raise NmpError(
                f"cannot write {self.name}/{key} ({reason_of(error)}): free disk space, or mend the permissions of the "
                "--prior folder"
            ) from error

    def keys(self) -> list[str]:
        """Return the names of all blobs, in order."""
        try:
            return sorted(key.decode() for key in self._kv.list().result())
        except (ValueError, OSError) as error:
            raise NmpError(f"cannot list {self.name} ({reason_of(error)}): check the permissions") from error

    def children(self) -> list[str]:
        """Return the names of the folders right below this one, in order."""
        if self.local is not None:
            found = self.local.iterdir() if self.local.is_dir() else ()
            return sorted(p.name for p in found if p.is_dir() and not p.name.startswith("."))
        return sorted({key.partition("/")[0] for key in self.keys() if "/" in key})

    def delete(self, key: str) -> None:
        """Remove one blob, if it is there."""
        try:
            self._kv.write(key, None).result()
        except (ValueError, OSError) as error:
            raise NmpError(f"cannot delete {self.name}/{key} ({reason_of(error)}): check permissions") from error

    def clear(self) -> None:
        """Remove everything below."""
        try:
            if self.local is not None:
                if self.local.is_dir():
                    shutil.rmtree(self.local)
            else:
                self._kv.delete_range(ts.KvStore.KeyRange()).result()
        except (ValueError, OSError) as error:
            raise NmpError(f"cannot clear {self.name} ({reason_of(error)}): check the permissions") from error

    def discard(self) -> None:
        """Remove everything below at once: nobody ever finds a part of it, not even after a crash."""
        if self.local is None:
            self.clear()
            return
        # folders whose names begin with a dot are nobody's
        gone = self.local.with_name(f".{self.local.name}-{uuid.uuid4().hex}")
        try:
            self.local.rename(gone)
            _sync(self.local.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise NmpError(f"cannot clear {self.name} ({reason_of(error)}): check the permissions") from error
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what crashes left of folders right below that were discarded."""
        if self.local is not None:
            for gone in self.local.glob(".*"):
                shutil.rmtree(gone, ignore_errors=True)

    def keep_aside(self, key: str) -> str:
        """Copy a damaged blob to a name that nobody reads; return that name, empty where there is nothing."""
        content = self.get(key)
        if content is None:
            return ""
        aside, number = f"{key}{ASIDE}", 2
        while self.get(aside) is not None:
            aside, number = f"{key}.{number}{ASIDE}", number + 1
        self.put(aside, content)
        return aside

    def put_aside(self, key: str) -> str:
        """Move a damaged blob to a name that nobody reads; return that name, empty where there is nothing."""
        aside = self.keep_aside(key)
        if aside:
            self.delete(key)
        return aside

    def size(self) -> int | None:
        """Return the bytes of all blobs below; None behind a URL, where only reading them would tell."""
        if self.local is None:
            return None
        total = 0
        for folder, _, files in os.walk(self.local):
            for name in files:
                try:
                    total += os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # replaced while this counts
                    continue
        return total


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, and sync each to disk. Raises OSError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):  # somebody else was faster; whether it is synced only they know
        os.mkdir(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place_of(text: str) -> Place:
    """Return a URL as it is, and anything else as the path of a folder."""
    return text if "://" in text else Path(text).expanduser()


def _from_environment(spec: dict[str, Any]) -> dict[str, Any]:
    """Complete the spec of an S3 store by the variables that Amazon's own tools read, where they are set.

    TensorStore reads the keys of an account by itself, but neither the endpoint of another store (MinIO, Ceph, ...)
    nor, with such an endpoint, the region: docs.aws.amazon.com/sdkref/latest/guide/feature-ss-endpoints.html.
    """
    if spec["driver"] != "s3":
        return spec
    given = {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        # without being told it also asks for files of a profile and for the metadata of a virtual machine
        "aws_credentials": {"type": "environment"} if os.environ.get("AWS_ACCESS_KEY_ID") else None,
    }
    if given["endpoint"] and not given["aws_region"]:
        given["aws_region"] = "us-east-1"  # most of these stores ignore it, but it is part of every signature
    return spec | {key: value for key, value in given.items() if value}


class Lock:
    """Holds a lock file of a local folder; the kernel frees it when the process ends in any way.

    :param wait: wait for whoever holds it; otherwise ``held`` tells whether it was free

    Raises OSError when the file cannot be made. Elsewhere than in a folder there is nothing to lock.
    """

    def __init__(self, storage: Storage, name: str, *, wait: bool) -> None:
        self.held = True
        self._descriptor: int | None = None
        if storage.local is None:
            return
        make_folder(storage.local)
        self._descriptor = os.open(storage.local / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # flock, not lockf: it also keeps out another user of the same process
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # whoever held it before may have removed the file: then this locks nothing that others see
            self.held = os.path.samestat(os.fstat(self._descriptor), os.stat(storage.local / name))
        except (BlockingIOError, FileNotFoundError):
            self.held = False
        if not self.held:
            self.release()

    def release(self) -> None:
        """Let others have it; the file stays, because removing it would race with the next one to lock it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def reason_of(error: BaseException) -> str:
    """Return what went wrong, in one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    text = re.sub(r"^[A-Z_]+: ", "", text)
    return re.sub(r"(: )?\[(os_error_code|source locations|tensorstore_spec|kvstore_key)=.*$", "", text).strip()
