"""PNG pictures that are written strip by strip: however tall they are, only one strip is in memory."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IDAT_BYTES = 1 << 16
_ROWS = 64
"""that are copied at a time"""


class PngStream:
    """Writes an RGB picture of a known size from top to bottom; a context that leaves nothing behind when it fails.

    The file has the form of ISO/IEC 15948 (PNG), third edition, section 5: 8 bits per sample, truecolour, no filter,
    not interlaced. It appears under its name when it is complete.
    """

    def __init__(self, path: Path, width: int, height: int) -> None:
        """Raise :class:`NmpError` when the file cannot be made.

        :param width: pixels
        :param height: pixels
        """
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._width, self._left = width, height
        self._deflate = zlib.compressobj(6)
        self._pending = bytearray()
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self._partial, "wb")
        except OSError as error:
            raise self._failure(error) from error
        self._put(_SIGNATURE)
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))

    def write(self, strip: NDArray[np.uint8]) -> None:
        """Append rows [rows, width, 3]. Raises :class:`NmpError` when the disk is full or gone."""
        rows = len(strip)
        if strip.shape[1:] != (self._width, 3) or rows > self._left:
            raise ValueError(f"strip {strip.shape} for a picture {self._width} wide with {self._left} rows to come")
        self._left -= rows
        for start in range(0, rows, _ROWS):
            piece = strip[start : start + _ROWS]
            lines = np.zeros((len(piece), 1 + 3 * self._width), np.uint8)  # each row begins with its filter: 0, none
            lines[:, 1:] = piece.reshape(len(piece), -1)
            self._pending += self._deflate.compress(lines.tobytes())
        if len(self._pending) >= _IDAT_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._chunk(b"IDAT", bytes(self._pending))
            self._pending.clear()

    def _chunk(self, kind: bytes, content: bytes) -> None:
        self._put(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))

    def _put(self, content: bytes) -> None:
        try:
            self._file.write(content)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> NmpError:
        reason = error.strerror or error
        return NmpError(f"cannot write the picture {self._path} ({reason}): choose another place, or free disk space")

    def __enter__(self) -> PngStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._left:
                    raise ValueError(f"{self._left} rows of {self._path} were never written")
                self._pending += self._deflate.flush()
                self._flush()
                self._chunk(b"IEND", b"")
            self._file.close()
            if kind is None:
                os.replace(self._partial, self._path)
        except OSError as failed:
            raise self._failure(failed) from failed
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)
