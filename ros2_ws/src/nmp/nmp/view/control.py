"""Foxglove's own buttons for a recorded drive: play, pause, speed, seek."""

from __future__ import annotations

import time
from types import TracebackType

from foxglove.websocket import (
    ChannelView,
    Client,
    PlaybackCommand,
    PlaybackControlRequest,
    PlaybackState,
    PlaybackStatus,
    ServerListener,
    WebSocketServer,
)

from nmp.view.drive import RecordedDrive
from nmp.view.foxglove import FoxgloveSink, serve
from nmp.view.playback import Moment, Player, Story

_TELL_S = 1.0
"""how it stands is told so often: who comes later does not know"""


class FoxglovePlayer(ServerListener):
    """Serves a recorded drive, played over and over until somebody presses a button; a context."""

    def __init__(self, drive: RecordedDrive, host: str, port: int) -> None:
        """Raise :class:`nmp.errors.NmpError` when the port cannot be opened."""
        begin, end = drive.start_ns, drive.end_ns
        sink = FoxgloveSink()
        self._told: tuple[float, bool, float] = (0.0, True, 0.0)  # when (monotonic clock, s), playing, speed
        self.player = Player(Story(drive, sink), begin, end, self._tell)
        self.server: WebSocketServer = serve(
            sink, drive.recording.name, host, port, listener=self, span_ns=(begin, end)
        )

    def on_playback_control_request(self, playback_control_request: PlaybackControlRequest) -> PlaybackState | None:
        """Do what was asked for; called by the server."""
        request = playback_control_request
        moment = self.player.control(
            play=request.playback_command == PlaybackCommand.Play,
            speed=request.playback_speed,
            seek_ns=request.seek_time,
        )
        return _state(moment, request.request_id)

    def on_subscribe(self, client: Client, channel: ChannelView) -> None:
        """Show a new panel something at once; called by the server."""
        self.player.refresh()

    def _tell(self, moment: Moment) -> None:
        self.server.broadcast_time(moment.at_ns)
        at, playing, speed = self._told
        now = time.monotonic()
        if moment.jumped or (moment.playing, moment.speed) != (playing, speed) or now - at > _TELL_S:
            self._told = now, moment.playing, moment.speed
            self.server.broadcast_playback_state(_state(moment, ""))

    def __enter__(self) -> FoxglovePlayer:
        self.player.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.player.stop()
        self.server.stop()


def _state(moment: Moment, request: str) -> PlaybackState:
    status = PlaybackStatus.Playing if moment.playing else PlaybackStatus.Paused
    return PlaybackState(
        status=PlaybackStatus.Ended if moment.ended else status,
        current_time=moment.at_ns,
        playback_speed=moment.speed,
        did_seek=moment.jumped,
        request_id=request,
    )
