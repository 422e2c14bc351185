"""BEVFormer (Li et al., ECCV 2022) without its temporal part: BEV queries that attend to the images.

Time is the business of the prior, so the self-attention looks at the BEV of this frame only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nmp.errors import NmpError
from nmp.frame import CAMERAS
from nmp.model.config import NetworkConfig
from nmp.model.views.base import NEAR_PLANE_M, View, project

HEIGHTS_M = (-1.0, 0.0, 1.0, 2.0)
"""above the ground: where a query looks"""
QUERY_CELLS = 2
"""feature cells along the edge of a query's cell"""
CAMERAS_PER_QUERY = 2
"""cameras that a query attends to at most; in a surround rig no more than two see the same place"""


def deformable_attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples (Zhu et al., Deformable DETR, ICLR 2021; one level).

    :param value: [B, heads, D, h, w]
    :param locations: [B, heads, Q, S, 2] x, y of the samples; 0..1 spans the map, outside it is zero
    :param weights: [B, heads, Q, S]
    :return: [B, Q, heads * D], in the type of ``locations``: in half precision they would be off by a pixel
    """
    b, heads, depth, _, _ = value.shape
    queries = locations.shape[2]
    with torch.autocast(value.device.type, enabled=False):
        samples = functional.grid_sample(
            value.flatten(0, 1).to(locations.dtype), 2 * locations.flatten(0, 1) - 1, align_corners=False
        )
        out = (samples * weights.to(locations.dtype).flatten(0, 1)[:, None]).sum(-1)  # [B heads, D, Q]
    return out.view(b, heads * depth, queries).transpose(1, 2)


class Seen(NamedTuple):
    """Where the cameras see the queries: Q queries, each with the same number of slots for cameras."""

    uv: Tensor
    """[B, Q, slots, heights, 2] image coordinates, 0..1 spans the image"""
    camera: Tensor
    """[B, Q, slots] index of the camera, as a float"""
    share: Tensor
    """[B, Q, slots] of the camera in the query's average; zero for a camera that does not see it"""


def find_cameras(points: Tensor, pixel_from_base: Tensor, present: Tensor) -> Seen:
    """Find for every query the ``CAMERAS_PER_QUERY`` cameras that have it most central.

    A camera sees a query when one of its heights lies inside the image. The number of slots is fixed so that
    shapes do not depend on the calibration, which compiled and captured graphs need.

    :param points: [Q, heights, 4] homogeneous points of the base frame, m
    :param pixel_from_base: [B, N, 3, 4]
    :param present: [B, N]
    """
    b, n = present.shape
    uv, depth = project(points, pixel_from_base.flatten(0, 1))
    off_axis = (2 * uv - 1).abs().amax(dim=-1).masked_fill(depth <= NEAR_PLANE_M, torch.inf)
    off_axis = off_axis.amin(dim=-1).unflatten(0, (b, n)).masked_fill(~(present > 0)[..., None], torch.inf)
    best, camera = off_axis.topk(min(CAMERAS_PER_QUERY, n), dim=1, largest=False)  # [B, slots, Q]
    hit = (best < 1).float()
    share = hit / hit.sum(dim=1, keepdim=True).clamp(min=1)
    # Points behind the camera are put far outside, where all samples are zero.
    uv = torch.where((depth > NEAR_PLANE_M)[..., None], uv, -2).clamp(-2, 3).unflatten(0, (b, n))
    uv = uv.gather(1, camera[..., None, None].expand(-1, -1, -1, *uv.shape[3:]))
    return Seen(uv.transpose(1, 2), camera.transpose(1, 2).float(), share.transpose(1, 2))


