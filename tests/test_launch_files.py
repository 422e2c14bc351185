"""The launch files, their RViz view and parameter files agree with the nodes."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from nmp.frame import CAMERAS, CLASSES
from nmp.nodes import reference
from nmp.nodes.loopback import PROFILE
from nmp.nodes.parameters import PARAMETERS, PLATFORMS, STOP_TIMEOUT
from nmp.topics import BEV, FOOTPRINT, MAP_FRAME, VECTORS, absolute, city_topic, image_topic, layer_topic

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))
PACKAGE = ROOT / "ros2_ws" / "src" / "nmp"
PARAMS_FILE = PACKAGE / "nmp" / "config" / "cpu.yaml"
RVIZ_FILE = ROOT / "rviz" / "nmp.rviz"


class Recorded:
    """Stands for any launch class: keeps how it was called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs


class Context(dict[str, str]):
    """A launch context: the arguments, and an environment."""

    environment: Mapping[str, str] = {}


class Configuration(Recorded):
    def perform(self, context: dict[str, str]) -> str:
        return context[self.args[0]]


def load(name: str = "mapping") -> ModuleType:
    path = ROOT / "launch" / f"{name}.launch.py"
    spec = importlib.util.spec_from_file_location("launch_under_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launch_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launch files be loaded on top of stand-ins: the launch packages are no wheels."""

    def module(name: str, **names: Any) -> None:
        stub = ModuleType(name)
        stub.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, stub)

    def kind(name: str) -> type[Recorded]:
        return type(name, (Recorded,), {})

    module("launch", LaunchContext=Context, LaunchDescription=kind("LaunchDescription"))
    module(
        "launch.actions",
        DeclareLaunchArgument=kind("DeclareLaunchArgument"),
        EmitEvent=kind("EmitEvent"),
        ExecuteProcess=kind("ExecuteProcess"),
        OpaqueFunction=kind("OpaqueFunction"),
        RegisterEventHandler=kind("RegisterEventHandler"),
        SetEnvironmentVariable=kind("SetEnvironmentVariable"),
        Shutdown=kind("Shutdown"),
        TimerAction=kind("TimerAction"),
    )
    module("launch.event_handlers", OnProcessExit=kind("OnProcessExit"))
    module("launch.events", matches_action=lambda action: action)
    module("launch.events.process", ProcessExited=kind("ProcessExited"), ShutdownProcess=kind("ShutdownProcess"))
    module(
        "launch.substitutions",
        LaunchConfiguration=Configuration,
        PathJoinSubstitution=kind("PathJoinSubstitution"),
    )
    module("launch_ros")
    module("launch_ros.actions", Node=kind("Node"))
    module("launch_ros.substitutions", FindPackageShare=kind("FindPackageShare"))


@pytest.fixture
def stubbed(launch_packages: None) -> ModuleType:
    """Return mapping.launch.py, loaded."""
    return load()


def start(module: ModuleType, **given: str) -> dict[str, dict[str, Any]]:
    """Return the nodes that the launch file starts with these arguments: executable to keyword arguments."""
    context = {argument.args[0]: argument.kwargs["default_value"] for argument in module.ARGUMENTS}
    context["params_file"] = "params.yaml"
    assert set(given) <= set(context)
    actions = module.start_nodes(Context({**context, **given}))
    return {node.kwargs["executable"]: node.kwargs for node in actions if type(node).__name__ == "Node"}


