"""Look at a mapping node that runs elsewhere: ``ros2 launch nmp visualization.launch.py``."""

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

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
]


def start_nodes(context: LaunchContext) -> list[Node]:
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    return [
        Node(
            package="rviz2",
            executable="rviz2",
            name="rviz2",
            **LAUNCH_TIMEOUTS,
            arguments=["-d", value("config")],
            parameters=[{"use_sim_time": value("use_sim_time") == "true"}],
        )
    ]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_nodes)])
