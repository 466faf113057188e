"""The report in a real browser: nothing broken, nothing cut off, readable in light and dark, on a desk and a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_samples import HOSTILE, add_everything, evaluation, write_checkpoint

from quantize.report import collect, render

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-extensions"]
FLAGS += ["--hide-scrollbars", "--enable-logging=stderr"]
DARK = "--blink-settings=preferredColorScheme=0"
PHONE, DESK = 390, 1200

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser is installed ({', '.join(NAMES)})"
)

# Looks at the report in a frame of a given width; the shipped page itself has no script.
PROBE = """
const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
const luminance = c => rgb(c).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const ground = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor, parts = rgb(c);
    if (parts.length === 3 || parts[3] === 1) return c;
  }
  return 'rgb(255, 255, 255)';
};
const meets = (a, b) => a.left + 1 < b.right && b.left + 1 < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
function look(frame) {
  const doc = frame.contentDocument, root = doc.documentElement, width = frame.clientWidth;
  doc.querySelectorAll('details').forEach(d => { d.open = true; });
  const all = [...doc.body.querySelectorAll('*')];
  const out = {width: root.clientWidth, scrollWidth: root.scrollWidth, wide: [], empty: [], cut: [],
    collide: [], pale: [], unpainted: 0, small: 99};
  for (const e of all) {
    const box = e.getBoundingClientRect();
    const inside = e.parentElement.closest('.scroll, nav > div');
    if (!inside && box.right > width + 1) out.wide.push(e.outerHTML.slice(0, 80));
    if (!e.closest('svg') && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) {
      const found = contrast(getComputedStyle(e).color, ground(e));
      if (found < 4.5) out.pale.push([found, e.outerHTML.slice(0, 80)]);
    }
  }
  for (const svg of doc.querySelectorAll('svg')) {
    const box = svg.getBoundingClientRect();
    if (!(box.width > 50 && box.height > 50)) out.empty.push(svg.getAttribute('aria-label'));
    const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((b, i) => {
      const aside = b.left < box.left - 2 || b.right > box.right + 2;
      const beyond = aside || b.top < box.top - 2 || b.bottom > box.bottom + 2;
      if (beyond) out.cut.push([svg.getAttribute('aria-label').slice(0, 40), texts[i].textContent]);
      const other = boxes.findIndex((o, j) => j > i && meets(b, o));
      if (other >= 0) out.collide.push([texts[i].textContent, texts[other].textContent]);
      const size = parseFloat(getComputedStyle(texts[i]).fontSize);
      out.small = Math.min(out.small, size * box.width / svg.viewBox.baseVal.width);
    });
    for (const p of svg.querySelectorAll('[fill^="var"], [stroke^="var"]')) {
      const style = getComputedStyle(p), key = (p.getAttribute('fill') || '').startsWith('var') ? 'fill' : 'stroke';
      if (['none', 'rgb(0, 0, 0)'].includes(style[key])) {
        // Black and white are the words on heat maps.
        if (!/--t\\d/.test(p.getAttribute(key))) out.unpainted += 1;
      }
    }
  }
  out.pictures = doc.querySelectorAll('svg').length;
  out.strange = doc.querySelectorAll('script, img, iframe, link, object').length;
  out.lost = [...doc.querySelectorAll('a')].filter(a => !doc.getElementById(a.getAttribute('href').slice(1))).length;
  out.paper = getComputedStyle(doc.body).backgroundColor;
  return out;
}
addEventListener('load', () => {
  const found = [...document.querySelectorAll('iframe')].map(look);
  document.querySelectorAll('iframe').forEach(f => f.remove());
  document.getElementById('found').textContent = JSON.stringify(found);
});
"""


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """Open a page → (its DOM, what it said on the console)."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [
        str(BROWSER),
        *FLAGS,
        profile,
        "--virtual-time-budget=8000",
        *flags,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(page: str, folder: Path, *flags: str) -> dict[int, dict[str, Any]]:
    """Look at a page on a phone and on a desk; its own guard against scripts is taken off for this."""
    bare = re.sub("<meta http-equiv.*", "", page, count=1)
    assert bare != page
    frames = "".join(
        f'<iframe srcdoc="{html.escape(bare)}" style="border:0;width:{width}px;height:900px"></iframe>'
        for width in (PHONE, DESK)
    )
    path = folder / "probe.html"
    whole = f'<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>{frames}<script>{PROBE}</script>'
    path.write_text(whole, encoding="utf-8")
    dom, said = browse(path, *flags)
    assert not said
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found
    assert found[1], "the probe did not finish"
    phone, desk = json.loads(html.unescape(found[1]))
    return {PHONE: phone, DESK: desk}


