"""The fusion of Neural Map Prior (Xiong et al., CVPR 2023): attention to the prior, then a recurrent update of it.

A cell of the map holds the hidden state of a convolutional GRU. Every frame gathers the state into the ego frame,
attends to it, updates it, decodes it and puts it back. What differs from the published code is listed here, once:

- Cells that nobody has seen are masked along the axis of the keys. The published mask is added along the queries,
  where the softmax does not see it.
- Position embeddings steer the attention and the gates, but are not part of what is stored: they belong to the ego
  frame, and a cell is read again from other sides.
- The state is put back by looking up, for each cell of the map, the ego cell that covers it. Scattering each ego cell
  to the map, as the published code does, leaves up to 17 % of the covered cells unwritten at 45 degrees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.errors import NmpError
from nmp.model.config import NetworkConfig
from nmp.model.fusion.align import Alignment
from nmp.model.fusion.geometry import ego_to_map, map_to_ego
from nmp.model.fusion.memory import Memory

WINDOW = 10
"""edge of an attention window, cells"""
HEADS = 8
AVERAGE_SHARE = 0.5
"""what a frame counts against the prior in the moving average that stands in for the GRU"""

ABLATION: dict[str, dict[str, bool]] = {
    "moving average": {"prior_attention": False, "prior_gru": False, "prior_position": False},
    "GRU": {"prior_attention": False, "prior_gru": True, "prior_position": False},
    "attention": {"prior_attention": True, "prior_gru": False, "prior_position": False},
    "GRU + position": {"prior_attention": False, "prior_gru": True, "prior_position": True},
    "GRU + attention": {"prior_attention": True, "prior_gru": True, "prior_position": False},
    "all": {"prior_attention": True, "prior_gru": True, "prior_position": True},
}
"""settings of a :class:`~nmp.model.config.NetworkConfig` for each row of the paper's table of fusion parts"""


