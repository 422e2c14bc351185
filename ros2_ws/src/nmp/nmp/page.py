"""Pages for a browser: one file each, with everything in it that is not a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PLACE = "__CONTENT__"


def page_with(package: str, content: Any) -> str:
    """Return the ``page.html`` of a package with JSON values put into it."""
    page = resources.files(package).joinpath("page.html").read_text(encoding="utf-8")
    # within a script element some tags and comments could change where it ends; JSON knows another way to write them
    return page.replace(_PLACE, json.dumps(content, allow_nan=False).replace("<", "\\u003c"))


def hex_colour(rgb: Sequence[int] | NDArray[np.uint8]) -> str:
    """Return a colour as pages write it."""
    return "#" + "".join(f"{int(v):02x}" for v in rgb)