def assert_sound(found: dict[int, dict[str, Any]], pictures: int) -> None:
    for width, page in found.items():
        assert page["width"] == width
        assert page["scrollWidth"] <= width, "the page scrolls sideways"
        for fault in ("wide", "empty", "cut", "collide", "pale"):
            assert not page[fault], (width, fault)
        assert (page["unpainted"], page["strange"], page["lost"]) == (0, 0, 0)
        assert page["pictures"] >= pictures
        assert page["small"] >= 8.5, "words in pictures are too small to read"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(
        collect(add_everything(write_checkpoint(tmp_path_factory.mktemp("full") / "demo", 6), 6))
    )


def test_the_shipped_page_says_nothing_on_the_console(page: str, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    dom, said = browse(path)
    assert not said
    assert dom.count("<svg") == page.count("<svg") > 20
    assert dom.rstrip().endswith("</html>")


def test_the_page_is_sound_in_the_light(page: str, tmp_path: Path):
    found = probe(page, tmp_path)
    assert_sound(found, 25)
    assert found[DESK]["paper"] == "rgb(253, 253, 251)"


def test_the_page_is_sound_in_the_dark(page: str, tmp_path: Path):
    found = probe(page, tmp_path, DARK)
    assert_sound(found, 25)
    assert found[DESK]["paper"] == "rgb(21, 24, 28)"


def test_large_models_are_sound(tmp_path: Path):
    report = collect(add_everything(write_checkpoint(tmp_path / "large", 80), 80))
    assert_sound(probe(render(report), tmp_path), 25)


def test_hostile_words_and_absent_parts_are_sound(tmp_path: Path):
    long = "a_very_long_name_without_any_place_to_break_" * 4
    layers = {f"model.layers.0.{HOSTILE}": {"weight_error": 0.1, "fallback": HOSTILE + long}}
    folder = write_checkpoint(tmp_path / long, 1, layers=layers, source={long: HOSTILE})
    results = folder.with_name(folder.name + ".eval")
    results.mkdir()
    worst = [evaluation()["worst"][0] | {"before": HOSTILE, "token": long, "top1": HOSTILE}]
    saved = evaluation(data=HOSTILE + long, baseline=HOSTILE, worst=worst)
    (results / "a.json").write_text(json.dumps(saved), encoding="utf-8")
    assert_sound(probe(render(collect(folder)), tmp_path), 3)


def test_the_probe_finds_what_is_broken(page: str, tmp_path: Path):
    broken = page.replace(
        "<main>",
        '<main><div style="width:2000px;color:#888;background:#999">x</div><script></script>',
    )
    broken = broken.replace(
        "</main>", '<svg width="0" height="0" aria-label="nothing"></svg></main>'
    )
    broken = broken.replace('href="#tasks"', 'href="#nowhere"').replace("--s0:", "--s9:")
    found = probe(broken, tmp_path)[PHONE]
    assert found["scrollWidth"] > PHONE
    assert found["wide"]
    assert found["pale"]
    assert found["empty"] == ["nothing"]
    assert found["unpainted"]
    assert (found["strange"], found["lost"]) == (1, 1)