def executables() -> dict[str, str]:
    """Return the console scripts of the package's setup.py: name to module:function."""
    for node in ast.walk(ast.parse((PACKAGE / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "entry_points":
            scripts = ast.literal_eval(node.value)["console_scripts"]
            return dict(script.split(" = ") for script in scripts)
    raise AssertionError("setup.py has no entry points")


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda p: p.name)
def test_arguments_are_described(launch_packages: None, path: Path) -> None:
    module = load(path.name.removesuffix(".launch.py"))
    source = path.read_text(encoding="utf-8")
    for argument in module.ARGUMENTS:
        assert len(argument.kwargs["description"]) > 15, argument.args
        # declared and used
        assert source.count(f'"{argument.args[0]}"') + source.count(f"'{argument.args[0]}'") > 1, argument.args
    description = module.generate_launch_description()
    assert description.args[0][:-1] == module.ARGUMENTS
    assert description.args[0][-1].kwargs["function"].__module__ == module.__name__


def test_mapping_starts_without_any_argument(stubbed: ModuleType) -> None:
    names = [argument.args[0] for argument in stubbed.ARGUMENTS]
    assert names == (
        ["bag", "rate", "loop", "prior", "weights", "location"]
        + ["platform", "params_file", "autostart", "use_sim_time", "rviz", "local"]
    )
    assert all("default_value" in argument.kwargs for argument in stubbed.ARGUMENTS)


def test_live_start_leaves_the_parameter_file_alone(stubbed: ModuleType) -> None:
    nodes = start(stubbed)
    assert set(nodes) == {"mapping_supervisor"}
    assert nodes["mapping_supervisor"]["parameters"] == ["params.yaml", {"use_sim_time": False}]
    assert nodes["mapping_supervisor"]["name"] == "mapping_node"


def test_bag_start(stubbed: ModuleType) -> None:
    nodes = start(stubbed, bag="/b", rate="0.5", loop="true", prior="/p", weights="/w", location="boston-seaport")
    assert set(nodes) == {"mapping_supervisor", "player_node"}
    assert nodes["player_node"]["parameters"] == [{"bag": "/b", "rate": 0.5, "loop": True}]
    assert nodes["mapping_supervisor"]["parameters"][1] == {
        "use_sim_time": True,
        "prior_dir": "/p",
        "weights": "/w",
        "location": "boston-seaport",
    }


@pytest.mark.parametrize(
    ("bag", "choice", "expected"),
    [("", "auto", False), ("/b", "auto", True), ("/b", "false", False), ("", "true", True)],
)
def test_use_sim_time(stubbed: ModuleType, bag: str, choice: str, expected: bool) -> None:
    nodes = start(stubbed, bag=bag, use_sim_time=choice, rviz="true")
    assert nodes["mapping_supervisor"]["parameters"][1]["use_sim_time"] is expected
    assert nodes["rviz2"]["parameters"] == [{"use_sim_time": expected}]


def test_executables_exist(stubbed: ModuleType) -> None:
    for kwargs in start(stubbed, bag="/b", rviz="true").values():
        if kwargs["package"] == "nmp":
            assert kwargs["executable"] in executables()
    for target in executables().values():
        module, function = target.split(":")
        source = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        defined = [n.name for n in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
        assert function in defined, target


def test_files_that_the_launch_file_needs_are_installed(stubbed: ModuleType) -> None:
    for platform in ("cpu", "gpu"):
        chosen = start(stubbed, platform=platform, params_file="")["mapping_supervisor"]["parameters"][0]
        assert chosen.args[0][1:] == ["config", f"{platform}.yaml"]
        assert (PACKAGE / "nmp" / "config" / f"{platform}.yaml").is_file()
    assert start(stubbed, autostart="false")["mapping_supervisor"]["parameters"][1]["autostart"] is False
    rviz = start(stubbed, rviz="true")["rviz2"]["arguments"]
    assert rviz[0] == "-d" and rviz[1].args[0][1:] == ["rviz", RVIZ_FILE.name]
    for folder in ("launch", "rviz"):
        link = PACKAGE / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder
        assert not link.readlink().is_absolute()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("mapping", {"bag": "/b"}, ["mapping_supervisor", "player_node"]),
        ("mapping", {"rviz": "true"}, ["mapping_supervisor", "rviz2"]),
        ("visualization", {}, ["rviz2"]),
        (
            "replay_eval",
            {"bag": "/b", "maps": "/m", "out": "/o"},
            ["recorder_node", "mapping_node", "player_node"],
        ),
    ],
)
def test_real_launch(name: str, given: dict[str, str], expected: list[str]) -> None:
    launch = pytest.importorskip("launch")
    pytest.importorskip("launch_ros")
    if not hasattr(launch, "LaunchService"):
        pytest.skip("another package named launch")
    from launch_ros.actions import Node

    context = launch.LaunchContext()
    context.launch_configurations.update({"params_file": str(PARAMS_FILE), **given})
    started = []
    for entity in load(name).generate_launch_description().entities:
        started += entity.execute(context) or []
    nodes = [action for action in started if isinstance(action, Node)]
    assert [node.node_executable for node in nodes] == expected
    assert all(node.node_package in ("nmp", "rviz2") for node in nodes)


def test_rviz_shows_the_topics_of_the_node() -> None:
    manager = yaml.safe_load(RVIZ_FILE.read_text(encoding="utf-8"))["Visualization Manager"]
    assert manager["Global Options"]["Fixed Frame"] == MAP_FRAME

    def private(topic: str) -> str:
        return topic.replace("~", "/mapping_node")

    shown: dict[str, SimpleNamespace] = {}
    for display in manager["Displays"]:
        if "Topic" in display:
            topic = display["Topic"]
            shown[topic["Value"]] = SimpleNamespace(
                kind=display["Class"], durability=topic["Durability Policy"], reliability=topic["Reliability Policy"]
            )
    layers = {private(topic(name)) for name in CLASSES for topic in (layer_topic, city_topic)}
    pictures = {private(BEV), *(absolute(image_topic(camera)) for camera in CAMERAS)}
    latched = dict.fromkeys(layers, "Map") | {private(VECTORS): "MarkerArray", private(FOOTPRINT): "Polygon"}
    assert set(shown) == set(latched) | pictures
    for topic, kind in latched.items():
        assert shown[topic].kind == f"rviz_default_plugins/{kind}"
        assert (shown[topic].durability, shown[topic].reliability) == ("Transient Local", "Reliable")
    for topic in pictures:
        # a best-effort reader matches every writer
        assert (shown[topic].kind, shown[topic].reliability) == ("rviz_default_plugins/Image", "Best Effort")
    assert any(display["Class"] == "rviz_default_plugins/TF" for display in manager["Displays"])


def test_what_launch_files_and_rviz_need_is_a_dependency() -> None:
    needed = {e.text for e in ElementTree.parse(PACKAGE / "package.xml").iter("exec_depend")}
    displays = yaml.safe_load(RVIZ_FILE.read_text(encoding="utf-8"))["Visualization Manager"]["Displays"]
    assert {"launch", "launch_ros", "rviz2", *(d["Class"].split("/")[0] for d in displays)} <= needed
    # RViz takes compressed images through these
    assert any(d.get("Topic", {}).get("Value", "").endswith("/compressed") for d in displays)
    assert "image_transport_plugins" in needed


@pytest.mark.parametrize("platform", PLATFORMS)
def test_parameter_file(platform: str) -> None:
    path = PACKAGE / "nmp" / "config" / f"{platform}.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))["/**/mapping_node"]["ros__parameters"]
    declared = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in PARAMETERS}
    # the file shows the defaults, but for what the platform wants otherwise
    assert params == declared | PLATFORMS[platform]
    assert {type(v) for v in params.values()} == {bool, int, float, str, list}


