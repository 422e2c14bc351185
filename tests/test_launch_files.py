"""The launch file, its RViz view and its parameter file agree with the nodes."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from nmp.frame import CAMERAS, CLASSES
from nmp.topics import BEV, MAP_FRAME, VECTORS, absolute, image_topic, layer_topic

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILE = ROOT / "launch" / "mapping.launch.py"
PACKAGE = ROOT / "ros2_ws" / "src" / "nmp"
PARAMS_FILE = PACKAGE / "nmp" / "config" / "mapping_cpu.yaml"
RVIZ_FILE = ROOT / "rviz" / "nmp.rviz"


class Recorded:
    """Stands for any launch class: keeps how it was called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs


class Configuration(Recorded):
    def perform(self, context: dict[str, str]) -> str:
        return context[self.args[0]]


def load(name: str = "launch_under_test") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LAUNCH_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the launch file, loaded on top of stand-ins: the launch packages are no wheels."""

    def module(name: str, **names: Any) -> None:
        stub = ModuleType(name)
        stub.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, stub)

    def kind(name: str) -> type[Recorded]:
        return type(name, (Recorded,), {})

    module("launch", LaunchContext=dict, LaunchDescription=kind("LaunchDescription"))
    module(
        "launch.actions",
        DeclareLaunchArgument=kind("DeclareLaunchArgument"),
        OpaqueFunction=kind("OpaqueFunction"),
        Shutdown=kind("Shutdown"),
    )
    module(
        "launch.substitutions",
        LaunchConfiguration=Configuration,
        PathJoinSubstitution=kind("PathJoinSubstitution"),
    )
    module("launch_ros")
    module("launch_ros.actions", Node=kind("Node"))
    module("launch_ros.substitutions", FindPackageShare=kind("FindPackageShare"))
    return load()


def start(module: ModuleType, **given: str) -> dict[str, dict[str, Any]]:
    """Return the nodes that the launch file starts with these arguments: executable to keyword arguments."""
    context = {argument.args[0]: argument.kwargs["default_value"] for argument in module.ARGUMENTS}
    context["params_file"] = "params.yaml"
    assert set(given) <= set(context)
    return {node.kwargs["executable"]: node.kwargs for node in module.start_nodes({**context, **given})}


def executables() -> dict[str, str]:
    """Return the console scripts of the package's setup.py: name to module:function."""
    for node in ast.walk(ast.parse((PACKAGE / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "entry_points":
            scripts = ast.literal_eval(node.value)["console_scripts"]
            return dict(script.split(" = ") for script in scripts)
    raise AssertionError("setup.py has no entry points")


def test_arguments_are_described(stubbed: ModuleType) -> None:
    names = [argument.args[0] for argument in stubbed.ARGUMENTS]
    assert names == ["bag", "rate", "loop", "prior", "weights", "location", "params_file", "use_sim_time", "rviz"]
    for argument in stubbed.ARGUMENTS:
        assert len(argument.kwargs["description"]) > 15, argument.args
        assert "default_value" in argument.kwargs, argument.args
    description = stubbed.generate_launch_description()
    assert description.args[0][:-1] == stubbed.ARGUMENTS
    assert description.args[0][-1].kwargs["function"] is stubbed.start_nodes


def test_live_start_leaves_the_parameter_file_alone(stubbed: ModuleType) -> None:
    nodes = start(stubbed)
    assert set(nodes) == {"mapping_node"}
    assert nodes["mapping_node"]["parameters"] == ["params.yaml", {"use_sim_time": False}]
    assert nodes["mapping_node"]["name"] == "mapping_node"


def test_bag_start(stubbed: ModuleType) -> None:
    nodes = start(stubbed, bag="/b", rate="0.5", loop="true", prior="/p", weights="/w", location="boston-seaport")
    assert set(nodes) == {"mapping_node", "player_node"}
    assert nodes["player_node"]["parameters"] == [{"bag": "/b", "rate": 0.5, "loop": True}]
    assert nodes["mapping_node"]["parameters"][1] == {
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
    assert nodes["mapping_node"]["parameters"][1]["use_sim_time"] is expected
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
    default = {a.args[0]: a.kwargs["default_value"] for a in stubbed.ARGUMENTS}["params_file"]
    assert default.args[0][1:] == ["config", PARAMS_FILE.name]
    rviz = start(stubbed, rviz="true")["rviz2"]["arguments"]
    assert rviz[0] == "-d" and rviz[1].args[0][1:] == ["rviz", RVIZ_FILE.name]
    for folder in ("launch", "rviz"):
        link = PACKAGE / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder
        assert not link.readlink().is_absolute()


def test_real_launch() -> None:
    launch = pytest.importorskip("launch")
    pytest.importorskip("launch_ros")
    if not hasattr(launch, "LaunchService"):
        pytest.skip("another package named launch")
    context = launch.LaunchContext()
    context.launch_configurations.update({"bag": "/b", "params_file": str(PARAMS_FILE)})
    nodes = []
    for entity in load().generate_launch_description().entities:
        nodes += entity.execute(context) or []
    assert [node.node_executable for node in nodes] == ["mapping_node", "player_node"]


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
    layers = {private(layer_topic(name)) for name in CLASSES}
    pictures = {private(BEV), *(absolute(image_topic(camera)) for camera in CAMERAS)}
    assert set(shown) == layers | pictures | {private(VECTORS)}
    for topic in (*layers, private(VECTORS)):
        kind = "Map" if topic in layers else "MarkerArray"
        assert shown[topic].kind == f"rviz_default_plugins/{kind}"
        assert (shown[topic].durability, shown[topic].reliability) == ("Transient Local", "Reliable")
    for topic in pictures:
        # a best-effort reader matches every writer
        assert (shown[topic].kind, shown[topic].reliability) == ("rviz_default_plugins/Image", "Best Effort")
    assert any(display["Class"] == "rviz_default_plugins/TF" for display in manager["Displays"])


def test_parameter_file() -> None:
    params = yaml.safe_load(PARAMS_FILE.read_text(encoding="utf-8"))["/**/mapping_node"]["ros__parameters"]
    source = (PACKAGE / "nmp" / "nodes" / "mapping_node.py").read_text(encoding="utf-8")
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and len(n.args) >= 3]
    declared = {
        ast.literal_eval(n.args[0]): ast.literal_eval(n.args[1])
        for n in calls
        if isinstance(n.func, ast.Name) and n.func.id == "declare"
    }
    assert len(declared) >= len(params) >= 7
    # the file shows the defaults: a user who deletes a line gets what it said
    assert params == {name: declared[name] for name in params}
