"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nmp
from nmp import cli
from nmp.errors import NmpError

COMMANDS = ("bag", "map", "eval", "vectors", "view", "prior", "truth")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nmp.cli", *arguments], capture_output=True, text=True, timeout=120)


def test_help_and_version() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for name in COMMANDS:
        assert name in shown.stdout
    assert run("--version").stdout == f"nmp {nmp.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from nmp.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("'numpy'", "'torch'", "'rosbags'", "'matplotlib'", "'cv2'"):
        assert name not in loaded


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: nmp {name}" in capsys.readouterr().out


def test_help_tells_of_estimated_poses_and_map_dates(capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (("bag", ("--true-poses", "ego_pose_estimate.json")), ("eval", ("--map-date", "--version"))):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)


@pytest.mark.parametrize("arguments", [[], ["mpa"], ["map"], ["eval", "--maps"], ["--nonsense"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_errors_are_one_line_without_a_trace(tmp_path: Path) -> None:
    failed = run("map", str(tmp_path / "no.bag"), "--no-prior", "--out", str(tmp_path / "layers"))
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == f"nmp: error: bag {tmp_path / 'no.bag'} does not exist: check the path\n"
    failed = run("bag", "--dataroot", str(tmp_path / "no"), "--scene", "scene-0061", "--out", str(tmp_path / "bag"))
    assert failed.returncode == 2
    assert failed.stderr.startswith("nmp: error: nuScenes folder") and failed.stderr.count("\n") == 1


def test_interruption_and_errors_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nmp import evaluation

    def raise_it(kind: type[BaseException]) -> None:
        def run_it(args: object) -> None:
            raise kind("what is wrong: what to do")

        monkeypatch.setattr(evaluation, "run", run_it)

    raise_it(KeyboardInterrupt)
    assert cli.main(["eval", "layers", "--maps", "data"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    raise_it(NmpError)
    assert cli.main(["eval", "layers", "--maps", "data"]) == 2
    assert capsys.readouterr().err == "nmp: error: what is wrong: what to do\n"
    raise_it(ZeroDivisionError)  # a mistake of ours is not dressed up as one of the user
    with pytest.raises(ZeroDivisionError):
        cli.main(["eval", "layers", "--maps", "data"])
