"""Draw the pictures of README.md and docs/conversion.md, once for light and once for dark pages.

python docs/pictures.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent / "pictures"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Colours:
    """What a picture is drawn in."""

    ink: str
    faint: str
    line: str
    box: str
    panel: str
    accent: str
    accent_box: str
    second: str
    second_box: str


COLOURS: Mapping[str, Colours] = {
    "light": Colours(
        ink="#1f2430",
        faint="#5b6473",
        line="#8a94a6",
        box="#ffffff",
        panel="#f2f4f8",
        accent="#3949ab",
        accent_box="#e8eaf6",
        second="#00796b",
        second_box="#e0f2f1",
    ),
    "dark": Colours(
        ink="#e8ebf2",
        faint="#a7b0c0",
        line="#7c879b",
        box="#232936",
        panel="#1a1f2a",
        accent="#9fa8da",
        accent_box="#2a3054",
        second="#80cbc4",
        second_box="#1d3b3a",
    ),
}


@dataclass
class Drawing:
    """An SVG picture in the making; all lengths are in its own units."""

    width: int
    height: int
    title: str
    colours: Colours
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, kind: str = "box") -> None:
        """A rounded rectangle; kind: box, panel, accent or second."""
        fills = {
            "box": (self.colours.box, self.colours.line),
            "panel": (self.colours.panel, self.colours.line),
            "accent": (self.colours.accent_box, self.colours.accent),
            "second": (self.colours.second_box, self.colours.second),
        }
        fill, stroke = fills[kind]
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 15,
        faint: bool = False,
        bold: bool = False,
        anchor: str = "middle",
    ) -> None:
        """One line of text whose baseline is at y."""
        colour = self.colours.faint if faint else self.colours.ink
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def card(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        lines: Sequence[str],
        kind: str = "box",
    ) -> None:
        """A box with a title and smaller lines below it, centred."""
        self.box(x, y, w, h, kind)
        top = y + h / 2 - 9 * (len(lines) - 1) + 5
        for place, line in enumerate(lines):
            first = place == 0
            size = 14 if first else 12
            self.text(x + w / 2, top + 19 * place, line, size, faint=not first, bold=first)

    def arrow(
        self,
        points: Sequence[tuple[float, float]],
        kind: str = "line",
        dashed: bool = False,
    ) -> None:
        """A line through the points with a head at its end; kind: line, accent or second."""
        colour = getattr(self.colours, kind)
        path = " L ".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="M {path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-linejoin="round" marker-end="url(#{kind})"{dash}/>'
        )

    def _head(self, kind: str) -> str:
        """Definition of the head that arrows of a kind have."""
        return (
            f'<marker id="{kind}" viewBox="0 0 10 10" refX="8" refY="5" '
            f'markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
            f'<path d="M 0 0 L 10 5 L 0 10 z" fill="{getattr(self.colours, kind)}"/></marker>'
        )

    def svg(self) -> str:
        """The whole file."""
        heads = "".join(self._head(kind) for kind in ("line", "accent", "second"))
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="{_FONT}" role="img">\n<title>{escape(self.title)}</title>\n'
            f"<defs>{heads}</defs>\n{body}\n</svg>\n"
        )


def overview(colours: Colours) -> str:
    """What goes in, what pq does, what comes out and where it runs."""
    title = "A model and a recipe go in, a smaller, verified checkpoint comes out"
    d = Drawing(960, 316, title, colours)
    d.card(24, 20, 162, 64, ("parent model", "safetensors, 16 bits"))
    d.card(24, 106, 162, 50, ("recipe", "one YAML file"))
    d.card(24, 178, 162, 50, ("calibration text", "a file, or built in"))
    d.box(226, 20, 346, 208, "panel")
    d.text(399, 48, "pq convert: one decoder block at a time", 14, bold=True)
    steps = (("load", 246), ("measure", 354), ("smooth", 462))
    for words, x in steps:
        d.card(x, 68, 90, 42, (words,), "accent")
    d.card(462, 142, 90, 42, ("quantize",), "accent")
    d.card(354, 142, 90, 42, ("write",), "accent")
    d.card(246, 142, 90, 42, ("free",), "accent")
    d.arrow(((336, 89), (352, 89)), "accent")
    d.arrow(((444, 89), (460, 89)), "accent")
    d.arrow(((507, 110), (507, 140)), "accent")
    d.arrow(((462, 163), (446, 163)), "accent")
    d.arrow(((354, 163), (338, 163)), "accent")
    d.arrow(((291, 142), (291, 112)), "accent")
    d.text(399, 212, "memory holds one block, never the whole model", 12, faint=True)
    for y in (52, 131, 203):
        d.arrow(((186, y), (224, y)))
    d.card(616, 84, 156, 80, ("checkpoint", "2 to 8 bits,", "read back, hashed"), "second")
    d.arrow(((572, 124), (614, 124)))
    d.card(808, 20, 144, 50, ("vLLM", "compressed-tensors"))
    d.card(808, 99, 144, 50, ("transformers", "both formats"))
    d.card(808, 178, 144, 50, ("pq verify", "is it still whole?"))
    d.arrow(((772, 104), (790, 104), (790, 45), (806, 45)))
    d.arrow(((772, 124), (806, 124)))
    d.arrow(((772, 144), (790, 144), (790, 203), (806, 203)))
    measured = "pq eval: perplexity, KL divergence and tasks, beside the parent"
    d.card(226, 258, 546, 48, (measured,), "second")
    d.arrow(((697, 164), (697, 256)), "second")
    d.arrow(((24, 52), (8, 52), (8, 282), (224, 282)), "second")
    d.text(24, 274, "the parent", 13, faint=True, anchor="start")
    return d.svg()


def block_loop(colours: Colours) -> str:
    """What happens to one decoder block, and the two streams that pass through it."""
    d = Drawing(960, 452, "The life of one decoder block during a conversion", colours)
    d.card(4, 96, 160, 60, ("quantized stream", "hidden states [B, T, D]"), "accent")
    d.card(4, 330, 160, 60, ("parent's stream", "hidden states [B, T, D]"), "second")
    d.box(196, 12, 568, 428, "panel")
    d.text(480, 38, "block i", 16, bold=True)
    left, right = 220, 500
    w, h = 240, 58
    d.card(left, 58, w, h, ("1  load", "weights from safetensors"))
    d.card(right, 58, w, h, ("2  restructure", "FFN → experts (ladimo)"))
    d.card(right, 148, w, h, ("3  smooth", "fold λ, rotate (equalize, rotate)"))
    d.card(left, 148, w, h, ("4  cache", "scales for INT4 keys and values"))
    d.card(left, 238, w, h, ("5  measure", "H = E[x xᵀ] of each input"))
    d.card(right, 238, w, h, ("6  encode", "codes and scales, packed"))
    d.card(right, 334, w, h, ("7  advance", "both streams, to block i + 1"))
    d.card(left, 334, w, h, ("8  write, keep, free", "one shard; state for a resume"))
    d.arrow(((460, 87), (498, 87)))
    d.arrow(((620, 116), (620, 146)))
    d.arrow(((500, 177), (462, 177)))
    d.arrow(((340, 206), (340, 236)))
    d.arrow(((460, 258), (498, 258)))
    d.arrow(((500, 280), (462, 280)), dashed=True)
    d.arrow(((620, 296), (620, 332)))
    d.arrow(((500, 363), (462, 363)))
    d.text(480, 314, "next linears see the quantized ones", 12, faint=True)
    d.text(480, 424, "layers that share an input are measured and encoded together", 12, faint=True)
    d.arrow(((164, 126), (194, 126)), "accent")
    d.arrow(((164, 360), (194, 360)), "second")
    d.card(798, 96, 158, 60, ("quantized stream", "into block i + 1"), "accent")
    d.card(798, 330, 158, 60, ("parent's stream", "into block i + 1"), "second")
    d.arrow(((764, 126), (796, 126)), "accent")
    d.arrow(((764, 360), (796, 360)), "second")
    d.text(84, 250, "what the parent", 12, faint=True)
    d.text(84, 266, "would compute: only for", 12, faint=True)
    d.text(84, 282, "methods that aim at it", 12, faint=True)
    return d.svg()


PICTURES: Mapping[str, Callable[[Colours], str]] = {"overview": overview, "block-loop": block_loop}


def files() -> dict[Path, str]:
    """Path → content of every picture."""
    return {
        HERE / f"{name}-{shade}.svg": draw(colours)
        for name, draw in PICTURES.items()
        for shade, colours in COLOURS.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
