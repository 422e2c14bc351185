"""``nmp view``: look at a recorded drive, or at a running node, in a browser or in Foxglove."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nmp.errors import NmpError
from nmp.evaluation import CityMaps
from nmp.nodes.loopback import loopback
from nmp.view.drive import RecordedDrive
from nmp.view.find import Recording, find_recordings
from nmp.view.folder import prepare_folder, write_pages
from nmp.view.server import LOOPBACK, PageServer, warn_if_open
from nmp.view.site import RecordedScreen, Site

PAGE_PORT, FOXGLOVE_PORT = 8150, 8765


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp view``."""
    parser.add_argument(
        "places",
        nargs="*",
        type=Path,
        metavar="BAG_OR_FOLDER",
        help="a bag and the layers that were made of it, or a folder that holds such, as out/demo",
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="look at a running node of this machine instead, over ROS 2 topics",
    )
    parser.add_argument("--node", default="mapping_node", help="its name, with --live (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="its cameras publish raw images, with --live")
    parser.add_argument(
        "--maps", type=Path, metavar="DATAROOT", help="folder with maps/expansion: show the true map, and scores"
    )
    parser.add_argument("--foxglove", action="store_true", help="serve Foxglove (WebSocket) instead of a page")
    parser.add_argument("--mcap", type=Path, metavar="FILE", help="write an MCAP file for Foxglove instead")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the pages into a folder instead of serving them")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="address to listen on; only this machine can look in without (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, help=f"0 takes any free one (default: {PAGE_PORT}, {FOXGLOVE_PORT} for Foxglove)"
    )


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp view``."""
    _check(args)
    port = (FOXGLOVE_PORT if args.foxglove else PAGE_PORT) if args.port is None else args.port
    if args.live:
        _live(args, port)
        return
    recordings = find_recordings(args.places)
    maps = _maps(args.maps, args.places)
    if args.foxglove or args.mcap:
        with RecordedDrive(recordings[0], maps) as drive:
            _tell_others(recordings)
            _write_mcap(drive, args.mcap) if args.mcap else _serve_foxglove(drive, args.host, port)
        return
    screens = [RecordedScreen(recording, maps) for recording in recordings]
    try:
        print(f"reading {recordings[0].name} ...", flush=True)
        screens[0].content()  # what is wrong with it shows before anybody has opened the page
        if args.out:
            _write_pages(screens, args.out)
        else:
            server = PageServer(Site(screens), args.host, port)
            for recording in recordings[1:]:
                print(f"  and {recording.name}")
            _serve(server)
    finally:
        for screen in screens:
            screen.close()


def _check(args: argparse.Namespace) -> None:
    if args.live and (args.places or args.maps or args.out or args.mcap):
        raise NmpError("--live looks at a running node: leave bags, --maps, --out and --mcap out")
    if not args.live and not args.places:
        raise NmpError("nothing to look at: give a bag and its layers, the folder of a demo, or --live")
    if sum(map(bool, (args.foxglove, args.mcap, args.out))) > 1:
        raise NmpError("--foxglove, --mcap and --out exclude each other: choose one")


def _maps(dataroot: Path | None, places: Sequence[Path]) -> CityMaps | None:
    """Return the true maps: those that were named, else those of a demo's simulated city."""
    if dataroot is not None:
        return CityMaps(dataroot)
    found = next((p / "data" for p in places if (p / "data" / "maps" / "expansion").is_dir()), None)
    return None if found is None else CityMaps(found)


def _write_pages(screens: Sequence[RecordedScreen], folder: Path) -> None:
    from tqdm import tqdm

    prepare_folder(folder)
    with tqdm(total=sum(1 for s in screens for _ in s.paths()), unit="picture", desc="view", disable=None) as bar:
        count, damaged = write_pages(screens, folder, bar.update)
    print(f"wrote {count} pictures: open {folder / 'index.html'}")
    if damaged:
        print(f"  {len(damaged)} images were left out; the first: {damaged[0]}")


def _serve(server: PageServer) -> None:
    warn_if_open(server.host)
    print(f"open {server.url} (Ctrl-C ends)", flush=True)
    with server, _until_interrupted():
        server.serve_forever()


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Run a block that Ctrl-C ends; SIGTERM, which services send, ends it as neatly.

    SIGINT as well, as a process that a shell started in the background begins with ignoring it.
    """
    ending = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in ending]
    try:
        yield
    except KeyboardInterrupt:
        print()
    finally:
        for number, handler in zip(ending, before, strict=True):
            signal.signal(number, handler)


def _tell_others(recordings: Sequence[Recording]) -> None:
    print(f"showing {recordings[0].name}")
    if len(recordings) > 1:
        names = "; ".join(recording.name for recording in recordings[1:])
        print(f"  for another one give its bag and its layers: {names}")


def _serve_foxglove(drive: RecordedDrive, host: str, port: int) -> None:
    # foxglove first: it says in one line when the SDK is missing
    from nmp.view.foxglove import announce  # isort: skip
    from nmp.view.control import FoxglovePlayer  # isort: skip

    with FoxglovePlayer(drive, host, port) as served, _until_interrupted():
        announce(served.server, host)
        while not served.player.ended.wait(0.5):
            pass
    if served.player.failure is not None:
        raise served.player.failure


def _write_mcap(drive: RecordedDrive, path: Path) -> None:
    from tqdm import tqdm

    from nmp.view.foxglove import FoxgloveSink, layout_path, mcap_file
    from nmp.view.playback import Story, replay

    sink = FoxgloveSink()
    story = Story(drive, sink)
    total = round((drive.end_ns - drive.start_ns) / 1e9)
    try:
        with mcap_file(sink, path), tqdm(total=total, unit="s", desc="view", disable=None) as bar:
            replay(story, drive.start_ns, drive.end_ns, lambda ns: bar.update(ns / 1e9))
    finally:
        story.close()
    print(f"wrote {path}: open it in Foxglove, with the layout {layout_path()}")


def _live(args: argparse.Namespace, port: int) -> None:
    os.environ.update(loopback(os.environ))
    try:
        from nmp.nodes.viewer_node import listening
    except ImportError as error:
        raise NmpError(
            f"--live needs ROS 2 ({error}): source its setup file, or pip install 'neural-map-prior[ros]'"
        ) from error
    if args.foxglove:
        from nmp.view.foxglove import FoxgloveSink, announce, serve

        sink = FoxgloveSink()
        server = serve(sink, args.node, args.host, port)
        try:
            with listening(sink, args.node, raw=args.raw), _until_interrupted():
                announce(server, args.host)
                threading.Event().wait()
        finally:
            server.stop()
        return
    from nmp.view.live import LiveScreen

    screen = LiveScreen(args.node, f"waiting for the layers of {args.node}: is it active, and does it get images?")
    page = PageServer(Site([screen]), args.host, port, screen.events)
    with listening(screen, args.node, raw=args.raw):
        _serve(page)
