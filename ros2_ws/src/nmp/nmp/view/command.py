"""``nmp view``: look at a drive in a browser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nmp.errors import NmpError
from nmp.evaluation import CityMaps
from nmp.view.find import Recording, find_recordings
from nmp.view.folder import prepare_folder, write_pages
from nmp.view.server import LOOPBACK, PageServer, warn_if_open
from nmp.view.site import RecordedScreen, Site

PAGE_PORT = 8150


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
        "--maps", type=Path, metavar="DATAROOT", help="folder with maps/expansion: show the true map, and scores"
    )
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="address to listen on; only this machine can look in without (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=PAGE_PORT, help=f"0 takes any free one (default: {PAGE_PORT})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the pages into a folder instead of serving them")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp view``."""
    if not args.places:
        raise NmpError("nothing to look at: give a bag and its layers, or the folder of a demo")
    recordings = find_recordings(args.places)
    maps = _maps(args.maps, args.places)
    screens = [RecordedScreen(recording, maps) for recording in recordings]
    try:
        screens[0].content()  # what is wrong with it shows before anybody has opened the page
        if args.out:
            _write(screens, args.out)
        else:
            warn_if_open(args.host)
            _serve(PageServer(Site(screens), args.host, args.port), recordings)
    finally:
        for screen in screens:
            screen.close()


def _maps(dataroot: Path | None, places: Sequence[Path]) -> CityMaps | None:
    """Return the true maps: those that were named, else those of a demo's simulated city."""
    if dataroot is not None:
        return CityMaps(dataroot)
    found = next((p / "data" for p in places if (p / "data" / "maps" / "expansion").is_dir()), None)
    return None if found is None else CityMaps(found)


def _write(screens: Sequence[RecordedScreen], folder: Path) -> None:
    from tqdm import tqdm

    prepare_folder(folder)
    with tqdm(total=sum(1 for s in screens for _ in s.paths()), unit="picture", desc="view", disable=None) as bar:
        count = write_pages(screens, folder, bar.update)
    print(f"wrote {count} pictures: open {folder / 'index.html'}")


def _serve(server: PageServer, recordings: Sequence[Recording]) -> None:
    for recording in recordings:
        print(f"  {recording.name}")
    print(f"open {server.url} (Ctrl-C ends)", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # the way to end it
            print()
