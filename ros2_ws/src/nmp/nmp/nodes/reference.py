"""Writes what follows from the declarations: ``python -m nmp.nodes.reference``.

These are docs/node.md, the parameter files of the platforms, and the policy for SROS 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from nmp import assembly
from nmp.messages import CHANNELS
from nmp.nodes import interface
from nmp.nodes.parameters import (
    COMPILE_TIMEOUT,
    LOAD_TIMEOUT,
    PARAMETERS,
    PLATFORMS,
    PLAYER,
    RECORDER,
    SILENT_AFTER,
    STOP_TIMEOUT,
    Parameter,
    Value,
)
from nmp.nodes.policy import policy

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parents[3]
"""of a checkout: the page lies outside the package"""

_INTRODUCTION = """\
# mapping_node

<!-- made by python -m nmp.nodes.reference: change the declarations in nmp/nodes, not this page -->

A lifecycle node. `configure` loads the network and opens the prior, also the city where the parameter `location` names
it (else the first frame waits 0.4 s for that); `activate` listens and maps; `deactivate` saves the prior, commits the
drive and frees the memory of the GPU; `cleanup` lets go of the rest. With `autostart` (the default) it does the first
two by itself. A transition that cannot be made says why on `/diagnostics` and in the log, and leaves the state as it
was; one that breaks halfway releases everything, and the node is unconfigured. After `shutdown` the process ends.

```bash
ros2 run nmp mapping_node --ros-args --params-file $(ros2 pkg prefix nmp)/share/nmp/config/cpu.yaml -p autostart:=false
ros2 lifecycle set /mapping_node configure
ros2 lifecycle set /mapping_node activate
```

`ros2 run nmp mapping_supervisor`, which `mapping.launch.py` uses, takes the same arguments and survives what the node
does not (a crash of a driver, the out-of-memory killer): it keeps a spare process with torch and ROS loaded, known to
DDS, without the network. When the node is killed the spare maps on after about two seconds; what the node had not
written yet (`flush_interval`) is lost. A node that was killed within 5 s of its start has no spare yet: it is started
again at once, then after 1, 2, 4 ... 30 s. One that ends by itself is not started again. Both processes together take
0.2 GB of memory more than the node alone. SIGINT and SIGTERM end all, with the exit code of the node; one more of them,
2 s later, ends it without saving.

While the prior of a city cannot be opened or read (a full disk, a store out of reach), the layers are those of the
cameras alone, `/diagnostics` says why, and it is tried again every 3 s.

Names are relative, so that namespaces and remapping work as usual; `~` is the name of the node.
"""

_CAMERAS = """\
Frames are made of the images nearest to each one of the front camera. With `min_cameras` below 6, a camera that is
lost, damaged or without calibration is masked in the network, and the map goes on; after one frame nobody waits for it,
and with its first image it is back. The shipped network was not trained with lost cameras: what they saw is filled in
from the prior only.

`extrinsics_file` has, for each name in `cameras`, where it is mounted: its optical frame (x right, y down, z forward)
in `base_link`:

```yaml
cam_front: {translation: [1.7, 0.0, 1.5], rotation: [-0.5, 0.5, -0.5, 0.5]}  # m; quaternion x, y, z, w
```
"""

_FAST_CAMERAS = """\
Cameras may be faster than the network. Of their frames, keyframes are always mapped, in order: the first, and each that
is 1 / `keyframe_rate` after the last (a tenth less, as cameras are not exact), by the stamps of the front camera. Any
other frame is mapped if it is still the newest when the network has time; else it is left alone and counted as skipped
("overtaken by a newer frame"). `max_rate` leaves images alone before a frame is made of them ("skipped: max_rate"): of
those around each 1 / `max_rate` the nearest is mapped, so that 10 Hz cameras come to 4 Hz by turns of 0.2 and 0.3 s.
Frames that are lost against the will of whoever set these are counted as dropped, by cause: "queue full" when more than
`queue_size` keyframes wait. An image is taken apart only when a frame is made of it.

Layers come first. While a frame waits, lines and picture are left to it, for a second at most, and `extras_rate` says
how often they are made (on a CPU twice a second, by config/cpu.yaml); `~/city` adds up every frame.

When stamps go back (a bag that begins again), what is still on its way of the time before is left out; a frame that was
not complete by then is dropped as "clock jump".

The latency on `/diagnostics` counts from the moment at which a frame's last message is taken from DDS to its published
layers. Messages are taken every 10 ms, in the order in which they came. What that message took from its publication
until then, on the way and waiting for the node, is the stage `transport`, as far as the clocks of two computers agree.
Each image waits in a queue of its camera: 30 of them, or 10 raw ones. With `--log-level mapping_node:=debug` a keyframe
that was lost for want of a camera tells which images had come.
"""

_OTHERS = """\
## The other nodes