def test_generated_files_are_up_to_date() -> None:
    for path, text in reference.files().items():
        assert path.read_text(encoding="utf-8") == text, f"run python -m nmp.nodes.reference: {path} is out of date"


SUBNET = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"}


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ("true", {}, ["LOCALHOST", str(PROFILE), str(PROFILE)]),
        ("true", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}, [str(PROFILE), str(PROFILE)]),
        ("true", {"FASTRTPS_DEFAULT_PROFILES_FILE": "mine.xml"}, ["LOCALHOST"]),
        ("true", SUBNET, []),  # somebody wants others to be reached
        ("false", {}, []),
    ],
)
@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda p: p.name)
def test_dds_stays_on_this_machine(
    launch_packages: None, path: Path, given: str, environment: dict[str, str], expected: list[str]
) -> None:
    assert PROFILE.is_file()
    module = load(path.name.removesuffix(".launch.py"))
    context = Context({a.args[0]: a.kwargs.get("default_value", "") for a in module.ARGUMENTS})
    assert context["local"] == "true"
    context |= {"local": given, "params_file": "p.yaml"}
    context.environment = environment
    started = (getattr(module, "start_nodes", None) or module.start)(context)
    kinds = [type(action).__name__ for action in started]
    assert kinds.index("Node") >= len(expected)  # a node takes the environment that it finds
    assert [a.args[1] for a in started if type(a).__name__ == "SetEnvironmentVariable"] == expected


