"""The city prior: what earlier drives learned about every cell of a city, on disk.

A cell is a square of the city's map frame. It stores a quantised latent vector, how much evidence lies
behind it, and when it was last seen. Cells live in tiles of 64 x 64; a tile exists once a car has been there.

On disk, one folder per city below the prior folder::

    <prior>/<location>/
      prior.json                 format version, location, spec of the latents, date; written once
      writer.lock                held (flock) by the one process that writes; the kernel frees it on a crash
      cells/zarr.json            a zarr v3 array: uint8 [planes, rows, columns]
      cells/c/0/<row>/<column>   one file per tile, [planes, 64, 64], zstd, then a CRC-32C of it all
      cells/c/0/<row>/<column>.corrupt   a tile that failed its checksum, kept for inspection

Planes of format 1: the latent (one int8 plane per channel, as two's complement), evidence (uint16, low byte
first, two planes), last seen (uint32 seconds, low byte first, four planes). All the fields of a tile share one
file, which is written beside the old one, synced and renamed over it: a reader finds the old tile or the new
one, never a mixture. A new field adds planes and raises the format version.

An array index cannot be negative but a map coordinate can: cell (0, 0) is stored at index 2^26 of both axes,
which puts tile (0, 0) into file ``c/0/1048576/1048576``. A file that is not there reads as zeros, "unknown".

In memory, a bounded set of tiles holds the very values that are on disk, so what a read returns never depends
on which tiles were evicted or saved in between. A background thread saves changed tiles every flush interval;
a crash loses at most what was written since. Tiles are saved one by one: after a crash, neighbouring tiles may
stem from different moments of that interval.
"""

from __future__ import annotations

from nmp.prior.city import CityPrior
from nmp.prior.window import PriorSpec, Window

__all__ = ["CityPrior", "PriorSpec", "Window"]
