"""Running a network on one frame at a time: eagerly, compiled, or recorded as a CUDA graph, on a CPU or a GPU.

What crosses to the GPU is what the sensors and the prior hold: bytes of images, bytes of latents, 16-bit evidence. The
same goes back. Everything is uploaded from pinned memory, and the host waits once for a frame: for its answer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nmp.errors import NmpError
from nmp.frame import CAMERAS
from nmp.model import fusion
from nmp.model.config import NetworkConfig
from nmp.model.network import BEVNetwork
from nmp.model.preprocess import example_projection

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")

_SEEN = 3
"""inputs that need no prior: those about the images"""
_WARM_UP = 3
"""runs before a recording: libraries choose their kernels and allocate in the first ones"""


class Inputs(NamedTuple):
    """One frame on the host."""

    images: Tensor
    """[1, 6, H, W, 3] uint8 RGB, as decoders write it"""
    pixel_from_base: Tensor
    """[1, 6, 3, 4] base points (m) to homogeneous image coordinates in 0..1"""
    present: Tensor
    """[1, 6] 1 where the camera delivered an image"""
    pose: Tensor
    """[1, 3] float32 ego x, y (m) from the corner of the window, yaw (rad) in the map frame"""
    spread: Tensor
    """[1, 2] float32 standard deviations of position (m) and heading (rad)"""
    latent: Tensor
    """[1, D, side, side] int8 of the prior, in steps of 1 / LATENT_SCALE"""
    evidence: Tensor
    """[1, 1, side, side] int16: the bits of the prior's uint16, in steps of 1 / EVIDENCE_SCALE"""


class Outputs(NamedTuple):
    """What a network makes of a frame; without a prior only the first three."""

    logits: Tensor
    """[1, 3, rows, cols] of the classes, over the layer grid"""
    probabilities: Tensor
    """[1, 3, rows, cols] float32 in 0..1"""
    finite: Tensor
    """[] bool: False when anything is NaN or infinite; nothing may be stored then"""
    known: Tensor | None = None
    """[1, 1, feature rows, feature cols] float32 evidence under each cell, this frame's included"""
    latent: Tensor | None = None
    """[1, D, side, side] int8 as in :class:`Inputs`, updated"""
    evidence: Tensor | None = None
    """[1, 1, side, side] int16 as in :class:`Inputs`, updated"""
    seen: Tensor | None = None
    """[1, 1, side, side] bool: cells that this frame covers"""
    found: Tensor | None = None
    """[1, 4, 3] float32 what the pose search found: offset, spread, measured and error of
    :class:`nmp.model.fusion.Alignment`"""


class Answer(NamedTuple):
    """The same on the host, for one frame. The arrays are those of the runner: its next call overwrites them."""

    probabilities: NDArray[np.float32]
    """[3, rows, cols]"""
    finite: bool
    known: NDArray[np.float32] | None
    """[feature rows, feature cols]"""
    latent: NDArray[np.int8] | None
    """[D, side, side]"""
    evidence: NDArray[np.uint16] | None
    """[side, side]"""
    seen: NDArray[np.bool_] | None
    """[side, side]"""
    found: NDArray[np.float32] | None
    """[4, 3]; None without a search"""


def choose_device(name: str) -> torch.device:
    """Return the device that ``cpu``, ``cuda``, ``cuda:1`` ... or ``auto`` (a GPU where there is one) means.

    Raises :class:`NmpError` for other names, and for a GPU that is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise NmpError(f"device {name!r} is unknown: choose {', '.join(DEVICES)} or cuda:1")
    if kind == "cuda" and not available:
        raise NmpError(
            "device cuda: there is no GPU that torch can use: choose device cpu, or check the driver (nvidia-smi) and "
            "that torch is built for CUDA"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise NmpError(f"device {name}: this machine has {torch.cuda.device_count()} GPU(s): choose a lower number")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that fp32, bf16 or auto (bfloat16 where the device computes in it) means on this device.

    Raises :class:`NmpError` for other names.
    """
    if name not in PRECISIONS:
        raise NmpError(f"precision {name!r} is unknown: choose {', '.join(PRECISIONS)}")
    if name == "auto":
        # Older GPUs and CPUs emulate it, slower than float32.
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = device.type == "cpu" and _cpu_computes_in_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32 if name == "fp32" else torch.bfloat16


