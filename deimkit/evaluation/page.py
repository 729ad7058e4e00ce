"""A page that stands alone: one HTML file with its pictures inside, where no script runs and nothing is fetched.

It follows the reader's light or dark setting and prints well.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


def whole_page(name: str, headline: str, sections: list[tuple[str, str]]) -> str:
    """The page from its headline (HTML) and its sections as (title, HTML); empty ones are left out."""
    sections = [(title, html) for title, html in sections if html]
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, _ in sections)
    body = "".join(f'<section id="{_anchor(title)}"><h2>{title}</h2>{html}</section>' for title, html in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(name)} · deimkit</title>'
        f"<style>{STYLE}</style></head><body><header><h1>{escape(name)}</h1>{headline}<nav>{links}</nav></header>"
        f"<main>{body}</main></body></html>\n"
    )


def write(path: Path, html: str) -> Path:
    """Put a page where it belongs, whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial")
    partial.write_text(html, encoding="utf-8")
    return partial.replace(path)


class Html(str):
    """Text that is HTML already."""


def table(caption: str, head: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose rows begin with their names; numbers and `Html` are told from plain text."""

    def cell(value: Any) -> str:
        number = isinstance(value, (int, float)) or bool(re.fullmatch(r"[\d.]+|–", str(value)))
        kind = ' class="number"' if number else ""
        return f"<td{kind}>{value if isinstance(value, Html) else escape(str(value))}</td>"

    def line(row: Sequence[Any]) -> str:
        return f'<tr><th scope="row">{escape(str(row[0]))}</th>{"".join(map(cell, row[1:]))}</tr>'

    names = [str(name) for name in head]
    top_row = "".join(f'<th scope="col">{escape(name)}</th>' for name in names) if any(names) else ""
    body = "".join(map(line, rows))
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"{f'<thead><tr>{top_row}</tr></thead>' if top_row else ''}<tbody>{body}</tbody></table></div>"
    )


def meter(value: Any, full: float = 1.0) -> Html:
    """A fraction as a number with a bar behind it, which is full at `full`."""
    share = 100 * value / full if finite(value) and value > 0 else 0.0
    return Html(f'<span class="bar" style="--share:{share:.1f}%">{percent(value)}</span>')


def shaded(text: str, share: float) -> Html:
    """Text on a ground that is the darker the larger its share, in [0, 1]."""
    return Html(f'<span class="shade" style="--share:{100 * share:.1f}%">{escape(text)}</span>')


def figure(picture: str, words: str) -> str:
    """A picture (HTML) and what it shows in words (plain text)."""
    return f"<figure>{picture}<figcaption>{escape(words)}</figcaption></figure>"


def inline_svg(ax: Any, words: str) -> str:
    """The figure of `ax` as inline SVG whose ink is the text colour of the page, light or dark."""
    import matplotlib

    from deimkit.explore.curves import INK

    file = io.StringIO()
    # A salt of its own keeps the ids of one picture apart from those of another, and the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": words, "text.color": INK}):
        ax.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return re.sub(r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{escape(words)}">', svg)


def percent(value: Any) -> str:
    """A fraction in percent with one digit; a dash where COCO has no number (nothing of that kind to find)."""
    return f"{100 * value:.1f}" if finite(value) and value >= 0 else "–"


def finite(value: Any) -> bool:
    """Whether there is a number at all."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


STYLE = """
:root { --ink: #1d2126; --faint: #5b6570; --paper: #ffffff; --panel: #f4f6f8; --line: #d9dfe5; --accent: #0068a5 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebee; --faint: #a3adb8; --paper: #14171a; --panel: #1e2328; --line: #343b43; --accent: #6cbcf2 }
  figure svg { filter: brightness(1.25) }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 3rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line) }
p { margin: .3rem 0 .8rem; max-width: 46rem }
a { color: var(--accent) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem }
.state { display: inline-block; padding: .05rem .6rem; margin-right: .4rem; border-radius: 1rem; font-size: .85rem;
  border: 1px solid currentColor; color: var(--faint) }
.state.finished { color: var(--accent) }
.state.failed { color: #c3420b }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .75rem; margin-bottom: 1rem }
.card { background: var(--panel); border-radius: .6rem; padding: .8rem 1rem }
.card b { display: block; font-size: 1.75rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.card span, figcaption, caption { color: var(--faint); font-size: .875rem }
figure { margin: 0 0 1.6rem }
figure svg, figure img { display: block; width: 100%; height: auto; border-radius: .4rem }
figure svg text { font-family: inherit !important }
figcaption { margin-top: .3rem; max-width: 46rem }
.scroll { overflow-x: auto } .scroll + .scroll { margin-top: 1.6rem }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 0 1.6rem;
  margin-top: 1rem }
.aside { color: var(--faint); font-size: .875rem; margin-top: 1.6rem }
table { border-collapse: collapse; width: 100%; font-size: .925rem }
caption { text-align: left; padding-bottom: .4rem }
th, td { text-align: left; vertical-align: top; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
thead th { color: var(--faint); font-weight: 500 }
tbody th { width: 1%; white-space: nowrap; font-variant-numeric: tabular-nums }
td { overflow-wrap: anywhere }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.bar { display: block; min-width: 9rem; padding: 0 .4rem; font-variant-numeric: tabular-nums; border-radius: .25rem;
  background: linear-gradient(to right, color-mix(in srgb, var(--accent) 32%, transparent) var(--share), var(--panel) 0)
  }
.shade { display: block; padding: 0 .4rem; font-variant-numeric: tabular-nums; border-radius: .25rem;
  background: color-mix(in srgb, var(--accent) calc(.6 * var(--share)), transparent) }
summary { cursor: pointer; color: var(--accent); padding: .2rem 0 }
pre { background: var(--panel); border-radius: .6rem; padding: 1rem; overflow-x: auto; font-size: .82rem;
  line-height: 1.5 }
@media print { nav { display: none } section { break-inside: avoid } body { max-width: none; padding: 0 } }
"""
