"""The demo on scenes of a nuScenes folder, real or one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import city_map, real_film
from report import Report
from stage import Stage, byte_count, drives_table, folder_size, milliseconds

from nmp import draw
from nmp.errors import NmpError
from nmp.evaluation import CityMaps, Evaluation, evaluate
from nmp.metrics import format_table


def scenes_of(dataroot: Path, version: str, chosen: Sequence[str], limit: int) -> list[str]:
    """Return the scenes to drive: those that were asked for, otherwise the first ones."""
    if not dataroot.is_dir():
        raise NmpError(f"data root {dataroot} does not exist: give the folder that holds samples, maps and {version}")
    path = dataroot / version / "scene.json"
    try:
        names = [str(s["name"]) for s in json.loads(path.read_text())]
    except OSError:
        found = ", ".join(sorted(p.name for p in dataroot.glob("v1.0-*"))) or "none"
        raise NmpError(f"{path} is missing (versions found: {found}): check DATAROOT and VERSION") from None
    except (ValueError, KeyError, TypeError) as error:
        raise NmpError(f"{path} is not a nuScenes table ({error}): unpack it again") from error
    for name in chosen:
        if name not in names:
            raise NmpError(f"scene '{name}' is not in {path}: choose from {', '.join(sorted(names)[:20])}")
    if not (dataroot / "maps" / "expansion").is_dir():
        raise NmpError(
            f"{dataroot / 'maps' / 'expansion'} is missing: download 'Map expansion pack (v1.3)' from nuscenes.org "
            "and unpack it into the data root's maps folder"
        )
    return list(chosen) or names[:limit]


def drive_scenes(
    stage: Stage, dataroot: Path, version: str, scenes: Sequence[str]
) -> tuple[dict[str, Any], Report, list[str]]:
    """Drive scenes of a nuScenes folder; return the metrics, the report so far, and the lines to print."""
    out, steps = stage.out, stage.steps
    maps = CityMaps(dataroot)
    with steps.step("record", f"Writing {', '.join(scenes)} of {dataroot} as ROS 2 bags"):
        bags = stage.record(dataroot, version, scenes)
    drives = []
    for scene in scenes:
        with steps.step(f"drive {scene}", f"Driving {scene} over DDS, in real time"):
            drives.append(stage.drive(scene, bags[scene], out / "prior"))
    metrics: dict[str, Any] = {"kind": "nuscenes", "scenes": list(scenes), "accuracy_claimed": False}
    metrics["drives"] = {d.name: d.to_json() for d in drives}
    metrics["prior_bytes"] = folder_size(out / "prior")

    with steps.step("pictures", "Drawing"):
        pairs = {d.name: (bags[d.name], d.layers) for d in drives}
        strip = real_film(pairs, maps, "Predicted layers and the true map, in the cameras")
        longest = max(drives, key=lambda d: d.answered)
        seen, true = city_map(longest.layers, maps, f"The map of {longest.name}")
        draw.save_png(out / "film_strip.png", strip)
        draw.save_png(out / "city_map.png", seen)
        draw.save_png(out / "city_map_true.png", true)

    report = Report(
        "Real cameras, live",
        f"{', '.join(scenes)} of {dataroot.name} ({version}), six cameras each, played as ROS 2 bags to the mapping "
        "node in real time; the layers were recorded from its topics, and the map was stored.",
    )
    report.tiles(
        [
            (f"{sum(d.answered for d in drives)} / {sum(d.keyframes for d in drives)}", "keyframes answered, live"),
            (
                milliseconds(max((d.statistics.get("latency_median_s") or 0.0) for d in drives)),
                "median from the last image to the layers",
            ),
            (byte_count(metrics["prior_bytes"]), "stored map"),
        ]
    )
    lines = [""]
    if stage.weights is None:
        warning = (
            "No accuracy is claimed here: the network that comes with nmp was trained on simulated images only. "
            "These pictures show that calibration, poses, topics and the stored map fit together."
        )
        report.text(warning, "warning")
        lines.append(warning)
    else:
        with steps.step("score", "Scoring against the true map"):
            scores: dict[str, Evaluation] = {d.name: evaluate(d.layers, maps) for d in drives}
        metrics["scores"] = {name: score.to_json() for name, score in scores.items()}
        report.heading("How well it maps")
        report.scores({name: score.scores for name, score in scores.items()})
        report.text(f"With the weights {stage.weights}, each scene with what the scenes before it had stored.", "note")
        lines.append(format_table({name: score.scores for name, score in scores.items()}))
    report.heading("In the cameras")
    caption = "Left what the network draws, right the map expansion; seen from above, the car looks to the right."
    report.pictures((strip, caption), photo=True)
    report.heading("The map")
    report.pictures(
        (seen, f"What the node drew in {longest.name}: the mean of its local maps."),
        (true, "The true map of the same places."),
    )
    report.heading("How it ran")
    drives_table(report, drives)
    return metrics, report, lines