def _cpu_computes_in_bfloat16() -> bool:
    """Whether the CPU has instructions for it (AVX512_BF16 or AMX): a third of the time is saved."""
    # torch knows, but has no public name for it yet; where the name is gone, float32 is the safe answer
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(ask()) for ask in known if ask is not None)


def window_side(config: NetworkConfig) -> int:
    """Return the rows (= columns) of the block of prior cells that holds the BEV region at any heading."""
    return 2 * math.ceil(config.feature_grid.reach / config.prior_cell) + 2


def prepare(network: BEVNetwork, device: torch.device | str = "cpu", precision: str = "fp32") -> BEVNetwork:
    """Make a network ready to run, in place: on the device, batch statistics folded into the convolutions before them.

    With bf16 the weights of convolutions are converted once, not in every frame. Such a network can no longer
    be trained or saved.
    """
    device = torch.device(device)
    network.eval().requires_grad_(False)
    fold_batch_norms(network)
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if choose_precision(precision, device) == torch.bfloat16:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.to(torch.bfloat16)
    return network


def fold_batch_norms(module: nn.Module) -> int:
    """Fold every batch norm that is registered right after a convolution into it, in place; return how many were.

    All networks of nmp use them in the order in which they are registered. In evaluation mode nothing but the
    rounding of the results changes.
    """
    count = 0
    for parent in module.modules():
        children = list(parent.named_children())
        for (first, convolution), (second, norm) in zip(children, children[1:], strict=False):
            if (
                isinstance(convolution, nn.Conv2d)
                and isinstance(norm, nn.BatchNorm2d)
                and norm.num_features == convolution.out_channels
            ):
                setattr(parent, first, nn.utils.fuse_conv_bn_eval(convolution, norm))
                setattr(parent, second, nn.Identity())
                count += 1
    return count


