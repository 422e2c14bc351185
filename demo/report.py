"""One page that holds everything: no files beside it, no network, light and dark."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from PIL import Image

from nmp.draw import Picture

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5b6675; --line: #e1e5ea;
  --accent: #c2255c; --bar: #f3c9d6; --code: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1118; --card: #151b24; --ink: #e2e7ee; --soft: #8b95a3;
  --line: #283140; --accent: #ff527a; --bar: #4d2233; --code: #1d2530; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 44px 0 12px; }
p { max-width: 75ch; margin: 0 0 12px; }
.soft, figcaption, .note { color: var(--soft); }
.note { font-size: 14px; margin-top: 8px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 26px 0 8px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 14px; }
.tile.first b { color: var(--accent); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 16px; border-top: 1px solid var(--line); white-space: nowrap; }
tr:first-child th { border-top: 0; color: var(--soft); font-weight: 600; font-size: 14px; }
th:first-child, td:first-child { text-align: left; }
td.bar { background: linear-gradient(90deg, var(--bar) calc(var(--v) * 1%), transparent 0); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 18px; }
figure { margin: 0 0 18px; }
figure img { width: 100%; height: auto; display: block; border-radius: 10px; border: 1px solid var(--line); }
figcaption { font-size: 14px; margin-top: 6px; }
pre { background: var(--code); border-radius: 10px; padding: 14px 18px; overflow-x: auto; font-size: 14px; }
.warning { border-left: 4px solid var(--accent); background: var(--card); padding: 12px 18px; }
"""


@dataclass
class Report:
    """Sections in the order in which they are added."""

    title: str
    lead: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        self.parts.append(f'<p class="{kind}">{escape(text)}</p>')

    def tiles(self, tiles: Sequence[tuple[str, str]]) -> None:
        """Add large figures, each with its meaning; the first stands out."""
        cells = (
            f'<div class="tile{" first" if i == 0 else ""}"><b>{escape(figure)}</b><span>{escape(meaning)}</span></div>'
            for i, (figure, meaning) in enumerate(tiles)
        )
        self.parts.append(f'<div class="tiles">{"".join(cells)}</div>')

    def scores(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Add the published table (IoU in percent), every cell with a bar as long as its value."""
        columns = {"divider": "Divider", "crossing": "Crossing", "boundary": "Boundary", "miou": "All (mIoU)"}
        lines = ["<tr><th>IoU, %</th>" + "".join(f"<th>{c}</th>" for c in columns.values()) + "</tr>"]
        for name, row in rows.items():
            cells = "".join(_score(row[key]) for key in columns)
            lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
        self.parts.append(f'<div class="scroll"><table>{"".join(lines)}</table></div>')

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        self.parts.append(f'<div class="scroll"><table>{"".join(lines)}</table></div>')

    def pictures(self, *pictures: tuple[Picture, str], photo: bool = False) -> None:
        """Add pictures with their captions, side by side; ``photo`` as JPEG, otherwise without loss."""
        figures = "".join(_figure(picture, caption, photo) for picture, caption in pictures)
        self.parts.append(f'<div class="pair">{figures}</div>' if len(pictures) > 1 else figures)

    def commands(self, text: str) -> None:
        self.parts.append(f"<pre>{escape(text.strip())}</pre>")

    def html(self) -> str:
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(self.title)}</title>'
            f"<style>{STYLE}</style></head>\n<body><main><h1>{escape(self.title)}</h1>"
            f'<p class="soft">{escape(self.lead)}</p>\n' + "\n".join(self.parts) + "\n</main></body></html>\n"
        )


def _figure(picture: Picture, caption: str, photo: bool) -> str:
    data = io.BytesIO()
    if photo:
        Image.fromarray(picture).save(data, "JPEG", quality=88)
    else:
        Image.fromarray(picture).save(data, "PNG", optimize=True)
    source = f"data:image/{'jpeg' if photo else 'png'};base64,{base64.b64encode(data.getvalue()).decode()}"
    words = escape(caption, quote=True)
    return f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def _score(value: float) -> str:
    if not math.isfinite(value):
        return "<td>–</td>"
    return f'<td class="bar" style="--v: {value:.1f}">{value:.2f}</td>'
