"""The bounded set of tiles that are in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from nmp.prior.drive import Tile
from nmp.prior.tiles import Key


class TileCache:
    """Tiles in the order of their last use; the least recently used saved ones go first.

    A tile with unsaved changes is never dropped, so the set can outgrow its limit while nothing can be saved;
    whoever adds changes has to keep ``dirty_bytes`` in check. Not safe to share between threads without a lock.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._tiles: OrderedDict[Key, Tile] = OrderedDict()
        self._sizes: dict[Key, int] = {}
        self._dirty: dict[Key, None] = {}  # a dict, because it keeps the order of the first change
        self._limit_bytes = limit_bytes
        self.resident_bytes = 0

    def __len__(self) -> int:
        return len(self._tiles)

    def __contains__(self, key: Key) -> bool:
        return key in self._tiles

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tiles)

    @property
    def dirty(self) -> list[Key]:
        """Tiles with unsaved changes, the longest unsaved first."""
        return list(self._dirty)

    @property
    def dirty_bytes(self) -> int:
        return sum(self._sizes[key] for key in self._dirty)

    def __getitem__(self, key: Key) -> Tile:
        """Return a tile that is in memory, without counting it as used."""
        return self._tiles[key]

    def get(self, key: Key) -> Tile | None:
        """Return a tile and count it as used, or None when it is not in memory."""
        tile = self._tiles.get(key)
        if tile is not None:
            self._tiles.move_to_end(key)
        return tile

    def put(self, key: Key, tile: Tile) -> None:
        self._tiles[key] = tile
        self._measure(key)

    def mark_dirty(self, key: Key) -> None:
        self._dirty.setdefault(key)
        self._measure(key)  # its first change makes a tile larger

    def mark_saved(self, key: Key, edits: int) -> None:
        """Note that the tile is on disk as it was after ``edits`` changes; later ones keep it dirty."""
        if self._tiles[key].edits == edits:
            self._dirty.pop(key, None)

    def shrink(self) -> None:
        """Drop saved tiles until the limit holds."""
        if self.resident_bytes <= self._limit_bytes:
            return
        for key in [key for key in self._tiles if key not in self._dirty]:
            self.resident_bytes -= self._sizes.pop(key)
            del self._tiles[key]
            if self.resident_bytes <= self._limit_bytes:
                return

    def _measure(self, key: Key) -> None:
        size = self._tiles[key].nbytes
        self.resident_bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