def test_visualization_shows_the_shipped_view(launch_packages: None) -> None:
    module = load("visualization")
    config = {a.args[0]: a.kwargs["default_value"] for a in module.ARGUMENTS}["config"]
    assert config.args[0][1:] == ["rviz", RVIZ_FILE.name]
    nodes = module.start_nodes(Context(config="mine.rviz", use_sim_time="true", local="false"))
    assert [n.kwargs["arguments"] for n in nodes] == [["-d", "mine.rviz"]]
    assert nodes[0].kwargs["parameters"] == [{"use_sim_time": True}]


def test_replay_eval_goes_from_bag_to_table(launch_packages: None) -> None:
    module = load("replay_eval")
    given = {a.args[0]: a.kwargs.get("default_value", "") for a in module.ARGUMENTS}
    given |= {"bag": "/b", "maps": "/m", "out": "/o", "prior": "/p", "version": "v1.0-mini"}
    actions = module.start(Context(given, local="false"))
    nodes = {a.kwargs["executable"]: a for a in actions if "executable" in a.kwargs}
    assert set(nodes) <= set(executables()) and len(nodes) == 3
    mapper = nodes["mapping_node"].kwargs["parameters"]
    assert mapper[0].args[0][1:] == ["config", "cpu.yaml"]
    assert mapper[1] == {"use_sim_time": True, "use_prior": True, "prior_dir": "/p"}

    handlers = {a.args[0].kwargs["target_action"]: a.args[0].kwargs["on_exit"] for a in actions if a.args}
    done, failed = (SimpleNamespace(returncode=code, process_name="it") for code in (0, 2))
    (timer,) = handlers[nodes["player_node"]](done, None)
    stopped = [e.kwargs["event"].kwargs["process_matcher"] for e in timer.kwargs["actions"]]
    assert stopped == [nodes["mapping_node"], nodes["recorder_node"]] and timer.kwargs["period"] > 0
    # whichever of them ends first: the other one is waited for
    assert handlers[nodes["recorder_node"]](done, None) == []
    (evaluator,) = handlers[nodes["mapping_node"]](done, None)
    command = evaluator.kwargs["cmd"][3:]
    from nmp.cli import build_parser

    args = build_parser(command).parse_args(command)
    assert (args.layers, args.version) == ([nodes["recorder_node"].kwargs["parameters"][0]["out_dir"]], "v1.0-mini")
    (end,) = handlers[evaluator](done, None)
    assert type(end).__name__ == "Shutdown"
    with pytest.raises(SystemExit) as code:
        handlers.pop(evaluator)(failed, None)
    assert code.value.code == 2
    for handler in handlers.values():
        with pytest.raises(RuntimeError, match="it ended with code 2"):
            handler(failed, None)


def test_nodes_are_given_the_time_to_save(launch_packages: None) -> None:
    evaluation = {"bag": "/b", "maps": "/m", "out": "/o"}
    for path in LAUNCH_FILES:
        name = path.name.removesuffix(".launch.py")
        module = load(name)
        given = {a.args[0]: a.kwargs.get("default_value", "") for a in module.ARGUMENTS} | {"params_file": "p.yaml"}
        given |= evaluation if name == "replay_eval" else {"bag": "/b", "rviz": "true"}
        actions = (module.start if name == "replay_eval" else module.start_nodes)(Context(given))
        nodes = [a.kwargs for a in actions if type(a).__name__ == "Node"]
        assert len(nodes) == {"mapping": 3, "replay_eval": 3, "visualization": 1}[name]
        for node in nodes:
            for limit in ("sigterm_timeout", "sigkill_timeout"):
                assert isinstance(node[limit], str) and float(node[limit]) > STOP_TIMEOUT
