"""The BEV network: images to ego-frame features, features to layers, and what is written to the prior."""

from nmp.model.config import NetworkConfig
from nmp.model.network import BEVNetwork
from nmp.model.weights import load_network, save_network

__all__ = ["BEVNetwork", "NetworkConfig", "load_network", "save_network"]
