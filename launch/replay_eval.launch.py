"""Play a bag through the node and score what comes out.

``ros2 launch nmp replay_eval.launch.py bag:=scene-0061 maps:=$HOME/nuscenes out:=scored`` prints the table of
``nmp eval``. The exit code is that of ``nmp eval``, and 1 when a node before it failed.
"""

import sys
from collections.abc import Callable

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    Shutdown,
    TimerAction,
)
from launch.event_handlers import OnProcessExit
from launch.events import matches_action
from launch.events.process import ProcessExited, ShutdownProcess
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

from nmp.nodes.loopback import loopback
from nmp.nodes.parameters import LAUNCH_TIMEOUTS

SETTLE_S = 5.0
"""from the last message of the bag until the nodes are stopped: what waits is mapped meanwhile"""

ARGUMENTS = [
    DeclareLaunchArgument("bag", description="Bag folder to play."),
    DeclareLaunchArgument("maps", description="nuScenes folder with maps/expansion, for the truth."),
    DeclareLaunchArgument("out", description="New folder: layers are written to it, and scores.json."),
    DeclareLaunchArgument(
        "version", default_value="", description="Tables of maps: draw the truth at their poses; empty: at the layers'."
    ),
    DeclareLaunchArgument(
        "prior", default_value="", description="Folder of the stored city map, updated; empty: every frame on its own."
    ),
    DeclareLaunchArgument(
        "weights", default_value="", description="Network weights (.safetensors); empty: those in the package."
    ),
    DeclareLaunchArgument(
        "location", default_value="", description="City of the prior; empty: taken from the topic 'location'."
    ),
    DeclareLaunchArgument("rate", default_value="1.0", description="Speed at which the bag is played."),
    DeclareLaunchArgument(
        "platform",
        default_value="cpu",
        choices=["cpu", "gpu"],
        description="What the network is computed on; chooses the parameter file.",
    ),
    DeclareLaunchArgument(
        "local",
        default_value="true",
        choices=["true", "false"],
        description="Keep DDS on this machine, unless the environment says otherwise; false: others are reached.",
    ),
]


def check(event: ProcessExited) -> None:
    """Make ``ros2 launch`` fail when a process did."""
    if event.returncode:
        raise RuntimeError(f"{event.process_name} ended with code {event.returncode}")


def start(context: LaunchContext) -> list[SetEnvironmentVariable | RegisterEventHandler | Node]:
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    def node(name: str, *parameters: object) -> Node:
        how = {"output": "screen", "parameters": list(parameters), **LAUNCH_TIMEOUTS}
        return Node(package="nmp", executable=name, name=name, **how)

    given = {"prior_dir": value("prior"), "weights": value("weights"), "location": value("location")}
    mapping = {name: text for name, text in given.items() if text}
    config = PathJoinSubstitution([FindPackageShare("nmp"), "config", f"{value('platform')}.yaml"])
    layers = f"{value('out')}/layers"
    recorder = node("recorder_node", {"out_dir": layers, "location": value("location")})
    mapper = node("mapping_node", config, {"use_sim_time": True, "use_prior": value("prior") != "", **mapping})
    player = node("player_node", {"bag": value("bag"), "rate": float(value("rate")), "wait_for_subscribers": 120.0})
    scores = ["--json", f"{value('out')}/scores.json"]
    version = ["--version", value("version")] if value("version") else []
    evaluator = ExecuteProcess(
        cmd=[sys.executable, "-m", "nmp.cli", "eval", layers, "--maps", value("maps"), *version, *scores],
        name="nmp_eval",
        output="screen",
    )

    def stop_nodes(event: ProcessExited, context: LaunchContext) -> list[TimerAction]:
        check(event)
        stop = [EmitEvent(event=ShutdownProcess(process_matcher=matches_action(n))) for n in (mapper, recorder)]
        return [TimerAction(period=SETTLE_S, actions=stop)]

    saving = {"mapper", "recorder"}

    def ended(name: str) -> Callable[[ProcessExited, LaunchContext], list[ExecuteProcess]]:
        """Score once both have ended: until then the mapper saves its drive, and nothing may hurry it."""

        def evaluate(event: ProcessExited, context: LaunchContext) -> list[ExecuteProcess]:
            check(event)
            saving.discard(name)
            return [] if saving else [evaluator]

        return evaluate

    def end(event: ProcessExited, context: LaunchContext) -> list[Shutdown]:
        if event.returncode:
            # Launch itself only knows 0 and 1. Nothing else runs any more that it would have to end.
            raise SystemExit(event.returncode)
        return [Shutdown(reason="the bag is scored")]

    handlers = [(player, stop_nodes), (mapper, ended("mapper")), (recorder, ended("recorder")), (evaluator, end)]
    local = loopback(context.environment) if value("local") == "true" else {}
    return [
        *(SetEnvironmentVariable(name, text) for name, text in local.items()),
        *(RegisterEventHandler(OnProcessExit(target_action=action, on_exit=do)) for action, do in handlers),
        recorder,
        mapper,
        player,
    ]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start)])
