"""The parameters of the nodes as data: declared to ROS by :mod:`nmp.nodes.settings`, listed in docs/node.md.

Nothing here imports ROS.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nmp.defaults import RESIDENT_MB, STALE_DAYS
from nmp.frame import CAMERAS
from nmp.gate import GateLimits

SILENT_AFTER = 2.0
"""a topic without messages for so long is reported, s of wall time"""
REPORT_PERIOD = 1.0
"""time between two messages on /diagnostics, s of wall time"""
LOAD_TIMEOUT, COMPILE_TIMEOUT = 60.0, 600.0
"""longest wait until the network is loaded and the prior open, without and with ``compile``, s"""
STOP_TIMEOUT = 30.0
"""longest wait for the network and the disk when the node is deactivated or ends, s"""
LAUNCH_TIMEOUTS = dict.fromkeys(("sigterm_timeout", "sigkill_timeout"), str(STOP_TIMEOUT + 5.0))
"""of every node in a launch file: launch would kill one that still saves after 10 s"""

Value = bool | int | float | str | tuple[str, ...]


class Change(Enum):
    """When a parameter may be changed."""

    NEVER = "at the start only"
    UNCONFIGURED = "while unconfigured"
    ALWAYS = "at any time"


@dataclass(frozen=True)
class Parameter:
    """One parameter; its type is that of the default."""

    name: str
    default: Value
    description: str
    change: Change = Change.UNCONFIGURED
    low: float = 0
    """of a number, inclusive"""
    high: float = 0
    choices: tuple[str, ...] = ()
    """of a text; empty: any"""

    @property
    def type(self) -> str:
        """The type as ROS names it."""
        kinds = {bool: "bool", int: "integer", float: "double", str: "string", tuple: "string array"}
        return kinds[type(self.default)]

    def fault(self, value: Value) -> str:
        """Return why a value of the right type and range cannot be used; empty when it can."""
        if self.choices and value not in self.choices:
            return f"parameter '{self.name}' is '{value}': choose {' or '.join(self.choices)}"
        if isinstance(value, tuple):
            names = [name.strip("/ ") for name in value]
            if len(value) != len(CAMERAS) or len(set(names)) != len(names) or not all(names):
                return f"parameter '{self.name}' has {len(value)} names: give {len(CAMERAS)} different ones"
        return ""


GATE = "gate_"
"""prefix of the parameters that are the fields of :class:`nmp.gate.GateLimits`"""


def _gate(name: str, description: str, low: float, high: float) -> Parameter:
    return Parameter(GATE + name, getattr(GateLimits(), name), description, low=low, high=high)


_GATES = (
    _gate("position_m", "Standard deviation of the position, m, up to which frames are stored.", 0.01, 100.0),
    _gate("yaw_rad", "Standard deviation of the heading, rad, up to which frames are stored.", 0.001, 3.0),
    _gate("blind_position_m", "Standard deviation of the position, m, from which the prior is not read.", 0.02, 1000.0),
    _gate("blind_yaw_rad", "Standard deviation of the heading, rad, from which the prior is not read.", 0.002, 6.0),
    _gate("speed", "Fastest that the car drives, m/s; faster is a jump of the pose.", 1.0, 200.0),
    _gate("turn_rate", "Fastest that the car turns, rad/s.", 0.1, 10.0),
    _gate("acceleration", "Hardest that the car brakes or leaves a bend, m/s^2.", 0.5, 100.0),
    _gate("turn_acceleration", "Fastest change of the turn rate, rad/s^2.", 0.1, 100.0),
    _gate("slack_m", "What the position may jitter between two frames, m.", 0.0, 10.0),
    _gate("slack_rad", "What the heading may jitter between two frames, rad.", 0.0, 1.0),
    _gate("deviations", "Standard deviations by which a motion may be off, beyond the above.", 0.0, 100.0),
    _gate("memory_s", "Seconds without a frame after which the last motion says nothing about the next.", 0.1, 60.0),
    _gate("settle_frames", "Consistent frames after a jump before frames are stored again.", 0, 1000),
    _gate("agreed_m", "Standard deviation of the pose search, m, at which the stored map ends a jump.", 0.0, 10.0),
    _gate("agreed_rad", "Standard deviation of the pose search, rad, at which the stored map ends a jump.", 0.0, 1.0),
)


def _at_start(name: str, default: Value, description: str, low: float = 0, high: float = 0) -> Parameter:
    return Parameter(name, default, description, Change.NEVER, low=low, high=high)


PLAYER = (
    _at_start("bag", "", "Folder of the bag (or a .mcap or .db3 file) to play."),
    _at_start("rate", 1.0, "Speed: 2.0 plays twice as fast.", 0.1, 10.0),
    _at_start("loop", False, "Start again at the end."),
    _at_start("start_paused", False, "Begin paused; go on through ~/pause."),
    _at_start("clock", True, "Publish /clock, for nodes with use_sim_time."),
    _at_start(
        "wait_for_subscribers",
        20.0,
        "Longest wait, s, until every input of the mapping node has a subscriber; 0: play at once.",
        0.0,
        3600.0,
    ),
    _at_start("delay", 0.5, "Seconds between being ready and the first message.", 0.0, 3600.0),
)
"""of ``player_node``"""

RECORDER = (
    _at_start("out_dir", "", "Folder to write the layers to, one file per moment."),
    _at_start("mapping_node", "mapping_node", "Name of the node whose layers are recorded."),
    _at_start("location", "", "City; empty: taken from the mapping node."),
)
"""of ``recorder_node``"""

PARAMETERS = (
    Parameter(
        "autostart", True, "Configure and activate at the start; false: wait for `ros2 lifecycle set`.", Change.NEVER
    ),
    Parameter("weights", "", "Network weights: a .safetensors file, cpu_default or gpu_default; empty: cpu_default."),
    Parameter("prior_dir", "", "Folder or URL of the stored city map; empty: ~/.local/share/nmp/prior."),
    Parameter("location", "", "City of the prior, e.g. boston-seaport; empty: wait for the topic 'location'."),
    Parameter("use_prior", True, "False: the network alone, nothing is remembered."),
    Parameter(
        "flush_interval", 2.0, "Longest time, s, that a change of the prior stays in memory.", low=0.1, high=3600.0
    ),
    Parameter("device", "auto", "What computes the network: cpu, cuda, cuda:1 ... or auto, a GPU where there is one."),
    Parameter(
        "precision",
        "auto",
        "Of the network: fp32, bf16, or auto, bf16 where the device computes in it.",
        choices=("auto", "fp32", "bf16"),
    ),
    Parameter("compile", False, "Compile the network for the GPU: a minute at the start, then faster frames."),
    Parameter("cameras", CAMERAS, "Topic prefixes of the six cameras, clockwise from the front."),
    Parameter(
        "extrinsics_file", "", "YAML file of the cameras' mounting; empty: it is taken from the topic '/tf_static'."
    ),
    Parameter(
        "image_transport", "compressed", "Images to subscribe to: compressed or raw.", choices=("compressed", "raw")
    ),
    Parameter(
        "pose_type",
        "odometry",
        "Message of the topic 'odom': odometry or pose_with_covariance.",
        choices=("odometry", "pose_with_covariance"),
    ),
    Parameter("prior_memory", RESIDENT_MB, "Memory for the tiles of a city, MiB.", low=16, high=65536),
    Parameter(
        "stale_days",
        STALE_DAYS,
        "Days without a visit after which what is stored counts for less when it is read; 0: it never does.",
        low=0.0,
        high=36500.0,
    ),
    Parameter("vectors", True, "Publish lines and polygons on ~/vectors while somebody listens; false: never."),
    Parameter(
        "extras_rate",
        0.0,
        "Messages a second on ~/vectors and ~/bev at most, so that layers come first; 0: with every frame.",
        low=0.0,
        high=100.0,
    ),
    Parameter(
        "city_period",
        5.0,
        "Seconds between two messages on ~/city while somebody listens; 0: never, and nothing is added up for it.",
        low=0.0,
        high=3600.0,
    ),
    Parameter("stats_file", "", "JSON file to write counts and latency to at the end; empty: none."),
    Parameter(
        "min_cameras",
        6,
        "Cameras that a frame needs, the front one among them; fewer than 6: the lost ones are masked in the network.",
        Change.ALWAYS,
        low=1,
        high=6,
    ),
    Parameter(
        "max_camera_spread",
        0.1,
        "Longest time, s, between the first and last image of a frame.",
        Change.ALWAYS,
        low=1e-3,
        high=10.0,
    ),
    Parameter(
        "max_pose_age",
        0.2,
        "Longest time, s, between an image and the poses around it.",
        Change.ALWAYS,
        low=1e-3,
        high=10.0,
    ),
    Parameter(
        "max_rate",
        0.0,
        "Frames a second, in stamps, that are mapped at most; images in between are left alone; 0: all are mapped.",
        Change.ALWAYS,
        low=0.0,
        high=100.0,
    ),
    Parameter(
        "keyframe_rate",
        2.0,
        "Keyframes a second, in stamps: they wait for the network, other frames are mapped only while newest; 0: none.",
        Change.ALWAYS,
        low=0.0,
        high=100.0,
    ),
    Parameter(
        "queue_size",
        2,
        "Keyframes that may wait for the network; when full, the oldest is dropped.",
        Change.ALWAYS,
        low=1,
        high=1000,
    ),
    Parameter(
        "idle_without_subscribers",
        False,
        "Map nothing while nobody listens to layers, vectors or picture: nothing is remembered then either.",
        Change.ALWAYS,
    ),
    Parameter(
        "service_timeout",
        10.0,
        "Longest time, s, until a service answers; what it asked for goes on in the background.",
        Change.ALWAYS,
        low=0.1,
        high=3600.0,
    ),
    *_GATES,
)
"""of ``mapping_node``"""

PLATFORMS: dict[str, dict[str, Value]] = {
    "cpu": {"device": "cpu", "max_rate": 4.0, "extras_rate": 2.0},
    "gpu": {"device": "cuda", "weights": "gpu_default"},
}
"""what differs from the defaults on a computer without a GPU, and with one: config/<platform>.yaml"""
