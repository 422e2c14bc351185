"""A simulated city: roads, drives, traffic, the camera rig, and nuScenes data sets made of them."""
