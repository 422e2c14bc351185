"""Pages as a folder, to be opened from a disk or put on any web server."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from nmp.errors import NmpError
from nmp.view.site import INDEX, Link, RecordedScreen

_MARK = "<!-- nmp view -->"
Step = Callable[[int], object]


def prepare_folder(folder: Path) -> None:
    """Make an empty folder for pages, or clear that of earlier ones.

    Raises :class:`NmpError` for a folder that holds anything else, and for one that cannot be written.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            page = folder / INDEX
            if not (page.is_file() and page.read_bytes().startswith(_MARK.encode())):
                raise NmpError(f"--out {folder} holds other files: choose a new folder, or empty it")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # at once: pages that were interrupted can be written again
        (folder / INDEX).write_text(f"{_MARK}\nThe pages are still being written.\n")
    except OSError as error:
        raise _failure(folder, error) from error


def write_pages(screens: Sequence[RecordedScreen], folder: Path, step: Step) -> tuple[int, list[str]]:
    """Write ``<drive>/index.html`` with its pictures beside it, and ``index.html``.

    Returns how many pictures there are, and what is wrong with images that are damaged.

    :param step: is told how many more pictures are written

    Raises :class:`NmpError` when something cannot be read or written.
    """
    links = [Link(screen.name, screen.slug) for screen in screens]
    count, damaged = 0, list[str]()
    for screen in screens:
        place = folder / screen.slug
        for kind, rest, name in screen.paths():
            try:
                found = screen.picture(kind, rest)
            except NmpError as error:
                if kind != "cameras":
                    raise
                found = None  # one damaged image; the page shows the one before
                damaged.append(str(error))
            if found is not None:
                _write(place / name, found)
                count += 1
            step(1)
        _write(place / INDEX, screen.html(links).encode())
    first = escape(f"{links[0].slug}/{INDEX}", quote=True)
    page = f'{_MARK}\n<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={first}">\n'
    _write(folder / INDEX, f'{page}<a href="{first}">{escape(links[0].name)}</a>\n'.encode())
    return count, damaged


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise _failure(path, error) from error


def _failure(path: Path, error: OSError) -> NmpError:
    return NmpError(f"cannot write {path} ({error.strerror or error}): choose another --out, or free disk space")