class Program:
    """A function of tensors at fixed places on a device, run eagerly, compiled, or recorded as a CUDA graph.

    :param function: called with ``inputs``; it may not wait for the device, nor make tensors from host memory
    :param inputs: whoever runs the program copies new values into these tensors
    :param compiled: ``torch.compile`` it first; on a CPU this is left out
    :param graph: record it once and replay it: nothing but the kernels costs time then; on a CPU this is left out

    Raises :class:`NmpError` when it cannot be compiled, or does not fit into the GPU's memory.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        *,
        compiled: bool = False,
        graph: bool = False,
    ) -> None:
        self.inputs = tuple(inputs)
        device = self.inputs[0].device
        on_gpu = device.type == "cuda"
        self._function = torch.compile(function, dynamic=False) if compiled and on_gpu else function
        self._graph: torch.cuda.CUDAGraph | None = None
        try:
            if on_gpu:
                self._warm_up(device)
                if graph:
                    self._record(device)
                torch.cuda.synchronize(device)
            else:
                self.run()  # the first call prepares its kernels, and no frame should wait for that
        except torch.OutOfMemoryError as error:
            raise NmpError(f"the network does not fit into the memory of {device}: choose a smaller one") from error
        except Exception as error:
            if not compiled:
                raise
            why = " ".join(str(error).split())[:200]
            raise NmpError(f"torch.compile failed ({why}): run without compile, or install a C compiler") from error

    @torch.no_grad()
    def _warm_up(self, device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)

    @torch.no_grad()
    def _record(self, device: torch.device) -> None:
        recorded = torch.cuda.CUDAGraph()
        # Threads of others may use the GPU meanwhile.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(recorded, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
        ):
            self._recorded = self._function(*self.inputs)
        self._graph = recorded

    @torch.no_grad()
    def run(self) -> Any:
        """Compute; on a GPU this only queues the work. A recording writes to the same tensors each time."""
        if self._graph is not None:
            self._graph.replay()
            return self._recorded
        return self._function(*self.inputs)


class OneFrame:
    """What is computed for a frame, on tensors that are on the network's device already.

    :param dtype: bfloat16 for convolutions and products, float32 for everything; geometry and the prior are float32
    """

    def __init__(self, network: BEVNetwork, dtype: torch.dtype) -> None:
        self.network = network
        self.dtype = dtype
        device = network.mean.device
        self._origin = torch.zeros(1, 2, device=device)  # poses count from the corner of the window
        self._region = torch.ones(1, 1, *network.config.feature_grid.shape, device=device)

    def encode(self, images: Tensor, pixel_from_base: Tensor, present: Tensor) -> Tensor:
        """Images to BEV features (see :meth:`BEVNetwork.encode`); tensors on the device, as in :class:`Inputs`."""
        with self.autocast():
            return self.network.encode(images.permute(0, 1, 4, 2, 3), pixel_from_base, present)

    def alone(self, bev: Tensor) -> Outputs:
        """Map BEV features without a prior."""
        with self.autocast():
            logits = self.network.alone(bev).logits.float()
        return Outputs(logits, torch.sigmoid(logits), torch.isfinite(logits).all())

    def with_prior(self, bev: Tensor, pose: Tensor, spread: Tensor, latent: Tensor, evidence: Tensor) -> Outputs:
        """Map BEV features with a prior, and update it; the others are as in :class:`Inputs`, on the device."""
        config = self.network.config
        memory = read_quantized(latent, evidence)
        with self.autocast():
            output, memory = self.network.step(bev, memory, pose, self._origin, spread=spread)
        logits = output.logits.float()
        found = None
        if output.alignment is not None:
            pose = fusion.moved(pose, output.alignment.offset.float())
            found = torch.stack(output.alignment[:4], dim=1).float()
        grid, cell = config.feature_grid, config.prior_cell
        rows, cols = evidence.shape[-2:]
        covered = fusion.ego_to_map(self._region, pose, grid, self._origin, cell, rows, cols)
        return Outputs(
            logits,
            torch.sigmoid(logits),
            torch.isfinite(logits.sum() + memory.latent.sum()),  # a sum is finite where all its terms are
            fusion.map_to_ego(memory.evidence.float(), pose, grid, self._origin, cell),
            *quantize(memory),
            covered > 0,
            found,
        )

    def autocast(self) -> torch.autocast:
        """Return the context that the network computes in."""
        # Weights that are not converted yet are converted in place in the recording: nothing to keep between frames.
        enabled = self.dtype != torch.float32
        return torch.autocast(self._origin.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


class Runner:
    """Runs a prepared network on frames of one shape.

    :param network: after :func:`prepare`, on its device
    :param side: rows and columns of the window of the prior; None to run without a prior
    :param precision: fp32 or bf16 (convolutions and products; geometry and the prior stay float32)
    :param compiled: see :class:`Program`
    :param graph: see :class:`Program`

    Raises what :class:`Program` raises.
    """

    def __init__(
        self,
        network: BEVNetwork,
        *,
        side: int | None,
        precision: str = "fp32",
        compiled: bool = False,
        graph: bool = True,
    ) -> None:
        self.network = network
        self.side = side
        self.device = network.mean.device
        frame = OneFrame(network, choose_precision(precision, self.device))
        on_gpu = self.device.type == "cuda"
        # Pinned memory, from which the GPU fetches by itself. On a CPU both are the same tensors.
        example = list(example_inputs(network, side))[: None if side is not None else _SEEN]
        self._host = [t.pin_memory() for t in example] if on_gpu else example
        self._on_device = [t.to(self.device) for t in self._host]
        ways = {"compiled": compiled, "graph": graph}
        self._encoding = Program(frame.encode, self._on_device[:_SEEN], **ways)
        # where a recording leaves its features, each time
        self._bev = self._encoding.run()
        function = frame.with_prior if side is not None else frame.alone
        self._mapping = Program(function, (self._bev, *self._on_device[_SEEN:]), **ways)
        self._answer: list[Tensor] = []
        if on_gpu:
            # The logits stay where they are: nobody on the host asks for them.
            back = [t for t in self._mapping.run()[1:] if t is not None]
            self._answer = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in back]
        self._done = torch.cuda.Event() if on_gpu else None

    @property
    def window(self) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
        """Latent [D, side, side] and evidence [side, side] of the window, for the caller to fill in."""
        latent, evidence = self._host[_SEEN + 2 :]
        return latent[0].numpy(), evidence[0, 0].numpy().view(np.uint16)

    @torch.no_grad()
    def compute(self) -> Outputs:
        """Map the frame that was uploaded last, once more; on a GPU this only queues the work."""
        self._encode()
        out: Outputs = self._mapping.run()
        return out

    @torch.no_grad()
    def outputs(self, inputs: Inputs) -> Outputs:
        """Map one frame and leave everything on the device; the next frame may overwrite it."""
        for on_device, values in zip(self._on_device, inputs, strict=False):
            on_device.copy_(values)
        return self.compute()

    @torch.no_grad()
    def see(self, images: Tensor, pixel_from_base: Tensor, present: Tensor) -> None:
        """Take the images of a frame, and begin with what needs no prior; a GPU goes on with it by itself.

        :param images: [1, 6, 3, H, W] uint8, the others as in :class:`Inputs`
        """
        given = images.permute(0, 1, 3, 4, 2), pixel_from_base, present
        self._upload(given, slice(0, _SEEN))
        self._encode()

    @torch.no_grad()
    def answer(self, pose: Tensor | None = None, spread: Tensor | None = None) -> Answer:
        """Map the frame that :meth:`see` took, with the prior in :attr:`window`.

        :param pose: [1, 3] as in :class:`Inputs`; with a prior only, as is ``spread`` [1, 2]
        """
        if self.side is not None:
            assert pose is not None and spread is not None
            self._upload((pose, spread), slice(_SEEN, None))
        back = [t for t in self._mapping.run()[1:] if t is not None]
        if self._done is None:
            return _answer(back)
        for answer, out in zip(self._answer, back, strict=True):
            answer.copy_(out, non_blocking=True)
        self._done.record(torch.cuda.current_stream(self.device))
        self._done.synchronize()
        return _answer(self._answer)

    def run(
        self,
        images: Tensor,
        pixel_from_base: Tensor,
        present: Tensor,
        pose: Tensor | None = None,
        spread: Tensor | None = None,
        latent: NDArray[np.int8] | None = None,
        evidence: NDArray[np.uint16] | None = None,
    ) -> Answer:
        """Map one frame: :meth:`see` and :meth:`answer` in one.

        :param latent: [D, side, side] cells of the window; with a prior only, as is ``evidence`` [side, side]
        """
        self.see(images, pixel_from_base, present)
        if self.side is not None:
            assert latent is not None and evidence is not None
            known, weight = self.window
            known[...], weight[...] = latent, evidence
        return self.answer(pose, spread)

    def _encode(self) -> None:
        bev = self._encoding.run()
        if bev is not self._bev:  # it was not recorded
            self._bev.copy_(bev)

    def _upload(self, given: Sequence[Tensor], where: slice) -> None:
        """Bring inputs to the device: those given, and what others have put into the rest of them."""
        for host, values in zip(self._host[where], given, strict=False):
            host.copy_(values)
        if self._done is not None:
            for on_device, host in zip(self._on_device[where], self._host[where], strict=True):
                on_device.copy_(host, non_blocking=True)


def _answer(parts: Sequence[Tensor]) -> Answer:
    probabilities, finite = parts[0][0].numpy(), bool(parts[1])
    if len(parts) == 2:
        return Answer(probabilities, finite, None, None, None, None, None)
    known, latent, evidence, seen, *found = (t[0].numpy() for t in parts[2:])
    return Answer(
        probabilities, finite, known[0], latent, evidence[0].view(np.uint16), seen[0], found[0] if found else None
    )


def read_quantized(latent: Tensor, evidence: Tensor) -> fusion.Memory:
    """Return the cells that a prior stores as numbers.

    :param latent: [B, D, rows, cols] int8
    :param evidence: [B, 1, rows, cols] int16, the bits of uint16
    """
    # torch computes little in uint16
    counts = evidence.int() & 0xFFFF
    return fusion.Memory(latent / fusion.LATENT_SCALE, counts / fusion.EVIDENCE_SCALE)


def quantize(memory: fusion.Memory) -> tuple[Tensor, Tensor]:
    """Return cells as a prior stores them: the inverse of :func:`read_quantized`."""
    latent = (memory.latent.float() * fusion.LATENT_SCALE).round_().clamp_(-127, 127).to(torch.int8)
    counts = (memory.evidence.float() * fusion.EVIDENCE_SCALE).round().clamp(0, 65535).int()
    return latent, torch.where(counts > 32767, counts - 65536, counts).to(torch.int16)


def example_inputs(network: BEVNetwork, side: int | None, seed: int | None = None) -> Inputs:
    """Return a frame of six cameras around the car, on the host.

    :param side: as in :class:`Runner`; with None the last three are empty
    :param seed: of noise in the images and of what earlier frames left in the window; None for black and nothing
    """
    config = network.config
    n = len(CAMERAS)
    rng = np.random.default_rng(seed)
    images = np.zeros((1, n, config.input_height, config.input_width, 3), np.uint8)
    cells = side or 0
    latent = np.zeros((1, network.state_channels, cells, cells), np.int8)
    evidence = np.zeros((1, 1, cells, cells), np.uint16)
    if seed is not None:
        images = rng.integers(0, 256, images.shape, np.uint8)
        latent = rng.integers(-127, 128, latent.shape, np.int8)
        # Half of the window was never seen.
        most = round(config.evidence_cap * fusion.EVIDENCE_SCALE)
        evidence = rng.integers(1, most, evidence.shape).astype(np.uint16)
        evidence[..., : cells // 2] = 0
        latent[..., : cells // 2] = 0
    middle = cells / 2 * config.prior_cell
    return Inputs(
        torch.from_numpy(images),
        example_projection(config),
        torch.ones(1, n),
        torch.tensor([[middle, middle, 0.0 if seed is None else 0.6]]),
        torch.tensor([[0.2, 0.02]]),
        torch.from_numpy(latent),
        torch.from_numpy(evidence.view(np.int16)),
    )


def compare(
    network: BEVNetwork,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    graph: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Return how far a way of running is from the plain network run eagerly in float32 on the same device.

    Each value is ||delta|| / ||reference|| over all elements: of the logits, of the stored latents and of the
    evidence, for a frame of noise on a half known window.

    :param network: as loaded; it stays as it is
    """
    side = window_side(network.config)
    device = torch.device(device)
    plain = copy.deepcopy(network).to(device).eval().requires_grad_(False)
    prepared = prepare(copy.deepcopy(network), device, precision)
    inputs = example_inputs(network, side, seed)
    # Otherwise the reference itself would have the ten bits of TF32.
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        reference = Runner(plain, side=side, graph=False).outputs(inputs)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    found = Runner(prepared, side=side, precision=precision, compiled=compiled, graph=graph).outputs(inputs)
    return output_difference(found, reference)


def output_difference(found: Outputs, expected: Outputs) -> dict[str, float]:
    """Return ||delta|| / ||expected|| over all elements: of the logits, the stored latents and the stored evidence."""
    assert found.latent is not None and found.evidence is not None
    assert expected.latent is not None and expected.evidence is not None
    cells, cells_expected = (
        read_quantized(latent, evidence)
        for latent, evidence in ((found.latent, found.evidence), (expected.latent, expected.evidence))
    )
    pairs = {
        "logits": (found.logits, expected.logits),
        "latent": (cells.latent, cells_expected.latent),
        "evidence": (cells.evidence, cells_expected.evidence),
    }
    return {name: float((a - b).norm() / b.norm().clamp(min=1e-12)) for name, (a, b) in pairs.items()}
