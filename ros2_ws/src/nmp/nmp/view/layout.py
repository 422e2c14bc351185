"""Writes the layout for Foxglove that is shipped beside this file: ``python -m nmp.view.layout``."""

from __future__ import annotations

import json

from foxglove import layouts

from nmp import topics
from nmp.draw import MOSAIC
from nmp.view.foxglove import CITY, LAYERS, LOG, POSE, VECTORS, image_channel, layout_path


def layout() -> layouts.Layout:
    """Return the panels: cameras in their places around the car and its layers, the city at the right."""
    front, back = (_row([_camera(name) for name in names]) for names in MOSAIC)
    around = layouts.SplitContainer(
        direction="column",
        items=[
            layouts.SplitItem(proportion=1, content=front),
            layouts.SplitItem(proportion=3, content=_scene("Around the car", 75.0, [LAYERS, VECTORS], follow=True)),
            layouts.SplitItem(proportion=1, content=back),
        ],
    )
    log = layouts.LogPanel(title="Diagnostics", config=layouts.LogConfig(topic_to_render=LOG))
    beside = layouts.SplitContainer(
        direction="column",
        items=[
            layouts.SplitItem(proportion=4, content=_scene("The city so far", 260.0, [CITY, POSE], follow=False)),
            layouts.SplitItem(proportion=1, content=log),
        ],
    )
    return layouts.Layout(
        content=layouts.SplitContainer(
            direction="row",
            items=[layouts.SplitItem(proportion=3, content=around), layouts.SplitItem(proportion=2, content=beside)],
        )
    )


def text() -> str:
    """Return the layout as the file holds it."""
    return json.dumps(json.loads(layout().to_json()), indent=1) + "\n"


def _row(panels: list[layouts.ImagePanel]) -> layouts.SplitContainer:
    return layouts.SplitContainer(direction="row", items=[layouts.SplitItem(content=panel) for panel in panels])


def _camera(name: str) -> layouts.ImagePanel:
    mode = layouts.ImageModeConfig(image_topic=image_channel(name), image_schema_name="foxglove.CompressedImage")
    title = name.removeprefix("cam_").replace("_", " ")
    return layouts.ImagePanel(title=title, config=layouts.ImageConfig(image_mode=mode))


def _scene(title: str, distance: float, shown: list[str], *, follow: bool) -> layouts.ThreeDeePanel:
    """Return a view straight down from ``distance`` m; with ``follow`` the car looks up, else north is up."""
    drawn: dict[str, layouts.BaseRendererTopicSettings] = {}
    for name in (LAYERS, CITY):
        drawn[name] = layouts.BaseRendererGridTopicSettings(
            visible=name in shown, color_mode="rgba-fields", frame_locked=False
        )
    drawn[VECTORS] = layouts.BaseRendererSceneUpdateTopicSettings(visible=VECTORS in shown)
    drawn[POSE] = layouts.BaseRendererPoseTopicSettings(visible=POSE in shown)
    return layouts.ThreeDeePanel(
        title=title,
        config=layouts.ThreeDeeConfig(
            camera_state=layouts.ThreeDeeCameraState(
                distance=distance, perspective=False, phi=0.0, theta_offset=90.0 if follow else 0.0
            ),
            follow_tf=topics.BASE_FRAME,
            follow_mode="follow-heading" if follow else "follow-position",
            fixed_frame=topics.MAP_FRAME,
            topics=drawn,
            scene=layouts.BaseRendererSceneSettings(background_color="#0d1118"),
        ),
    )


if __name__ == "__main__":
    layout_path().write_text(text(), encoding="utf-8")
