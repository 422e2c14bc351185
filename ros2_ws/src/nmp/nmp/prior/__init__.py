"""The city prior: what earlier drives learned about every cell of a city. docs/prior.md tells more.

A cell is a square of the city's map frame. It stores a quantised latent vector, how much evidence lies behind it, when
it was last seen, and by how many drives. Cells live in tiles of 64 x 64; a tile exists once a car has been there.

What one drive adds to the cells is kept apart from what others add, and is never changed once the drive is over. The
state of the city is all drives, folded in the order of time on top of a base that older drives were compacted into.
"""

from __future__ import annotations

from nmp.prior.city import CityPrior
from nmp.prior.window import PriorSpec, Window

__all__ = ["CityPrior", "PriorSpec", "Window"]