`player_node` plays a bag, as `ros2 bag play` does, once somebody listens. `recorder_node` writes the layers to a
folder, for `nmp eval`. `viewer_node` has no parameters of its own: `nmp view --live` starts it ([view.md](view.md)).
"""

_GATES = """\
The parameters `gate_...` say which poses are too doubtful for the prior; whatever they are, layers go out. How drives
add up where they contradict each other (`nmp/prior/cells.py`) is no parameter: a city is folded from its drives by
whoever opens it, and must be the same on every car.
"""


def page() -> str:
    """Return the text of docs/node.md."""
    topics_header = ("topic", "type", "", "what")
    parts = [
        _INTRODUCTION,
        "## Parameters\n",
        "One file per platform shows them all: " + ", ".join(f"`config/{name}.yaml`" for name in PLATFORMS) + ".\n",
        _parameters(PARAMETERS),
        _CAMERAS,
        _FAST_CAMERAS,
        _GATES,
        "## Topics it listens to\n",
        "Images and poses are subscribed to as best effort. `image_transport` and `pose_type` choose other types.\n",
        _table(topics_header, (_row(t) for t in interface.inputs())),
        "## Topics it publishes\n",
        _table(topics_header, (_row(t) for t in interface.OUTPUTS)),
        "## Services\n",
        "All answer within `service_timeout`, with a code and a sentence; outside the state active they are refused.\n",
        _table(
            ("service", "type", "what"), ([f"`{s.name}`", f"`{s.type}`", s.description] for s in interface.SERVICES)
        ),
        *(_definition(s.type) for s in interface.SERVICES),
        "## Limits\n",
        _table(("what", "limit"), _limits()),
        _OTHERS,
        "### player_node\n",
        _parameters(PLAYER),
        "### recorder_node\n",
        _parameters(RECORDER),
    ]
    return "\n".join(parts)


def params_file(platform: str) -> str:
    """Return the text of config/<platform>.yaml: every parameter with its description."""
    lines = [
        f"# Parameters of mapping_node for a {platform.upper()}; docs/node.md has their ranges.",
        "# Made by python -m nmp.nodes.reference: copy it to change it.",
        "/**/mapping_node:",
        "  ros__parameters:",
    ]
    for p in PARAMETERS:
        value = PLATFORMS[platform].get(p.name, p.default)
        lines += [f"    # {p.description}", f"    {p.name}: {_yaml(value)}"]
    return "\n".join(lines) + "\n"


def files() -> dict[Path, str]:
    """Return what is written, by path."""
    config = {PACKAGE / "config" / f"{name}.yaml": params_file(name) for name in PLATFORMS}
    return {ROOT / "docs" / "node.md": page(), PACKAGE / "config" / "nmp.policy.xml": policy(), **config}


def _limits() -> list[list[str]]:
    defaults = assembly.Limits()
    return [
        ["images and poses in one frame", "parameters `max_camera_spread`, `max_pose_age`"],
        ["wait for a late message, in stamps", f"{defaults.patience:g} s after the other cameras have gone on"],
        ["stamps that go back: a new time line", f"by more than {assembly.CLOCK_JUMP_NS / assembly.NS:g} s"],
        [
            "jump of the pose: the frame across it is dropped",
            f"over {assembly.JUMP_M:g} m at {assembly.MAX_SPEED:g} m/s, or {assembly.JUMP_RAD:g} rad at "
            f"{assembly.MAX_TURN:g} rad/s",
        ],
        ["poses that are kept", str(assembly.POSES_KEPT)],
        ["silence of a topic until it is reported", f"{SILENT_AFTER:g} s; with use_sim_time also of /clock"],
        ["configuring: wait for weights and prior", f"{LOAD_TIMEOUT:g} s, with `compile` {COMPILE_TIMEOUT:g} s"],
        ["end, deactivation: wait for network and disk", f"{STOP_TIMEOUT:g} s"],
        ["images", f"rectified; JPEG, PNG, {', '.join(CHANNELS)}; of the size that camera_info says"],
        ["files that services name", "inside the folder of the prior, links followed"],
    ]


def _definition(kind: str) -> str:
    package, folder, name = kind.split("/")
    text = (PACKAGE.parents[1] / package / folder / f"{name}.srv").read_text(encoding="utf-8")
    return f"`{kind}`:\n\n```\n{text.rstrip()}\n```\n"


def _parameters(parameters: Sequence[Parameter]) -> str:
    rows = ([f"`{p.name}`", p.type, _default(p), _range(p), p.change.value, p.description] for p in parameters)
    return _table(("parameter", "type", "default", "range", "may change", "what"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(topic: interface.Topic) -> list[str]:
    return [f"`{topic.name}`", f"`{topic.type}`", "latched" if topic.latched else "", topic.description]


def _default(parameter: Parameter) -> str:
    return f"`{_yaml(parameter.default)}`"


def _range(parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(parameter.choices)
    return f"{parameter.low:g} to {parameter.high:g}" if parameter.high else ""


def _yaml(value: Value) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def main() -> int:
    """Write every file; return the exit code."""
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
