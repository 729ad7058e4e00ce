"""How pictures stand on the pages of boards and labs: framed, in words too, and small. The HTML needs nothing else."""

from __future__ import annotations

import base64
import io
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

VIEW = "application/vnd.jupyter.widget-view+json"


def png(drawn: Axes | Figure, colours: int = 64) -> bytes:
    """A figure as the bytes of a PNG of at most so many colours."""
    shown = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    assert shown is not None
    file = io.BytesIO()
    shown.savefig(file, format="raw", dpi=shown.dpi)
    size = tuple(int(side) for side in shown.bbox.size)
    return packed(Image.frombuffer("RGBA", size, file.getvalue()).convert("RGB"), colours)  # type: ignore[arg-type]


def packed(image: Image.Image, colours: int = 64) -> bytes:
    """An image of few colours as a small PNG."""
    file = io.BytesIO()
    image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()


def framed(title: str, picture: bytes, words: str, kind: str = "") -> str:
    """A picture (PNG or JPEG) with its title as HTML, and in words for those who do not see it.

    kind: "dk-large" for a picture as wide as the page.
    """
    width, height = Image.open(io.BytesIO(picture)).size
    form = "jpeg" if picture.startswith(b"\xff\xd8") else "png"
    data = base64.b64encode(picture).decode()
    # width and height keep the place while the browser decodes, so that nothing jumps when a picture changes
    image = f'<img src="data:image/{form};base64,{data}" width="{width}" height="{height}" alt="{escape(words)}">'
    return f'<figure class="dk-figure {kind}"><figcaption>{escape(title)}</figcaption>{image}</figure>'


STYLE = """<style>
.dk-board { font: 14px/1.5 var(--jp-ui-font-family, system-ui, sans-serif); color: var(--jp-ui-font-color1, inherit);
  max-width: 1240px }
.dk-title { margin: .3em 0 } .dk-title strong { font-size: 1.15em } .dk-title > span { opacity: .85 }
.dk-state { display: inline-block; padding: 0 .6em; border: 1px solid currentColor; border-radius: 1em;
  white-space: nowrap; opacity: 1 !important }
.dk-failed, .dk-died, .dk-gone { border-width: 2px; font-weight: 600 }
.dk-alert { margin: .3em 0; padding: .2em .7em; border-left: 4px solid #D55E00; white-space: pre-wrap }
.dk-numbers { display: flex; flex-wrap: wrap; gap: .2em 1.8em; margin: .4em 0 }
.dk-numbers b { display: block; font-size: 1.15em; font-variant-numeric: tabular-nums }
.dk-numbers span { font-size: .88em; opacity: .8 }
.dk-pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 10px }
.dk-figure { margin: 0; max-width: 704px }
.dk-large { max-width: 1240px }
.dk-figure img { display: block; width: 100%; height: auto; border-radius: 4px; background: #fff }
.dk-figure figcaption { font-weight: 600 }
.dk-wide { overflow-x: auto } .dk-board td, .dk-board th { text-align: left; padding: .2em .8em .2em 0 }
.dk-board ul { margin: .2em 0; padding-left: 1.2em } .dk-board time { font-variant-numeric: tabular-nums; opacity: .8 }
.dk-board pre { overflow-x: auto; padding: .6em; border-left: 4px solid #D55E00; font-size: .88em }
</style>"""
