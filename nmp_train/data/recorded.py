"""Training batches of a nuScenes folder, real or simulated: images are decoded in the workers of the data loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nmp.changelog import local_date
from nmp.errors import NmpError
from nmp.evaluation import CityMaps
from nmp.frame import CAMERAS, CameraShot
from nmp.geometry import flatten_to_plane, inverse, transform_from_xyyaw, yaw_of
from nmp.model.preprocess import network_image, network_intrinsics, unit_projection
from nmp_train.data.batch import Batch, GroupLoader
from nmp_train.data.group import Group
from nmp_train.data.sampler import Places, Targets
from nmp_train.data.truth import draw_truth
from nmp_train.recordings import Sample, read_samples

if TYPE_CHECKING:
    from nmp_train.config import StageConfig, TrainConfig

DECODED_AHEAD = 2
"""batches that each worker has ready: 48 samples at 256 x 704 take 156 MB"""


class RecordedSource:
    """Groups of the keyframes of a nuScenes folder, real or simulated."""

    def __init__(
        self,
        dataroot: Path,
        version: str,
        scenes: Sequence[str] | None,
        config: TrainConfig,
        device: torch.device,
        *,
        augmented: bool = True,
    ) -> None:
        """:param scenes: names of those to draw from; None takes all
        :param augmented: False for validation: ego frames are not turned

        Raises :class:`NmpError` for tables, scenes or maps that are missing.
        """
        self.config, self.device = config, device
        self.turn_rad = config.augment.turn_rad if augmented else 0.0
        self.samples = read_samples(dataroot, version, scenes)
        self.maps = CityMaps(dataroot)
        for location in sorted({s.location for s in self.samples}):
            self.maps.city(location)

    def loader(
        self, stage: StageConfig, *, seed: int, length: int, rank: int = 0, ranks: int = 1, start: int = 0
    ) -> GroupLoader:
        """See :meth:`nmp_train.data.batch.Source.loader`."""
        groups = RecordedGroups(
            self.samples, self.maps, self.config, stage, seed=seed, length=length, turn_rad=self.turn_rad
        )
        return GroupLoader(
            groups, stage, self.config.workers, length=length, rank=rank, ranks=ranks, start=start, ahead=DECODED_AHEAD
        )

    def batch(self, group: Group) -> Batch:
        """Take a collated group to the training device."""
        assert group.images is not None, "a group of another source"
        return Batch.of(group, group.images.to(self.device, non_blocking=True).flatten(0, 1), self.device)


class RecordedGroups(Dataset[Group]):
    """Groups of keyframes of one place, in the order of time (see :class:`~nmp_train.data.sampler.Places`)."""

    def __init__(
        self,
        samples: Sequence[Sample],
        maps: CityMaps,
        config: TrainConfig,
        stage: StageConfig,
        *,
        seed: int,
        length: int,
        turn_rad: float = 0.0,
    ) -> None:
        """:param turn_rad: the ego frame of every frame is turned by up to this angle"""
        self.samples, self.maps, self.network = samples, maps, config.network
        self.length, self.turn_rad = length, turn_rad
        places = Places(
            place=np.unique([s.location for s in samples], return_inverse=True)[1],
            xy=np.array([s.anchor.translation[:2] for s in samples]),
            scene=np.unique([s.scene for s in samples], return_inverse=True)[1],
            time_s=np.array([s.anchor.stamp_ns * 1e-9 for s in samples]),
        )
        self.targets = Targets(places, stage, seed, geographic=config.sampler == "geographic")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Group:
        rng = self.targets.generator(index)
        samples = [self.samples[i] for i in self.targets.group(rng, index)]
        turn = rng.uniform(-1, 1, len(samples)) * self.turn_rad
        parts = [self._frame(sample, float(angle)) for sample, angle in zip(samples, turn, strict=True)]
        poses, images, pixel_from_base, truth = zip(*parts, strict=True)
        layers, instance, direction = (None if t[0] is None else torch.stack(t) for t in zip(*truth, strict=True))
        assert layers is not None
        pose = np.array(poses)
        pose[:, :2] -= pose[-1, :2].copy()
        return Group(
            pose=torch.from_numpy(pose).float(),
            drive=torch.from_numpy(np.unique([s.scene for s in samples], return_inverse=True)[1]),
            slope=torch.full((len(samples), 2), torch.nan),
            seed=torch.tensor(int(rng.integers(2**62))),
            pixel_from_base=torch.stack(pixel_from_base),
            present=torch.ones(len(samples), len(CAMERAS)),
            truth=layers,
            names=[s.token for s in samples],
            weather=[s.weather for s in samples],
            labels=[""] * len(samples),
            instance=instance,
            direction=direction,
            images=torch.stack(images),
        )

    def _frame(
        self, sample: Sample, turn: float
    ) -> tuple[list[float], Tensor, Tensor, tuple[Tensor, Tensor | None, Tensor | None]]:
        """Return pose, images, projections and truth of a sample whose ego frame is turned by an angle (rad)."""
        network = self.network
        ego = sample.anchor.map_from_base
        level = flatten_to_plane(ego) @ transform_from_xyyaw(0.0, 0.0, turn)
        level[2, 3] = ego[2, 3]  # the road is under the wheels, whatever the map's datum
        ground_from_map = inverse(level)
        images, projections = [], []
        for shot in sample.shots:
            camera = shot.camera
            try:
                taken = CameraShot(camera, shot.stamp_ns, shot.path.read_bytes(), shot.map_from_base)
                images.append(network_image(taken, network))
            except OSError as error:
                raise NmpError(
                    f"sample {sample.token}: cannot read {shot.path} ({error.strerror}): unpack its images again"
                ) from error
            except NmpError as error:
                raise NmpError(f"sample {sample.token}: {shot.path} is damaged ({error}): unpack it again") from error
            k = network_intrinsics(camera.intrinsics, camera.width, camera.height, network)
            base_from_camera = ground_from_map @ taken.map_from_base @ camera.base_from_camera
            projections.append(unit_projection(k, base_from_camera, network.input_width, network.input_height))
        city = self.maps.city(sample.location, local_date(sample.location, sample.anchor.stamp_ns))
        x, y, yaw = float(ego[0, 3]), float(ego[1, 3]), yaw_of(level)
        return (
            [x, y, yaw],
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(np.stack(projections)).float(),
            draw_truth(city, x, y, yaw, network),
        )
