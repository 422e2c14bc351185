"""nmp: an online neural map for ROS 2.

The modules of this package map camera frames to semantic map layers with a persistent city-scale
prior. Nothing outside :mod:`nmp.nodes` imports ROS.
"""

__version__ = "0.1.0"
