"""Pictures as inline SVG: small, the same bytes every time, in the page's own fonts and colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from quantize.pictures import Heatmap, Picture, Table
from quantize.report import draw, heat
from quantize.report.draw import Frame
from quantize.report.model import clean

_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pq",
    "text.parse_math": False,
    "axes.unicode_minus": True,
}
_COLOURS: Mapping[str, str] = {
    draw.INK: "currentColor",
    draw.RULE: "var(--rule)",
    draw.MUTED: "var(--muted)",
    heat.MISSING: "var(--missing)",
    **{colour: f"var(--s{i})" for i, colour in enumerate(draw.SERIES)},
    **{colour: f"var(--h{i})" for i, colour in enumerate(heat.HEAT)},
    **{colour: f"var(--t{i})" for i, colour in enumerate(heat.HEAT_TEXT)},
}
_HREF = "{http://www.w3.org/1999/xlink}href"
_GEOMETRY = ("d", "x", "y", "transform", "width", "height")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_KEPT = (
    "fill",
    "stroke",
    "stroke-width",
    "stroke-dasharray",
    "opacity",
    "font-size",
    "text-anchor",
)


def svg(picture: Picture, prefix: str, frame: Frame | None = None) -> str:
    """Draw a picture as an `<svg>` element for an HTML page; ids begin with `prefix`,
    which must be unique in the page.

    Raises TypeError for a Table, which is no drawing.
    """
    if isinstance(picture, Table):
        raise TypeError("a table is not drawn")
    tooltips: list[str] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user has set up
        matplotlib.rcParams.update(_RC)
        if isinstance(picture, Heatmap):
            figure, tooltips = heat.heatmap(picture)
        else:
            figure = draw.draw(picture, frame or Frame())
        root = ET.fromstring(_svg_of(figure))
    size = [round(float(part)) for part in root.attrib["viewBox"].split()[2:]]
    out = ET.Element(
        "svg",
        {"viewBox": f"0 0 {size[0]} {size[1]}", "width": f"{size[0]}", "height": f"{size[1]}"},
    )
    out.attrib |= {"role": "img", "aria-label": clean(f"{picture.title}. {picture.caption}")}
    _Copy(prefix, tooltips).children(root, out)
    return ET.tostring(out, encoding="unicode")


def _svg_of(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # the page's fonts draw the text, not matplotlib's
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


class _Copy:
    """Copies matplotlib's tree without its name spaces, metadata, font lists
    and groups that do nothing."""

    def __init__(self, prefix: str, tooltips: Sequence[str]) -> None:
        self.prefix, self.tooltips = prefix, tooltips

    def children(self, source: ET.Element, target: ET.Element) -> None:
        for child in source:
            self._element(child, target)

    def _element(self, source: ET.Element, target: ET.Element) -> None:
        tag = str(source.tag).rpartition("}")[2]
        if tag in ("metadata", "style"):
            return
        attributes = dict(self._attributes(source, tag))
        if tag == "path" and attributes.get("fill") == "none" and "stroke" not in attributes:
            return  # the empty backgrounds of figure and axes
        if tag == "g" and not attributes:
            self.children(source, target)
            if (cell := source.attrib.get("id", "")).startswith(heat.TOOLTIP):
                ET.SubElement(target[-1], "title").text = clean(
                    self.tooltips[int(cell.removeprefix(heat.TOOLTIP))],
                )
            return
        made = ET.SubElement(target, tag, attributes)
        made.text = (source.text or "") if tag == "text" else None
        self.children(source, made)

    def _attributes(self, source: ET.Element, tag: str) -> Iterator[tuple[str, str]]:
        for key, value in source.attrib.items():
            if key == "style":
                yield from _style(value, tag)
            elif key == "id":
                if tag in ("clipPath", "path"):
                    yield key, self.prefix + value
            elif key == _HREF:
                yield "href", f"#{self.prefix}{value.removeprefix('#')}"
            elif key == "clip-path":
                yield key, value.replace("url(#", f"url(#{self.prefix}")
            elif key != "transform" or "rotate(-0 " not in value:
                yield key, _round(value) if key in _GEOMETRY else value


def _style(style: str, tag: str) -> Iterator[tuple[str, str]]:
    """Style declarations as attributes, with the page's colours for the stand-ins."""
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key in _KEPT or (key == "fill-opacity"):
            yield key, _COLOURS.get(value, value)


def _round(numbers: str) -> str:
    return _NUMBER.sub(
        lambda found: f"{float(found[0]):.1f}".removesuffix(".0"),
        " ".join(numbers.split()),
    )
