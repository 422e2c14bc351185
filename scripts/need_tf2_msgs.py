"""Exit with 0 when this environment has no tf2_msgs but the one built from underlay/, with 1 when a real one exists."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# installed by underlay/tf2_msgs/CMakeLists.txt, and by nobody else
MARKER = "share/tf2_msgs/nmp_underlay"


def real_prefixes() -> list[Path]:
    """Prefixes that hold a tf2_msgs that we did not build."""
    prefixes = [Path(sys.prefix), *map(Path, filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)))]
    index = "share/ament_index/resource_index/packages/tf2_msgs"
    found = [p for p in prefixes if (p / index).exists() and not (p / MARKER).exists()]
    spec = importlib.util.find_spec("tf2_msgs")
    if spec is not None and spec.origin is not None:
        # <prefix>/lib/python3.x/site-packages/tf2_msgs/__init__.py
        prefix = Path(spec.origin).parents[4]
        if not (prefix / MARKER).exists():
            found.append(prefix)
    return found


def main() -> int:
    found = real_prefixes()
    if found:
        print(f"tf2_msgs: using {found[0]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
