"""The services of the mapping node. None makes the executor wait, and no caller waits longer than a limit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from nmp_msgs.srv import ExportPrior, LoadPrior, PauseMapping, ResetMapping, SavePrior
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.task import Future as RosFuture

from nmp import topics
from nmp.nodes import prior_jobs
from nmp.nodes.worker import Worker

if TYPE_CHECKING:
    from nmp.nodes.mapping_node import Mapper, MappingNode

Answer = dict[str, Any]
"""fields of a response"""


class NotReady(Exception):
    """A request that the node's state does not allow."""


class Services:
    """The services of a node, in whatever state it is."""

    def __init__(self, node: MappingNode) -> None:
        self._node = node
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)  # a limit must end also when /clock does not go on
        # A callback that waits must not keep messages and other callbacks waiting.
        self._group = ReentrantCallbackGroup()
        self._wake = node.create_guard_condition(lambda: None, self._group)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="export")
        for kind, name, begin in (
            (SavePrior, topics.SAVE_PRIOR, self._save),
            (LoadPrior, topics.LOAD_PRIOR, self._load),
            (ExportPrior, topics.EXPORT_PRIOR, self._export),
            (ResetMapping, topics.RESET, self._reset),
            (PauseMapping, topics.PAUSE, self._pause),
        ):
            node.create_service(kind, name, partial(self._serve, begin), callback_group=self._group)

    async def _serve(self, begin: Callable[[Any], Future[Answer]], request: Any, response: Any) -> Any:
        """Answer any request: with the result of what it begins, or with why there is none."""
        codes = type(response)
        timeout = self._node.settings["service_timeout"]
        response.result = codes.RESULT_FAILED
        try:
            for field, value in (await self._result(begin(request), timeout)).items():
                setattr(response, field, value)
            response.result = codes.RESULT_SUCCESS
        except NotReady as exc:
            response.result, response.message = codes.RESULT_NOT_READY, str(exc)
        except prior_jobs.Refused as exc:
            response.result, response.message = codes.RESULT_REFUSED, str(exc)
        except TimeoutError:
            response.result = codes.RESULT_TIMEOUT
            response.message = f"not done after {timeout:g} s: it is done later; check the disk"
        except Exception as exc:  # whatever it was, the caller gets an answer
            response.message = str(exc) or repr(exc)
        return response

    async def _result(self, done: Future[Answer], timeout_s: float) -> Answer:
        """Wait without keeping the executor; raises TimeoutError, or what went wrong."""
        over: RosFuture = RosFuture()

        def wake(_: Future[Answer]) -> None:
            over.set_result(None)
            self._wake.trigger()

        timer = self._node.create_timer(timeout_s, lambda: over.set_result(None), self._group, self._steady)
        done.add_done_callback(wake)
        try:
            await over
        finally:
            self._node.destroy_timer(timer)
        if not done.done():
            raise TimeoutError
        return done.result()

    # Each of these runs in the executor's thread, and leaves what takes time to another.

    def _save(self, request: SavePrior.Request) -> Future[Answer]:
        mapper, worker = self._active()
        if not (self._node.settings["use_prior"] and self._node.statistics.answered):
            raise NotReady("nothing to save yet: no frame has been mapped with a prior")

        def job() -> Answer:
            mapper.flush()
            return {"message": "saved"}

        return worker.submit(job)

    def _load(self, request: LoadPrior.Request) -> Future[Answer]:
        mapper, worker = self._active()
        location = self._location(request.location)

        def job() -> Answer:
            prior_jobs.check_version(mapper.prior_dir, location, request.version)
            mapper.close()  # the next frame opens what is stored by then
            count = prior_jobs.load_version(mapper.prior_dir, location, request.version)
            return {"message": f"{location} is loaded", "drives": count}

        return worker.submit(job)

    def _export(self, request: ExportPrior.Request) -> Future[Answer]:
        mapper, _ = self._active()
        location = self._location(request.location)

        def job() -> Answer:
            path, count = prior_jobs.export_city(mapper.prior_dir, location, request.file)
            return {"message": f"{location} is written", "path": str(path), "records": count}

        # Drives that are over never change, so mapping goes on meanwhile.
        return self._beside.submit(job)

    def _reset(self, request: ResetMapping.Request) -> Future[Answer]:
        mapper, worker = self._active()
        outputs = self._node.outputs
        assert outputs is not None  # an active node has them
        if request.forget_drive and not self._node.settings["use_prior"]:
            raise NotReady("there is nothing to forget: the node runs without a prior (parameter 'use_prior')")
        self._node.begin_anew()

        def job() -> Answer:
            before = prior_jobs.stored(mapper.prior_dir) if request.forget_drive else set()
            added = mapper.close()
            outputs.reset()
            count = prior_jobs.forget(mapper.prior_dir, added, before) if request.forget_drive else 0
            return {"message": f"begun anew; {count} drives are left out"}

        return worker.submit(job)

    def _pause(self, request: PauseMapping.Request) -> Future[Answer]:
        self._active()
        self._node.paused = bool(request.paused)
        done: Future[Answer] = Future()
        done.set_result({"message": "paused" if request.paused else "mapping"})
        return done

    def _active(self) -> tuple[Mapper, Worker]:
        """Return who maps; only a node that is active has both."""
        node = self._node
        if node.mapper is None or node.worker is None or node.state != "active":
            raise NotReady(f"the node is {node.state}: activate it first (ros2 lifecycle set)")
        return node.mapper, node.worker

    def _location(self, given: str) -> str:
        if not self._node.settings["use_prior"]:
            raise NotReady("the node runs without a prior (parameter 'use_prior')")
        location = given or self._node.assembler.location
        if not location:
            raise NotReady("no location is known yet: name one in the request")
        return location
