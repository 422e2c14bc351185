"""Serves pages to a browser on this machine."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from nmp.errors import NmpError
from nmp.view.site import Site, problem

LOOPBACK = "127.0.0.1"
EVENTS = "events"
_POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
_POLICY += "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

Events = Callable[[], Iterator[str]]
"""texts to send to a page that listens, each when it is due; an empty one keeps the connection alive"""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_address(host: str) -> str:
    """Return a host as addresses write it."""
    return f"[{host}]" if ":" in host else host


def warn_if_open(host: str) -> None:
    """Say on stderr when other machines can see what is served."""
    if not is_loopback(host):
        print(f"nmp: warning: everybody who reaches {host} sees the cameras and the map; nothing is encrypted and no "
              "password is asked for", file=sys.stderr)  # fmt: skip


def cannot_listen(host: str, port: int, error: OSError) -> NmpError:
    """Return what to tell of a port that cannot be opened."""
    if error.errno == errno.EADDRINUSE:
        return NmpError(f"port {port} of {host} is in use: give another --port (0 takes any free one)")
    return NmpError(f"cannot listen on {host}, port {port} ({error.strerror or error}): check --host and --port")


class PageServer(ThreadingHTTPServer):
    """Serves a site until it is shut down."""

    daemon_threads = True

    def __init__(self, site: Site, host: str = LOOPBACK, port: int = 0, events: Events | None = None) -> None:
        """Listen at once; 0 takes any free port.

        :param events: what a page is told while it is open

        Raises :class:`NmpError` when the port cannot be opened.
        """
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), partial(_Handler, site, events))
        except (OSError, OverflowError) as error:
            wrong = error if isinstance(error, OSError) else OSError(errno.EINVAL, "no such port")
            raise cannot_listen(host, port, wrong) from error

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing when a browser hangs up in the middle; anything else is a mistake of ours and is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """The address to open."""
        return f"http://{in_address(self.host)}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PageServer

    def __init__(self, site: Site, events: Events | None, *args: object) -> None:
        self._site, self._events = site, events
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:  # the name that http.server asks for
        if not self._is_for_us():
            self._send(HTTPStatus.FORBIDDEN, b"this server answers to its own address only", "text/plain")
            return
        path = unquote(urlsplit(self.path).path)
        if (instead := self._site.moved(path)) is not None:
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", instead)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self._events and path.endswith(f"/{EVENTS}"):
            self._stream(self._events())
            return
        try:
            found = self._site.answer(path)
        except NmpError as error:
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, problem(error).encode(), "text/html; charset=utf-8")
            return
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, b"there is nothing here", "text/plain")
            return
        self._send(HTTPStatus.OK, *found)

    def _is_for_us(self) -> bool:
        """Refuse other names for this address: a page of somebody else could use one to read what is served here."""
        if not is_loopback(self.server.host):
            return True
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        return is_loopback(name)

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        # another drive may be served here tomorrow
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self._write(body)

    def _stream(self, texts: Iterator[str]) -> None:
        """Send server-sent events (WHATWG HTML, section 9.2) until the page is closed."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for text in texts:
            if not self._write(f"data: {text}\n\n".encode() if text else b": still here\n\n"):
                return

    def _write(self, body: bytes) -> bool:
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:  # the page was closed
            self.close_connection = True
            return False
        return True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of every request."""
