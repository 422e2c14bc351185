"""Drives to look at without a ROS desktop: a page for a browser, and Foxglove (``nmp view``)."""
