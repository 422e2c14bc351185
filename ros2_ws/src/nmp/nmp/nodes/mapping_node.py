"""Cameras and pose in, map layers out: the ROS shell around the assembler and the online mapper.

One thread only sorts messages into the assembler and hands whole frames to the worker, whose thread owns the mapper:
everything that touches it runs there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from numpy.typing import NDArray
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from nmp import topics
from nmp.assembly import FrameAssembler, Limits
from nmp.errors import NmpError
from nmp.extrinsics import read_extrinsics
from nmp.frame import Frame, LocalMap
from nmp.gate import GateLimits, PoseGate
from nmp.geometry import Array
from nmp.nodes.diagnostics import Condition, Reports
from nmp.nodes.inputs import Arrival, Inputs
from nmp.nodes.lifecycle import FAILURE, INTERNAL, SUCCESS, ManagedNode
from nmp.nodes.outputs import Draw, Outputs, draw_picture
from nmp.nodes.parameters import (
    COMPILE_TIMEOUT,
    GATE,
    LOAD_TIMEOUT,
    PARAMETERS,
    REPORT_PERIOD,
    STOP_TIMEOUT,
)
from nmp.nodes.runtime import run_node
from nmp.nodes.services import Services
from nmp.nodes.settings import Settings
from nmp.nodes.statistics import RunStatistics
from nmp.nodes.worker import Waiting, Worker
from nmp.prior.record import Record
from nmp.prior.storage import Place, place_of
from nmp.process import give_memory_back, prepare_process

PRIOR_EVERY = 10.0
"""time between two looks at the size of the prior, s: they take a few milliseconds"""
TIDY_EVERY_S = 60.0
"""time after which memory that lies free is given back to the system, s"""
REFUSED, QUEUE_FULL, OVERTAKEN = "refused by the mapper", "queue full", "overtaken by a newer frame"


class Mapper(Protocol):
    """What the node needs of :class:`nmp.mapper.OnlineMapper`."""

    prior_error: str
    prior_dir: Place
    gates: PoseGate

    @property
    def stages_s(self) -> Mapping[str, float]: ...
    @property
    def damage(self) -> str: ...
    def update(self, frame: Frame) -> LocalMap: ...
    def traversals(self, location: str, points: Array) -> NDArray[np.int64] | None: ...
    def prior_counts(self) -> Mapping[str, int]: ...
    def flush(self) -> None: ...
    def close(self) -> Mapping[str, Record]: ...


def load_mapper(settings: Settings) -> Mapper:
    """Return the online mapper that the parameters describe."""
    from nmp.mapper import OnlineMapper  # brings torch, which takes its time

    mapper = OnlineMapper(
        _path(settings["weights"]),
        place_of(settings["prior_dir"]) if settings["prior_dir"] else None,
        use_prior=settings["use_prior"],
        flush_interval_s=settings["flush_interval"],
        resident_mb=settings["prior_memory"],
        stale_days=settings["stale_days"],
        device=settings["device"],
        precision=settings["precision"],
        compiled=settings["compile"],
        min_cameras=1,  # the assembler decides
        tolerant=True,
        limits=GateLimits(**{f.name: settings[GATE + f.name] for f in dataclasses.fields(GateLimits)}),
    )
    if settings["use_prior"] and settings["location"]:
        mapper.expect(settings["location"])
    return mapper


class MappingNode(ManagedNode):
    """The node ``mapping_node``; docs/node.md lists its topics, services and parameters.

    Configured, it has loaded the network and opened the prior; active, it listens and maps; deactivated, the prior is
    saved, the drive committed, and the memory of the GPU free. A transition that cannot be made says why in
    ``/diagnostics`` and the log; one that breaks halfway releases everything and leaves the node unconfigured.
    """

    def __init__(
        self,
        stop: threading.Event,
        make_mapper: Callable[[Settings], Mapper] = load_mapper,
        draw: Draw = draw_picture,
        **node_options: Any,
    ) -> None:
        """Declare everything, and with the parameter ``autostart`` become active.

        Raises :class:`NmpError` when that fails, for instance because weights or prior cannot be used.
        """
        super().__init__("mapping_node", **node_options)
        self.paused = False
        self.statistics = RunStatistics()
        self.mapper: Mapper | None = None
        self.worker: Worker | None = None
        self.outputs: Outputs | None = None
        self.assembler = FrameAssembler()
        self._assembling = threading.RLock()  # whoever touches the assembler while the node is active holds it
        self._make_mapper, self._draw, self._stop = make_mapper, draw, stop
        self._inputs: Inputs | None = None
        self._newest_ns = 0
        self._prior: Mapping[str, int] = {}
        self._prior_at_s = -math.inf  # when that was asked for, monotonic clock
        self._tidied_s = time.monotonic()  # when memory was last given back
        self._reports = Reports(self.get_name())
        self._failing = ""  # text of the last frame's failure; empty when it was answered
        self.settings = Settings(self, PARAMETERS, lambda: self.state == "unconfigured", self._apply)
        self.services_offered = Services(self)
        self._diagnostics = self.create_publisher(DiagnosticArray, topics.DIAGNOSTICS, 10)
        # Steady time: diagnostics must come also when /clock does not.
        self.create_timer(REPORT_PERIOD, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))
        if self.settings["autostart"]:
            self.quiet = True  # the error is told once
            if self.trigger_configure() != SUCCESS or self.trigger_activate() != SUCCESS:
                raise NmpError(self.failure)
            self.quiet = False

    # -------------------------------------------------------------------------------------------------- transitions

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.transition(self._configure, super().on_configure, state, fault=FAILURE)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.transition(self._activate, super().on_activate, state, fault=FAILURE)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.transition(self._deactivate, super().on_deactivate, state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.transition(self._clean_up, super().on_cleanup, state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        out = self.transition(self._end, super().on_shutdown, state)
        self._stop.set()  # the process ends, whoever asked for it
        return out

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release everything after a transition that broke halfway, so that the node can be configured again."""
        for release in (self._deactivate, self._clean_up):
            try:
                release()
            except Exception as exc:  # the first error is the one to tell
                self.get_logger().error(f"while releasing after an error: {exc!r}")
        return SUCCESS

    def _configure(self) -> None:
        s = self.settings
        mounting = _path(s["extrinsics_file"])
        extrinsics = read_extrinsics(mounting, s["cameras"]) if mounting else {}
        self.assembler = FrameAssembler(prefixes=s["cameras"], extrinsics=extrinsics)
        self._apply(set())
        self.mapper = self._load()
        self.outputs = Outputs(
            self, self._draw, vectors=s["vectors"], extras_rate=s["extras_rate"], city_period_s=s["city_period"]
        )

    def _activate(self) -> None:
        if self.mapper is None:  # it was deactivated before
            self.mapper = self._load()
        self.assembler.reset()
        self.paused = False
        self._inputs = Inputs(self, self.settings, self.assembler, self._assembling, self._arrived)
        self._inputs.start()
        self.get_logger().info(f"ready; waiting for {len(self.assembler.prefixes)} cameras and {topics.ODOM}")

    def _load(self) -> Mapper:
        """Make the mapper in the thread that will run it.

        OpenMP keeps threads for every thread that computes; with more of them than cores they no longer wait for each
        other awake, and each of the network's hundreds of small steps begins with waking them.

        Raises :class:`NmpError` when that takes too long: nothing else is served meanwhile.
        """
        if self.worker is None:
            self.worker = Worker(self._answer)
        made: Future[Mapper] = self.worker.submit(partial(self._make_mapper, self.settings))
        limit_s = COMPILE_TIMEOUT if self.settings["compile"] else LOAD_TIMEOUT
        try:
            return made.result(limit_s)
        except TimeoutError:
            worker, self.worker = self.worker, None  # its thread may never come back
            made.add_done_callback(_close_late)
            worker.close(0.0)
            raise NmpError(
                f"network and prior were not loaded within {limit_s:g} s: do the disks of weights and prior_dir answer?"
            ) from None

    def _deactivate(self) -> None:
        """Stop listening; save the prior, commit the drive, free the memory of the GPU."""
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
        mapper, self.mapper = self.mapper, None
        if mapper is None or self.worker is None:
            return
        self._drop_waiting("node ended", "the frame still waited for the network")
        done = self.worker.submit(mapper.close)
        try:
            done.result(STOP_TIMEOUT)
        except TimeoutError:
            self.worker = None  # its thread may never come back
            raise NmpError(
                f"the network did not come back within {STOP_TIMEOUT:g} s: the last seconds of the prior are not saved"
            ) from None
        finally:
            del mapper, done
            _free_gpu()

    def _clean_up(self) -> None:
        self._deactivate()  # a node that was never active has a mapper all the same
        if self.worker is not None:
            self.worker.close(STOP_TIMEOUT)
            self.worker = None
        if self.outputs is not None:
            self.outputs.close()
            self.outputs = None

    def _end(self) -> None:
        try:
            self._clean_up()
        finally:
            self._sum_up()

    def _apply(self, changed: set[str]) -> None:
        """Let parameters that may change at any time take effect."""
        s = self.settings
        names = ("max_camera_spread", "max_pose_age", "min_cameras", "max_rate", "keyframe_rate")
        self.assembler.limits = Limits(**{name: s[name] for name in names})

    # ------------------------------------------------------------------------------------------------------- frames

    def _arrived(self, arrival: Arrival) -> None:
        """A message is in the assembler: pass on what it completes."""
        inputs, worker = self._inputs, self.worker
        if inputs is None or worker is None or self.outputs is None:
            return  # taken from the middleware before the node stopped to listen
        self.statistics.received += arrival.topic == inputs.anchor_topic
        # A frame that is complete stays one when the clock jumps: what waits for the network is mapped all the same.
        frames = self.assembler.pop_frames()
        if not frames:
            return
        if self.paused:
            self.statistics.skip("paused", len(frames))
        elif self.settings["idle_without_subscribers"] and not self.outputs.wanted:
            self.statistics.skip("no subscribers", len(frames))
        else:
            before = {"assembling": inputs.busy_s / len(frames)}
            if arrival.transport_s is not None:
                before = {"transport": arrival.transport_s, **before}
            inputs.busy_s = 0.0
            new = [Waiting(frame, arrival.received_s, before) for frame in frames]
            for old in worker.offer(new, self.settings["queue_size"]):
                if not old.frame.keyframe:
                    self.statistics.skip(OVERTAKEN, 1)
                    continue
                text = f"frame {old.frame.stamp_ns}: the network is slower than the cameras: lower their rate"
                self.statistics.drop(QUEUE_FULL, text)

    def _drop_waiting(self, cause: str, text: str) -> None:
        if self.worker is not None:
            self.statistics.drop(cause, text, self.worker.clear())

    def begin_anew(self) -> None:
        """Drop what waits and what is being put together."""
        with self._assembling:
            self.assembler.reset()
        self._drop_waiting("reset", "a frame from before the reset waited for the network")

    def _answer(self, waiting: Waiting) -> None:
        """Map one frame and publish it; in the worker's thread."""
        mapper, outputs = self.mapper, self.outputs
        if mapper is None or outputs is None:
            return self.statistics.drop("node ended", "the frame still waited for the network")
        begin = time.monotonic()
        try:
            local_map = mapper.update(waiting.frame)
            if self.outputs is not outputs:
                return  # it took so long that the node has given it up
            mapped = time.monotonic()
            outputs.publish_layers(local_map)
            end = time.monotonic()
            before = {**waiting.before_s, "waiting": begin - waiting.received_s}
            stages = {**before, **mapper.stages_s, "publishing": end - mapped}
            self.statistics.answer(end - waiting.received_s, stages, waiting.frame.keyframe)
            self._newest_ns = local_map.stamp_ns
            self._failing = ""
            worker = self.worker
            outputs.publish_extras(local_map, mapper.traversals, hurry=worker is not None and worker.waiting > 0)
            if end - self._tidied_s > TIDY_EVERY_S:
                self._tidied_s = time.monotonic()
                give_memory_back()
            if end - self._prior_at_s > PRIOR_EVERY:
                self._prior_at_s = end
                with contextlib.suppress(NmpError):  # the layers are out; the next frame tells of a store out of reach
                    self._prior = mapper.prior_counts()
        except NmpError as exc:
            self._fail(REFUSED, str(exc))
        except Exception as exc:  # the node lives on: the next frame may be a better one
            self.get_logger().error(f"{INTERNAL}: {exc!r}", throttle_duration_sec=5.0)
            self._fail(INTERNAL, f"{INTERNAL} ({exc!r}): please report it with the log")

    def _fail(self, cause: str, text: str) -> None:
        self.statistics.drop(cause, text)
        self._failing = text

    # -------------------------------------------------------------------------------------------------- diagnostics

    def _report(self) -> None:
        now, mapper, inputs = self.get_clock().now(), self.mapper, self._inputs
        condition = Condition(
            state=self.state,
            failure=self._failing if self.state == "active" else self.failure,
            prior_error=mapper.prior_error if mapper else "",
            gate=mapper.gates.text if mapper else "",
            gates=mapper.gates.counts if mapper else {},
            paused=self.paused,
            waiting=self.worker.waiting if self.worker else 0,
            silent=inputs.silent() if inputs else (),
            received=inputs.counts if inputs else {},
            prior=self._prior,
            damage=mapper.damage if mapper else "",
            stamp_age_s=(now.nanoseconds - self._newest_ns) / 1e9 if self.statistics.answered else None,
        )
        with self._assembling:
            status = self._reports.make(condition, self.statistics, self.assembler)
        if status.level != DiagnosticStatus.OK:
            self.get_logger().warning(status.message, throttle_duration_sec=5.0)
        array = DiagnosticArray(status=[status])
        array.header.stamp = now.to_msg()
        self._diagnostics.publish(array)

    # ---------------------------------------------------------------------------------------------------------- end

    def shutdown(self) -> int:
        """Save the prior and say what was done, where that is still to do; return the exit code."""
        if self.state != "finalized" and self.trigger_shutdown() != SUCCESS:
            raise NmpError(self.failure)
        return 0

    def _sum_up(self) -> None:
        summary = self.statistics.summary(self.assembler.drops, self.assembler.skipped)
        drops = ", ".join(f"{count} {cause}" for cause, count in summary["drops"].items()) or "none"
        latency = [summary[f"latency_{name}_s"] for name in ("median", "p95")]
        median, p95 = ("-" if seconds is None else f"{1e3 * seconds:.0f} ms" for seconds in latency)
        self.get_logger().info(
            f"{summary['frames_received']} frames received, {summary['frames_answered']} answered, dropped: {drops}; "
            f"latency median {median}, p95 {p95}"
        )
        if path := _path(self.settings["stats_file"]):
            try:
                path.write_text(json.dumps(summary, indent=2) + "\n")
            except OSError as exc:
                raise NmpError(f"cannot write stats_file {path} ({exc.strerror}): choose another path") from exc


def _path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def _close_late(made: Future[Mapper]) -> None:
    """Release a mapper that nobody waits for any more."""
    with contextlib.suppress(Exception):
        made.result().close()


def _free_gpu() -> None:
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Entry point of ``ros2 run nmp mapping_node``."""
    prepare_process()
    sys.exit(run_node(MappingNode))


if __name__ == "__main__":
    main()
