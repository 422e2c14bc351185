"""Light, air and the state of the cameras: what makes two pictures of one place differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nmp.errors import NmpError

CAMERAS = 6
WORDS = ("day", "rain", "night")
MIX = {"day": 0.7, "rain": 0.2, "night": 0.1}
"""shares of kinds of weather, in the order of ``WORDS``, about as in nuScenes"""


@dataclass
class Weather:
    """Conditions of B samples, in linear light where a sunlit white wall has a radiance of about 1."""

    sun: Tensor
    """[B, 3] unit vector towards the sun, map frame"""
    sunlight: Tensor
    """[B] strength of the direct light"""
    ambient: Tensor
    """[B] strength of the light of the sky"""
    sun_rgb: Tensor
    """[B, 3] colour of the direct light"""
    sky_rgb: Tensor
    """[B, 3] colour of the light of the sky"""
    clouds: Tensor
    """[B] 0 clear .. 1 closed cover"""
    haze: Tensor
    """[B] 1 / visibility, 1 / m"""
    spray: Tensor
    """[B] water in the air near the road, 1 / m"""
    wet: Tensor
    """[B] 0 dry .. 1 wet: the ground mirrors what stands on it"""
    headlights: Tensor
    """[B] 0 by day, 1 at night: lamps are lit and windows shine"""
    street: Tensor
    """[B] strength of street lamps"""
    lamp_rgb: Tensor
    """[B, 3] colour of street lamps"""
    phase: Tensor
    """[B, 2] 0..1, where the patterns of clouds, leaves and puddles begin"""
    exposure: Tensor
    """[B, 6] gain of each camera"""
    metering: Tensor
    """[B] 0 takes ``exposure`` as it is, 1 brings every image to the same brightness times ``exposure``"""
    tint: Tensor
    """[B, 6, 3] white balance of each camera"""
    noise: Tensor
    """[B] noise of the sensor: standard deviation at radiance 1 in images 1600 pixels wide, less in smaller ones"""
    blur: Tensor
    """[B, 6, 2] standard deviation of the blur along rows and columns, fractions of the image's width"""
    vignette: Tensor
    """[B] light lost in the corners, 0..1"""
    saturation: Tensor
    """[B] 1 keeps colours, 0 is grey"""
    drops: Tensor
    """[B, 6] share of the lens that is covered by drops, 0..1"""
    drops_at: Tensor
    """[B, 6, 2] 0..1, which of the drops"""

    @classmethod
    def clear(cls, count: int) -> Weather:
        """Return ``count`` times plain daylight without sun, seen by perfect cameras."""

        def per_sample(value: float) -> Tensor:
            return torch.full((count,), value)

        return cls(
            sun=torch.tensor([[0.0, 0.0, 1.0]]).repeat(count, 1),
            sunlight=per_sample(0.0),
            ambient=per_sample(0.8),
            sun_rgb=torch.ones(count, 3),
            sky_rgb=torch.ones(count, 3),
            clouds=per_sample(0.0),
            haze=per_sample(1e-5),
            spray=per_sample(0.0),
            wet=per_sample(0.0),
            headlights=per_sample(0.0),
            street=per_sample(0.0),
            lamp_rgb=torch.ones(count, 3),
            phase=torch.zeros(count, 2),
            exposure=torch.ones(count, CAMERAS),
            metering=per_sample(0.0),
            tint=torch.ones(count, CAMERAS, 3),
            noise=per_sample(0.0),
            blur=torch.zeros(count, CAMERAS, 2),
            vignette=per_sample(0.0),
            saturation=per_sample(1.0),
            drops=torch.zeros(count, CAMERAS),
            drops_at=torch.zeros(count, CAMERAS, 2),
        )

    @classmethod
    def sample(cls, count: int, generator: torch.Generator, kind: str | Sequence[str | None] | None = None) -> Weather:
        """Draw the conditions of ``count`` samples.

        :param kind: words out of day, rain and night for all samples, or such words for each sample; None mixes
            them 70 : 20 : 10, like nuScenes
        :raises NmpError: when the words are unknown or there are not ``count`` of them
        """
        kinds = [kind] * count if kind is None or isinstance(kind, str) else list(kind)
        if len(kinds) != count:
            raise NmpError(f"weather for {count} samples needs {count} entries, not {len(kinds)}")
        for words in kinds:
            unknown = set((words or "").split()) - set(WORDS)
            if unknown:
                raise NmpError(f"unknown weather {words!r}: use words out of {', '.join(WORDS)}")

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        def normal(spread: float, *shape: int) -> Tensor:
            return spread * torch.randn(count, *shape, generator=generator)

        draw = uniform(0, 1)

        def drawn(word: str) -> Tensor:
            start = sum(MIX[w] for w in WORDS[: WORDS.index(word)])
            mixed = (draw >= start) & (draw < start + MIX[word])
            return torch.tensor([mixed[i].item() if k is None else word in k.split() for i, k in enumerate(kinds)])

        rain, night = drawn("rain"), drawn("night")
        cover = uniform(0, 1)
        overcast = (cover > 0.68) | rain
        misty = ~rain & (uniform(0, 1) < 0.06)
        # On a quarter of the days the sun is less than 20 degrees above the horizon.
        height = torch.where(uniform(0, 1) < 0.25, uniform(0.12, 0.35), uniform(0.35, 1.2))
        azimuth = uniform(0, 2 * math.pi)
        sun = torch.stack([azimuth.cos() * height.cos(), azimuth.sin() * height.cos(), height.sin()], dim=-1)
        low = (1 - (height - 0.1) / 0.5).clamp(0, 1)[:, None]  # 1: the sun is low
        warm = torch.tensor([1.0, 0.96, 0.90]) * (1 - low) + torch.tensor([1.15, 0.88, 0.62]) * low
        cold = torch.tensor([0.94, 0.98, 1.04]) * (1 - 0.5 * low) + torch.tensor([0.94, 0.96, 1.06]) * 0.5 * low
        grey = torch.tensor([0.97, 1.0, 1.02]).expand(count, 3)
        glow = torch.tensor([1.0, 0.85, 0.75]).expand(count, 3)  # of a city at night
        sunlight = torch.where(overcast, uniform(0.0, 0.15), uniform(1.0, 1.7) * (1 - 0.35 * low[:, 0]))
        ambient = torch.where(overcast, uniform(0.45, 0.85), uniform(0.22, 0.42))
        sodium = (uniform(0, 1) < 0.6)[:, None]
        haze = torch.where(misty, uniform(0.006, 0.015), uniform(0.0, 0.004))
        haze = torch.where(rain, uniform(0.002, 0.011), haze)
        lamp_rgb = torch.where(sodium, torch.tensor([1.0, 0.70, 0.38]), torch.tensor([1.0, 0.95, 0.86]))
        zero = torch.zeros(count)
        # The cameras meter the light themselves, never quite alike, and some pictures come out too dark or too bright.
        extreme = uniform(0, 1)
        gain = torch.where(extreme < 0.07, 0.5, torch.where(extreme > 0.93, 1.8, 1.0)) * normal(0.18).exp()
        gain = gain * torch.where(night, 0.75, 1.0)
        speed = uniform(0, 1)  # nobody knows how fast the car is: motion blur is drawn
        smear = torch.where(night, 0.0022, 0.0006) * speed
        focus = uniform(0.0003, 0.0011) * torch.where(rain, 1.3, 1.0)
        sideways = torch.tensor([0.5, 1.0, 1.0, 0.5, 1.0, 1.0])  # the road rushes past the cameras at the sides
        blur = torch.stack(
            [
                (focus[:, None] ** 2 + (smear[:, None] * sideways) ** 2).sqrt(),
                (focus[:, None] ** 2 + (0.4 * smear[:, None]) ** 2).sqrt().expand(-1, CAMERAS),
            ],
            dim=-1,
        )
        return cls(
            sun=sun,
            sunlight=torch.where(night, zero, sunlight),
            ambient=torch.where(night, uniform(0.012, 0.05), ambient),
            sun_rgb=warm,
            sky_rgb=torch.where(night[:, None], glow, torch.where(overcast[:, None], grey, cold)),
            clouds=torch.where(overcast, torch.ones(count), cover),
            haze=haze,
            spray=torch.where(rain, uniform(0.0, 0.009), zero),
            wet=torch.where(rain, uniform(0.45, 1.0), zero),
            headlights=night.float(),
            street=torch.where(night, uniform(0.1, 0.45), zero),
            lamp_rgb=lamp_rgb,
            phase=uniform(0, 1, 2),
            exposure=gain[:, None] * normal(0.10, CAMERAS).exp(),
            metering=torch.where(night, 0.62, 0.75),
            tint=(normal(0.03, 1, 3) + normal(0.012, CAMERAS, 3)).exp() * torch.tensor([1.0, 1.015, 0.995]),
            noise=torch.where(night, uniform(0.05, 0.11), uniform(0.009, 0.032)),
            blur=blur,
            vignette=uniform(0.0, 0.3),
            saturation=torch.where(rain, uniform(0.45, 0.8), uniform(0.55, 0.95)) * torch.where(night, 0.6, 1.0),
            drops=torch.where(rain[:, None], uniform(0.0, 1.0, CAMERAS) * uniform(0.2, 1.0, 1), zero[:, None]),
            drops_at=uniform(0, 1, CAMERAS, 2),
        )

    def to(self, device: torch.device | str) -> Weather:
        """Return it on a device; a copy to a GPU does not wait for what the GPU is doing."""
        pin = torch.device(device).type == "cuda"

        def moved(value: Tensor) -> Tensor:
            return (value.pin_memory() if pin else value).to(device, non_blocking=True)

        return Weather(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})
