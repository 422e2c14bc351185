"""nmp: an online neural map for ROS 2.

The modules of this package map camera frames to semantic map layers with a persistent city-scale
prior. Nothing outside :mod:`nmp.nodes` imports ROS.
"""

import os

__version__ = "0.1.0"

# OpenMP threads that spin for long while they wait make inference many times slower as soon as another process wants
# a core, and on a robot one always does; not spinning at all costs a quarter on a quiet machine. The runtime reads
# this when torch is loaded, so it is set before.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
