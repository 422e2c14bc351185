"""Look at a mapping node: ``ros2 launch nmp visualization.launch.py``, with ``local:=false`` on another computer."""

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

from nmp.nodes.loopback import loopback
from nmp.nodes.parameters import LAUNCH_TIMEOUTS

ARGUMENTS = [
    DeclareLaunchArgument(
        "config",
        default_value=PathJoinSubstitution([FindPackageShare("nmp"), "rviz", "nmp.rviz"]),
        description="RViz configuration: cameras, layers, vectors, car.",
    ),
    DeclareLaunchArgument(
        "use_sim_time",
        default_value="false",
        choices=["true", "false"],
        description="Follow /clock, when a recording is played.",
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

    local = loopback(context.environment) if value("local") == "true" else {}
    return [
        *(SetEnvironmentVariable(name, text) for name, text in local.items()),
        Node(
            package="rviz2",
            executable="rviz2",
            name="rviz2",
            **LAUNCH_TIMEOUTS,
            arguments=["-d", value("config")],
            parameters=[{"use_sim_time": value("use_sim_time") == "true"}],
        ),
    ]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_nodes)])
