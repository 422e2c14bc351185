"""A small recorded drive with layers, and a browser to look at it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmp.frame import LocalMap
from nmp.geometry import BevGrid, transform_from
from nmp.layers import LayerWriter
from nmp.view.server import PageServer
from tests.bag_fixtures import LOCATION, OFFSETS_MS, START_NS, ego, make_bag

GRID = BevGrid(30.0, 15.0, 0.3)
FRAMES = 6
PERIOD_S = 0.5
FRONT_S = OFFSETS_MS["cam_front"] * 1e-3


def layers_at(index: int) -> LocalMap:
    """A divider to the left of the car, a crossing before it, a boundary to its right; nothing is known behind it."""
    seconds = index * PERIOD_S + FRONT_S
    probabilities = np.zeros((3, *GRID.shape), np.float32)
    probabilities[0, 34:36] = 0.9
    probabilities[1, 16:42, 76:90] = 0.9  # an outline, as the network draws it
    probabilities[1, 18:40, 78:88] = 0.0
    probabilities[2, 8:10] = 0.9
    evidence = np.ones(GRID.shape, np.float32)
    evidence[:, :10] = 0.0
    translation, rotation = (np.array(part) for part in ego(seconds))
    stamp = START_NS + round(seconds * 1e6) * 1000
    return LocalMap(stamp, LOCATION, transform_from(translation, rotation), GRID, probabilities, evidence)


def make_drive(folder: Path, frames: int = FRAMES) -> tuple[Path, Path]:
    """Write a bag and the layers of each of its keyframes."""
    bag, layers = make_bag(folder, frames, PERIOD_S), folder / "seen"
    writer = LayerWriter(layers)
    for index in range(frames):
        writer.write(layers_at(index))
    return bag, layers


@contextmanager
def served(server: PageServer) -> Iterator[str]:
    """Serve in the background; gives the address."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def chromium() -> str:
    """The browser of this machine; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    return found or pytest.skip("no Chromium on PATH: apt install chromium")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    path = chromium()
    # a browser that runs as root has no sandbox
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=arguments)
        try:
            yield running
        finally:
            running.close()
