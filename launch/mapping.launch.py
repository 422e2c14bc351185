"""Map online: ``ros2 launch nmp mapping.launch.py``, with ``bag:=<folder>`` to play a recording into it."""

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

from nmp.nodes.loopback import loopback
from nmp.nodes.parameters import LAUNCH_TIMEOUTS


def share(*parts: str) -> PathJoinSubstitution:
    return PathJoinSubstitution([FindPackageShare("nmp"), *parts])


ARGUMENTS = [
    DeclareLaunchArgument("bag", default_value="", description="Bag folder to play; empty: cameras and pose are live."),
    DeclareLaunchArgument("rate", default_value="1.0", description="Speed at which the bag is played."),
    DeclareLaunchArgument(
        "loop",
        default_value="false",
        choices=["true", "false"],
        description="Start the bag again at its end.",
    ),
    DeclareLaunchArgument(
        "prior",
        default_value="",
        description="Folder of the stored city map, read and updated; empty: as params_file says.",
    ),
    DeclareLaunchArgument(
        "weights",
        default_value="",
        description="Network weights (.safetensors); empty: as params_file says, by default those in the package.",
    ),
    DeclareLaunchArgument(
        "location",
        default_value="",
        description="City of the prior, for instance boston-seaport; empty: taken from the topic 'location'.",
    ),
    DeclareLaunchArgument(
        "platform",
        default_value="cpu",
        choices=["cpu", "gpu"],
        description="What the network is computed on; chooses the parameter file.",
    ),
    DeclareLaunchArgument(
        "params_file",
        default_value="",
        description="Parameter file of mapping_node; empty: config/<platform>.yaml of the package.",
    ),
    DeclareLaunchArgument(
        "autostart",
        default_value="true",
        choices=["true", "false"],
        description="Configure and activate the node; false: wait for ros2 lifecycle set.",
    ),
    DeclareLaunchArgument(
        "use_sim_time",
        default_value="auto",
        choices=["auto", "true", "false"],
        description="Follow /clock; auto: when a bag is given.",
    ),
    DeclareLaunchArgument(
        "rviz",
        default_value="false",
        choices=["true", "false"],
        description="Open RViz with the layers and the cameras.",
    ),
    DeclareLaunchArgument(
        "local",
        default_value="true",
        choices=["true", "false"],
        description="Keep DDS on this machine, unless the environment says otherwise; false: others are reached.",
    ),
]


def start_nodes(context: LaunchContext) -> list[SetEnvironmentVariable | Node]:
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    bag = value("bag")
    use_sim_time = value("use_sim_time") == "true" or (value("use_sim_time") == "auto" and bag != "")

    # only what was given: an empty argument must not wipe the value in params_file
    given = {"prior_dir": value("prior"), "weights": value("weights"), "location": value("location")}
    overrides: dict[str, str | bool] = {name: text for name, text in given.items() if text}
    if value("autostart") == "false":
        overrides["autostart"] = False
    params_file = value("params_file") or share("config", f"{value('platform')}.yaml")
    nodes = [
        Node(
            package="nmp",
            executable="mapping_supervisor",  # a mapping node that is started anew when it was killed
            name="mapping_node",
            output="screen",
            **LAUNCH_TIMEOUTS,
            parameters=[params_file, {"use_sim_time": use_sim_time, **overrides}],
            # a map that nobody updates any more must not look alive
            on_exit=[Shutdown(reason="mapping_node ended")],
        )
    ]
    if bag:
        # the player keeps the wall clock: it is the source of /clock
        nodes.append(
            Node(
                package="nmp",
                executable="player_node",
                name="player_node",
                output="screen",
                **LAUNCH_TIMEOUTS,
                parameters=[{"bag": bag, "rate": float(value("rate")), "loop": value("loop") == "true"}],
            )
        )
    if value("rviz") == "true":
        nodes.append(
            Node(
                package="rviz2",
                executable="rviz2",
                name="rviz2",
                **LAUNCH_TIMEOUTS,
                arguments=["-d", share("rviz", "nmp.rviz")],
                parameters=[{"use_sim_time": use_sim_time}],
            )
        )
    local = loopback(context.environment) if value("local") == "true" else {}
    return [*(SetEnvironmentVariable(name, text) for name, text in local.items()), *nodes]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_nodes)])
