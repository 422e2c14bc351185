"""Repair the CMake files of the ros-jazzy wheels in the environment that runs this script.

The wheels carry the include paths of the machine that built them, and CMake refuses an interface package whose
dependencies name folders that do not exist.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import numpy

BUILDER = "/opt/python/cp311-cp311"


def main() -> int:
    # longest first: the second path must not eat a part of the first
    replacements = {
        f"{BUILDER}/lib/python3.11/site-packages/numpy/_core/include": numpy.get_include(),
        f"{BUILDER}/include/python3.11": sysconfig.get_paths()["include"],
    }
    changed = 0
    for path in sorted(Path(sys.prefix, "share").glob("*/cmake/*.cmake")):
        text = path.read_text(encoding="utf-8")
        fixed = text
        for old, new in replacements.items():
            fixed = fixed.replace(old, new)
        if fixed != text:
            path.write_text(fixed, encoding="utf-8")
            changed += 1
    print(f"fixed the include paths of {changed} CMake files in {sys.prefix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