class Position(nn.Module):
    """Learned embedding of the place in the ego frame: one half of the channels by column, the other by row."""

    def __init__(self, rows: int, cols: int, channels: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.empty(channels // 2, rows, 1))
        self.col = nn.Parameter(torch.empty(channels // 2, 1, cols))
        nn.init.normal_(self.row, std=0.1)
        nn.init.normal_(self.col, std=0.1)

    def forward(self) -> Tensor:
        """Return [1, C, rows, cols]."""
        rows, cols = self.row.shape[1], self.col.shape[2]
        return torch.cat([self.col.expand(-1, rows, -1), self.row.expand(-1, -1, cols)])[None]


class PriorAttention(nn.Module):
    """Current-to-prior cross-attention in windows of 10 x 10 cells (Liu et al., ICCV 2021), 8 heads.

    Queries are the current features, keys and values the prior's. Normalisation and feed-forward follow the published
    layer: norm(attention), residual, norm, feed-forward of twice the width, residual, norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels)
        # A bias here would add the same to all keys of a query, which softmax takes out again.
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.norm_attended = nn.LayerNorm(channels)
        self.norm_sum = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.norm_out = nn.LayerNorm(channels)

    def attend(
        self, bev: Tensor, prior: Tensor, seen: Tensor, bev_position: Tensor | None, prior_position: Tensor | None
    ) -> Tensor:
        """What the prior adds to the features, cut into windows: [B * windows, cells, C].

        Cells that are not seen have no influence. A window without any seen cell gives exactly zero, and no gradient.

        :param bev: [B, C, rows, cols]
        :param prior: [B, C, rows, cols], finite
        :param seen: [B, 1, rows, cols] bool
        :param bev_position: [1, C, rows, cols] added to the queries' input, or None
        :param prior_position: [1, C, rows, cols] added to the keys' input, or None
        """
        query = self.query(_windows(bev if bev_position is None else bev + bev_position))
        key = self.key(_windows(prior if prior_position is None else prior + prior_position))
        value = self.value(_windows(prior))
        open_keys = _windows(seen.to(bev.dtype))[..., 0] > 0
        some = open_keys.any(dim=1, keepdim=True)
        # A softmax over no key at all is NaN: such windows attend to everything, and the result is thrown away.
        mask = (open_keys | ~some)[:, None, None, :]
        query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        attended = self.norm_attended(self.out(mixed))
        return torch.where(some[..., None], attended, 0.0)

    def forward(
        self, bev: Tensor, prior: Tensor, seen: Tensor, bev_position: Tensor | None, prior_position: Tensor | None
    ) -> Tensor:
        """Return the features [B, C, rows, cols] with the prior's added; parameters as in :meth:`attend`."""
        x = self.norm_sum(_windows(bev) + self.attend(bev, prior, seen, bev_position, prior_position))
        x = self.norm_out(x + self.feed_forward(x))
        return _unwindow(x, bev.shape[0], *bev.shape[-2:])


def _windows(x: Tensor) -> Tensor:
    """Cut [B, C, rows, cols] into windows [B * windows, cells, C]; zeros fill up the last ones."""
    below, beside = -x.shape[2] % WINDOW, -x.shape[3] % WINDOW
    if below or beside:
        x = functional.pad(x, (0, beside, 0, below))
    x = x.unflatten(3, (-1, WINDOW)).unflatten(2, (-1, WINDOW))  # [B, C, down, window, across, window]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)


def _unwindow(x: Tensor, batch: int, rows: int, cols: int) -> Tensor:
    """Undo :func:`_windows`; the channels stay last in memory, where the convolutions that follow want them."""
    down, across = -(-rows // WINDOW), -(-cols // WINDOW)
    x = x.unflatten(1, (WINDOW, WINDOW)).unflatten(0, (batch, down, across))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, rows, cols, C]
    return x[:, :rows, :cols].permute(0, 3, 1, 2)


class ConvGRU(nn.Module):
    """Gated recurrent unit (Cho et al., EMNLP 2014) whose matrices are 3 x 3 convolutions without bias.

    z = sigmoid(Wz [h, x]), r = sigmoid(Wr [h, x]), q = tanh(Wq [r h, x]), h' = (1 - z) h + z q. The convolutions of
    a concatenation are sums of convolutions, so those over the same input are one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.from_input = nn.Conv2d(channels, 3 * channels, 3, 1, 1, bias=False)
        self.from_state = nn.Conv2d(channels, 2 * channels, 3, 1, 1, bias=False)
        self.from_reset = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)

    def forward(self, state: Tensor, x: Tensor, shown: Tensor | None = None) -> Tensor:
        """Return the next state [B, C, rows, cols], in -1..1 when the state is.

        :param state: [B, C, rows, cols] h in the last formula: what is carried over
        :param x: [B, C, rows, cols]
        :param shown: [B, C, rows, cols] h in the other formulas, where it is not the state itself
        """
        shown = state if shown is None else shown
        input_z, input_r, input_q = self.from_input(x).chunk(3, dim=1)
        state_z, state_r = self.from_state(shown).chunk(2, dim=1)
        update = torch.sigmoid(input_z + state_z)
        reset = torch.sigmoid(input_r + state_r)
        candidate = torch.tanh(input_q + self.from_reset(reset * shown))
        # The state is carried over many frames: half precision would wear it away.
        return torch.lerp(state, candidate.to(state.dtype), update.to(state.dtype))


class PaperFusion(nn.Module):
    """Reads, fuses and writes the prior as Neural Map Prior does; its parts can be switched off for comparison.

    Evidence of a cell is the number of frames that wrote it.
    """

    def __init__(self, config: NetworkConfig) -> None:
        """Raise :class:`NmpError` where the configuration asks for parts that do not fit together."""
        super().__init__()
        channels = config.bev_channels
        for key in ("align", "slopes"):
            if getattr(config, key):
                raise NmpError(f"network configuration: {key} works with fusion evidence only: set {key} to false")
        if channels % HEADS:
            raise NmpError(
                f"network configuration: bev_channels must be a multiple of {HEADS} with fusion paper, got {channels}"
            )
        if config.prior_position and not (config.prior_attention or config.prior_gru):
            raise NmpError(
                "network configuration: prior_position needs prior_attention or prior_gru: a moving average has no use "
                "for positions"
            )
        self.config = config
        self.state_channels = channels
        self.aligner = None
        self.leveller = None
        self.attention = PriorAttention(channels) if config.prior_attention else None
        self.gru = ConvGRU(channels) if config.prior_gru else None
        shape = config.feature_grid.shape
        self.bev_position = Position(*shape, channels) if config.prior_position else None
        self.prior_position = Position(*shape, channels) if config.prior_position else None

    def opened(self, memory: Memory) -> Tensor:
        """Return the cells [B, C + 1, rows, cols] that are looked up: latent and evidence."""
        return torch.cat([memory.latent.float(), memory.evidence.float()], dim=1)

    def locate(
        self, bev: Tensor, cells: Tensor, pose: Tensor, origin: Tensor, spread: Tensor | None = None
    ) -> Alignment | None:
        """The paper takes the pose as it is: always None."""
        return None

    def read(self, cells: Tensor, pose: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the nearest cells into the ego frame: latent [B, C, rows, cols], evidence [B, 1, rows, cols].

        :param cells: as :meth:`opened` returned them
        """
        net = self.config
        found = map_to_ego(cells, pose, net.feature_grid, origin, net.prior_cell, "nearest")
        return found[:, :-1], found[:, -1:]

    def level(self, bev: Tensor, latent: Tensor, evidence: Tensor) -> tuple[Tensor, None]:
        """Return the features as they are: this fusion does not look for slopes."""
        return bev, None

    def fuse(self, bev: Tensor, latent: Tensor, evidence: Tensor, alignment: Alignment | None = None) -> Tensor:
        """Return the next state [B, C, rows, cols] in -1..1, which is also what is decoded.

        :param bev: [B, C, rows, cols] of the encoder
        :param latent: [B, C, rows, cols] as :meth:`read` returned it; where there is no evidence its value is ignored
        :param evidence: [B, 1, rows, cols]
        """
        seen = evidence > 0
        prior = torch.where(seen, latent, 0.0)
        x = bev
        bev_position = None if self.bev_position is None else self.bev_position()
        prior_position = None if self.prior_position is None else self.prior_position()
        if self.attention is not None:
            x = self.attention(x, prior, seen, bev_position, prior_position)
        if self.gru is None:
            current = torch.tanh(x.float())
            return torch.where(seen, torch.lerp(prior, current, AVERAGE_SHARE), current)
        shown = None
        if bev_position is not None and prior_position is not None:
            x = x + bev_position
            shown = torch.where(seen, prior + prior_position, 0.0)
        out: Tensor = self.gru(prior, x, shown)
        return out

    def write(
        self,
        cells: Tensor,
        bev: Tensor,
        features: Tensor,
        pose: Tensor,
        origin: Tensor,
        alignment: Alignment | None = None,
        repeat: Tensor | None = None,
    ) -> Memory:
        """Put the state back into the cells that the ego region covers; the others stay as they were.

        Each cell of the map looks up the ego cell at its centre, so that none is left out at any heading.

        :param cells: as :meth:`opened` returned them
        :param features: [B, C, rows, cols] as :meth:`fuse` returned them
        :param repeat: [B] how many frames this one counts as, None for one
        """
        net = self.config
        rows, cols = cells.shape[-2:]

        def turned(values: Tensor) -> Tensor:
            return ego_to_map(values, pose, net.feature_grid, origin, net.prior_cell, rows, cols, "nearest")

        frames = features.new_ones(len(features), 1, *features.shape[-2:], dtype=torch.float32)
        covered = turned(frames) > 0
        count = 1.0 if repeat is None else repeat[:, None, None, None]
        latent, evidence = cells[:, :-1], cells[:, -1:]
        return Memory(
            torch.where(covered, turned(features.float()), latent),
            torch.where(covered, (evidence + count).clamp(max=net.evidence_cap), evidence),
        )