class DeformableAttention(nn.Module):
    """Queries sample values at learned offsets from their reference points, weighted by a softmax per head."""

    def __init__(self, channels: int, heads: int, anchors: int, points: int) -> None:
        """:param anchors: reference points of a query; each head samples ``points`` points around each of them"""
        super().__init__()
        self.heads, self.anchors, self.points = heads, anchors, points
        self.offsets = nn.Linear(channels, heads * anchors * points * 2)
        self.weights = nn.Linear(channels, heads * anchors * points)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        # As in Deformable DETR: each head starts by looking into a direction of its own, point k at k pixels.
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None] * directions[:, None, None, :]  # [heads, 1, points, 2]
        with torch.no_grad():
            self.offsets.bias.copy_(steps.expand(heads, anchors, points, 2).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(zero)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def sampling(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(offsets [B, heads, Q, anchors, points, 2] in pixels, weights [B, heads, Q, anchors, points] of sum 1)."""
        b, q, _ = query.shape
        offsets = self.offsets(query).float().view(b, q, self.heads, self.anchors, self.points, 2).transpose(1, 2)
        logits = self.weights(query).float().view(b, q, self.heads, self.anchors * self.points).transpose(1, 2)
        return offsets, logits.softmax(dim=-1).unflatten(-1, (self.anchors, self.points))

    def split(self, values: Tensor) -> Tensor:
        """Project values [B, h, w, C] and split them into heads: [B, heads, C / heads, h, w]."""
        return self.value(values).unflatten(-1, (self.heads, -1)).permute(0, 3, 4, 1, 2)


class SelfAttention(DeformableAttention):
    """Deformable attention of the BEV queries to each other."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__(channels, heads, 1, points)

    def forward(self, query: Tensor, position: Tensor, reference: Tensor) -> Tensor:
        """:param query: [B, rows, cols, C]; :param reference: [rows, cols, 2] centres of the queries in 0..1"""
        rows, cols = reference.shape[:2]
        offsets, weights = self.sampling((query + position).flatten(1, 2))
        locations = reference.view(-1, 1, 2) + offsets[:, :, :, 0] / offsets.new_tensor([cols, rows])
        attended = deformable_attention(self.split(query), locations, weights[:, :, :, 0])
        out: Tensor = self.out(attended)
        return out.unflatten(1, (rows, cols))


class CameraAttention(DeformableAttention):
    """Spatial cross-attention: deformable attention to the cameras that see the query, averaged over them."""

    def forward(self, query: Tensor, images: Tensor, seen: Seen) -> Tensor:
        """:param query: [B, rows, cols, C]; :param images: [B, N, h, w, C]"""
        b, n, height, width, _ = images.shape
        rows, cols = query.shape[1:3]
        offsets, weights = self.sampling(query.flatten(1, 2))
        # The cameras' images stand on top of each other, a row of zeros above each of them: one look-up reads
        # all, and a sample that leaves its image finds zeros, as beyond the edge of a single image.
        value = functional.pad(self.split(images.flatten(0, 1)), (0, 0, 1, 0))
        value = value.unflatten(0, (b, n)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
        # [B, heads, Q, slots, anchors, points] from [B, 1, Q, slots, anchors, 1] and [B, heads, Q, 1, anchors, points]
        x = seen.uv[:, None, :, :, :, None, 0] + offsets[:, :, :, None, ..., 0] / width
        y = seen.uv[:, None, :, :, :, None, 1] * height + offsets[:, :, :, None, ..., 1]
        first = seen.camera[:, None, :, :, None, None] * (height + 1) + 1
        y = (first + y.clamp(-0.5, height + 0.5)) / (n * (height + 1))
        locations = torch.stack([x, y], dim=-1).flatten(3, 5)
        shared = (weights[:, :, :, None] * seen.share[:, None, :, :, None, None]).flatten(3, 5)
        out: Tensor = self.out(deformable_attention(value, locations, shared))
        return out.unflatten(1, (rows, cols))


class Layer(nn.Module):
    """Self-attention, cross-attention, feed-forward; each added to its input and normalised."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(channels, heads, points)
        self.camera_attention = CameraAttention(channels, heads, len(HEIGHTS_M), points)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.ReLU(inplace=True), nn.Linear(2 * channels, channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(self, query: Tensor, position: Tensor, reference: Tensor, images: Tensor, seen: Seen) -> Tensor:
        query = self.norms[0](query + self.self_attention(query, position, reference))
        query = self.norms[1](query + self.camera_attention(query + position, images, seen))
        out: Tensor = self.norms[2](query + self.feed_forward(query))
        return out


class BevFormer(View):
    """``config.view_layers`` layers of attention from learned BEV queries to image features (stride 8).

    A query stands for a square of ``QUERY_CELLS`` x ``QUERY_CELLS`` feature cells, and the result is interpolated:
    a quarter of the queries costs a quarter of the time, and the encoder that follows has the full resolution. The
    features come from one pyramid level: it holds the coarser ones already, and each further level would cost as
    many samples again. Set ``checkpoint`` to compute each layer again in the backward pass instead of keeping what
    it sampled.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config, level=1)
        channels = config.neck_channels
        for name, value in (
            ("layers", config.view_layers),
            ("heads", config.view_heads),
            ("points", config.view_points),
        ):
            if value < 1:
                raise NmpError(f"view_{name} is {value}: the bevformer view needs at least one")
        if channels % config.view_heads:
            raise NmpError(f"neck_channels {channels} cannot be split into view_heads {config.view_heads} equal parts")
        self.checkpoint = False
        rows, cols = -(-self.rows // QUERY_CELLS), -(-self.cols // QUERY_CELLS)
        edge = QUERY_CELLS * self.resolution
        x = self.corner[0] + (torch.arange(cols) + 0.5) * edge
        y = self.corner[1] + (torch.arange(rows) + 0.5) * edge
        z = torch.tensor(HEIGHTS_M)
        gy, gx, gz = torch.meshgrid(y, x, z, indexing="ij")
        points = torch.stack([gx, gy, gz, torch.ones_like(gz)], dim=-1).flatten(0, 1)
        self.register_buffer("points", points, persistent=False)  # [Q, heights, 4]
        v, u = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols, indexing="ij")
        self.register_buffer("reference", torch.stack([u, v], dim=-1), persistent=False)
        self.points: Tensor
        self.reference: Tensor
        self.query = nn.Parameter(torch.randn(rows, cols, channels))
        self.row_position = nn.Parameter(torch.rand(rows, 1, channels))
        self.col_position = nn.Parameter(torch.rand(1, cols, channels))
        self.camera_embedding = nn.Parameter(torch.randn(len(CAMERAS), 1, 1, channels) * 0.02)
        self.layers = nn.ModuleList(
            Layer(channels, config.view_heads, config.view_points) for _ in range(config.view_layers)
        )

    def forward(self, features: Tensor, pixel_from_base: Tensor, present: Tensor) -> Tensor:
        """Attend to features, as :class:`View` says: [B, C, rows, cols]; cells that no camera sees have values too.

        Raises :class:`NmpError` for more cameras than the rig has.
        """
        b, n = features.shape[:2]
        if n > len(CAMERAS):
            raise NmpError(f"the bevformer view has embeddings of {len(CAMERAS)} cameras, got {n}")
        images = features.permute(0, 1, 3, 4, 2) + self.camera_embedding[:n]
        seen = find_cameras(self.points, pixel_from_base.to(self.points.dtype), present)
        position = self.row_position + self.col_position
        query = self.query.expand(b, -1, -1, -1)
        for layer in self.layers:
            inputs: tuple[Any, ...] = (query, position, self.reference, images, seen)
            keep = not (self.training and self.checkpoint)
            query = layer(*inputs) if keep else checkpoint(layer, *inputs, use_reentrant=False)
        fine = functional.interpolate(query.permute(0, 3, 1, 2), scale_factor=QUERY_CELLS, mode="bilinear")
        return fine[..., : self.rows, : self.cols]
