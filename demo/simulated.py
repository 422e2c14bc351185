"""The demo on a simulated city: one route driven twice, and what the stored map is worth."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from drive import Drive
from pictures import city_map, film
from report import Report
from stage import Stage, byte_count, drives_table, folder_size, milliseconds

from nmp import draw
from nmp.evaluation import CityMaps, evaluate
from nmp.frame import CLASSES
from nmp.layers import read_layers, to_occupancy
from nmp.metrics import format_table

VERSION = "v1.0-mini"
FIRST, SECOND = "scene-0001", "scene-0002"
ROWS = {"baseline": "no prior", "empty_prior": "empty prior", "second_pass": "second pass"}
"""keys of metrics.json and their names in the table"""

AGREEMENT_MIOU = 0.1
"""most that the score of a drive over DDS in real time may be from that of its replay without DDS"""


def agrees(difference_miou: float, answered: int, keyframes: int) -> bool | None:
    """Tell whether replay and DDS score alike; None when keyframes were lost, which replay never does."""
    return difference_miou <= AGREEMENT_MIOU if answered == keyframes else None


def simulated(stage: Stage, seed: int | None) -> tuple[dict[str, Any], Report, list[str]]:
    """Drive one simulated route twice; return the metrics, the report so far, and the lines to print."""
    out, steps = stage.out, stage.steps
    data = out / "data"
    with steps.step("simulate", "Building a city and filming two drives along one route, on different days"):
        code = "from pathlib import Path; from nmp_train.sim.make import make_demo_dataset as make; "
        code += f"make(Path({str(data)!r}){'' if seed is None else f', {seed}'})"
        stage.children.wait(stage.children.start("simulate", [sys.executable, "-c", code]), timeout=900.0)
    with steps.step("record", "Writing both drives as ROS 2 bags"):
        bags = stage.record(data, VERSION, [FIRST, SECOND])
    prior = out / "prior"
    with steps.step("first_pass", "First pass over DDS, in real time, with an empty map"):
        first = stage.drive("first_pass", bags[FIRST], prior)
    shutil.copytree(prior, out / "prior_after_first_pass")
    with steps.step("second_pass", "Second pass over DDS, with the map that the first has stored"):
        second = stage.drive("second_pass", bags[SECOND], prior)
    with steps.step("baseline", "Both passes once more without any map (replay, no DDS)"):
        baseline, baseline_first = stage.replay(
            {"no_prior": (bags[SECOND], None), "no_prior_first_pass": (bags[FIRST], None)}
        )
    with steps.step("replay", "The second pass once more by replay, to compare with DDS"):
        shutil.copytree(out / "prior_after_first_pass", out / "prior_of_replay")
        [replayed] = stage.replay({"second_pass_replay": (bags[SECOND], out / "prior_of_replay")})

    maps = CityMaps(data)
    with steps.step("score", "Scoring against the true map"):
        scores = {
            "baseline": evaluate(baseline, maps),
            "empty_prior": evaluate(first.layers, maps),
            "second_pass": evaluate(second.layers, maps),
            "baseline_first_pass": evaluate(baseline_first, maps),
            "second_pass_replay": evaluate(replayed, maps),
        }
    metrics: dict[str, Any] = {"kind": "simulation", "seed": seed}
    metrics |= {key: scores[key].to_json() for key in (*ROWS, "baseline_first_pass")}
    gap = abs(scores["second_pass"].scores["miou"] - scores["second_pass_replay"].scores["miou"])
    metrics["replay_check"] = {
        **scores["second_pass_replay"].to_json(),
        "difference_miou": round(gap, 4),
        "agrees": agrees(gap, second.answered, second.keyframes),
        "identical_layers": _identical(second.layers, replayed),
        "layers": second.answered,
    }
    metrics["drives"] = {d.name: d.to_json() for d in (first, second)}
    metrics["prior_bytes"] = folder_size(prior)

    rows = {label: scores[key].scores for key, label in ROWS.items()}
    gain = _gain(rows["no prior"], rows["second pass"])
    metrics["gain_miou"] = round(gain, 4)
    report = Report(
        "A map that remembers",
        "One route through a simulated city, driven twice on different days. Six cameras and the car's pose came in "
        "over ROS 2 topics; a network drew dividers, crossings and boundaries around the car, and stored what it saw. "
        "The second pass began with what the first had stored.",
    )
    report.tiles(
        [
            (f"{gain:+.1f} mIoU", "second pass against no prior"),
            (f"{first.answered + second.answered} / {first.keyframes + second.keyframes}", "keyframes answered, live"),
            (milliseconds(second.statistics.get("latency_median_s")), "median from the last image to the layers"),
            (byte_count(metrics["prior_bytes"]), "stored map of the route"),
        ]
    )
    report.heading("How well it maps")
    report.scores(rows)
    report.text(
        "Intersection over union with the true map, 60 x 30 m around the car, over all keyframes of a drive. No prior "
        "and second pass are the same drive; empty prior is the first pass, in which the map grows while it is used "
        f"(without any prior that drive reaches {scores['baseline_first_pass'].scores['miou']:.2f}). "
        "Scores on simulated images say nothing about real ones.",
        "note",
    )
    _draw(stage, report, bags[SECOND], {"no prior": baseline, "second pass": second.layers}, second, maps)
    report.heading("How it ran")
    drives_table(report, [first, second])
    same = metrics["replay_check"]["identical_layers"]
    report.text(
        "The second pass by replay without DDS (nmp map) scores "
        f"{scores['second_pass_replay'].scores['miou']:.2f} mIoU, {gap:.2f} from the live run; "
        f"{same} of {second.answered} keyframes have identical layers."
    )
    lines = ["", format_table(rows), "", f"second pass against no prior: {gain:+.2f} mIoU"]
    verdict = {True: "agrees", False: "DOES NOT AGREE", None: "keyframes were lost, so nothing is said of it"}
    lines.append(
        f"replay against DDS: {gap:.4f} mIoU apart ({AGREEMENT_MIOU:g} allowed): "
        f"{verdict[metrics['replay_check']['agrees']]}; identical layers in {same} of {second.answered} keyframes"
    )
    return metrics, report, lines


def _draw(stage: Stage, report: Report, bag: Path, systems: dict[str, Path], last: Drive, maps: CityMaps) -> None:
    with stage.steps.step("pictures", "Drawing"):
        seen, true = city_map(last.layers, maps, "The map of the second pass")
        strip = film(bag, systems, maps, "Second pass: cameras, layers and truth")
        draw.save_png(stage.out / "city_map.png", seen)
        draw.save_png(stage.out / "city_map_true.png", true)
        draw.save_png(stage.out / "film_strip.png", strip)
    report.heading("The map")
    report.pictures(
        (seen, "What the second pass saw: the mean of all its local maps."), (true, "The true map of the same places.")
    )
    report.heading("The drive")
    report.pictures((strip, "Keyframes spread evenly over the second pass; the car looks to the right."), photo=True)


def _gain(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return the difference in mIoU, over the classes that both have: a route may lack one."""
    return float(np.nanmean([after[name] - before[name] for name in CLASSES]))


def _identical(first: Path, second: Path) -> int:
    """Count the moments for which both folders hold the same layers to the last bit."""
    others = {m.stamp_ns: to_occupancy(m) for m in read_layers(second)}
    return sum(np.array_equal(to_occupancy(m), others.get(m.stamp_ns, ())) for m in read_layers(first))
