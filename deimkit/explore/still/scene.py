"""Plotly's scenes of three dimensions, drawn by matplotlib: surfaces and points, seen by the same camera."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]
from numpy.typing import NDArray

from deimkit.explore.still.axes import spoken
from deimkit.explore.still.said import MARKS, Part
from deimkit.explore.still.values import POINT, colour, colours, lettering, numbers, plain, scale

Array = NDArray[Any]
FINEST = 72  # cells along the side of a surface; a finer one is thinned out
VIEW = 45  # degrees that plotly's camera sees from top to bottom
WINDOW = 0.185  # what matplotlib's sees from top to bottom, at a distance of one focal length
UNIT = 1.9057  # the length of the diagonal of matplotlib's box


class Scene:
    """The matplotlib axes of a scene, and what has to be drawn in one go so that near things hide far ones."""

    def __init__(self, ax: Any, said: Part, font: Part) -> None:
        self.ax, self.said, self.font = ax, said, font
        self.faces: list[Array] = []  # (n, 4, 3) corners
        self.tints: list[Array] = []  # (n, 4) RGBA
        self.points: list[Array] = []  # (n, 3) of everything drawn
        ax.computed_zorder = False

    def surface(self, trace: Part) -> ScalarMappable:
        """Add a field z (h, w) over x (w,) and y (h,) as a surface; what its colours mean."""
        z = numbers(trace["z"])
        x, y = (numbers(trace.get(way, range(count))) for way, count in zip("xy", z.shape[::-1], strict=True))
        norm, chart = scale(trace, z, "c")
        corners = np.stack([*np.meshgrid(x, y), z], -1)
        self.points.append(corners.reshape(-1, 3))
        kept = np.ix_(
            *(np.unique(np.linspace(0, side - 1, min(side, FINEST + 1)).round().astype(int)) for side in z.shape)
        )
        self.faces.append(_cells(corners[kept]))
        self.tints.append(_cells(chart(norm(z))[kept]).mean(1))
        return ScalarMappable(norm, chart)

    def marks(self, trace: Part) -> Artist:
        """Draw points in front of surfaces; what stands for them in the legend."""
        points, marker = np.stack([numbers(trace[way]) for way in "xyz"], 1), trace.get("marker", {})
        tints = colours(marker.get("color", trace["tint"]), len(points), marker.get("opacity", 1.0))
        look: Part = {"s": np.square(POINT * numbers(marker.get("size", 8))), "c": tints, "depthshade": False}
        symbol = MARKS[marker.get("symbol", "circle")]
        self.ax.scatter(*points.T, marker=symbol, zorder=3.1, **look)
        self.points.append(points)
        tint = tuple(tints[0]) if len(tints) else colour(trace["tint"])
        return Line2D([], [], linestyle="none", marker=symbol, markersize=POINT * 8, color=tint)

    def finish(self) -> None:
        """Draw the surfaces, set up the camera and dress the axes."""
        points = np.concatenate([np.zeros((0, 3)), *self.points])
        ends = [_ends(points[:, i]) for i in range(3)]
        spans = np.asarray([high - low for low, high in ends])
        even = spans.max() <= 4 * spans.min()  # else plotly makes it a cube
        sides = spans / math.prod(spans) ** (1 / 3) if even else np.ones(3)
        if self.faces:
            faces, tints = np.concatenate(self.faces), np.concatenate(self.tints)
            whole = np.isfinite(faces).all((1, 2))
            shades = _lit(faces[whole] / (spans / sides), tints[whole])
            look: Part = {"facecolors": shades, "edgecolors": shades, "linewidths": 0.3, "zorder": 2}
            self.ax.add_collection3d(Poly3DCollection(faces[whole], **look))
        self.ax.set(**{f"{way}lim": end for way, end in zip("xyz", ends, strict=True)})
        self._camera(sides)
        for way in "xyz":
            self._dress(way)

    def _camera(self, sides: Array) -> None:
        at = {"x": 1.25, "y": 1.25, "z": 1.25, **self.said.get("camera", {}).get("eye", {})}
        far = math.hypot(*at.values())
        self.ax.view_init(math.degrees(math.asin(at["z"] / far)), math.degrees(math.atan2(at["y"], at["x"])))
        seen = 2 * math.tan(math.radians(VIEW / 2))
        self.ax.set_box_aspect(sides, zoom=10 * WINDOW / (seen * far) * float(np.linalg.norm(sides)) / UNIT)
        self.ax.set_proj_type("persp", focal_length=WINDOW / seen)

    def _dress(self, way: str) -> None:
        said = self.said.get(f"{way}axis", {})
        axis: Any = getattr(self.ax, f"{way}axis")
        axis.set_pane_color(colour(said.get("backgroundcolor", "#fff"), 1.0 if said.get("showbackground") else 0.0))
        axis.pane.set_edgecolor(colour(said.get("gridcolor", "#ddd")))
        axis.line.set_color(colour(said.get("linecolor", "#888")))
        # matplotlib keeps the look of three-dimensional grids and ticks nowhere else
        axis._axinfo["grid"].update(color=colour(said.get("gridcolor", "#ddd")), linewidth=POINT)
        axis._axinfo["tick"].update(inward_factor=0.0, outward_factor=0.0)
        look = lettering({**self.font, "size": 0.9 * self.font["size"], **said.get("tickfont", {})})
        self.ax.tick_params(axis=way, labelsize=look["fontsize"], labelcolor=look["color"], pad=-1)
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: spoken(value, max(map(abs, axis.get_data_interval())))))
        title = said.get("title", {})
        text = title.get("text", way)  # plotly names the axes of a scene by themselves
        axis.set_label_text(plain(text), **lettering({**self.font, **title.get("font", {})}, text))
        axis.labelpad = -4


def _ends(values: Array) -> tuple[float, float]:
    """Where an axis begins and ends."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _cells(points: Array) -> Array:
    """The corners of each cell of a grid, once around: (h, w, k) -> (n, 4, k)."""
    around = [points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]]
    return np.stack(around, 2).reshape(-1, 4, points.shape[-1])


def _lit(faces: Array, tints: Array) -> Array:
    """The colours of faces (n, 4, 3) in a soft light from above: those that lean are darker."""
    normal = np.cross(faces[:, 2] - faces[:, 0], faces[:, 3] - faces[:, 1])
    length = np.linalg.norm(normal, axis=1)
    up = np.divide(np.abs(normal @ np.asarray([0.3, 0.2, 0.93])), length, out=np.ones_like(length), where=length > 0)
    return np.concatenate([tints[:, :3] * (0.7 + 0.3 * up[:, None]).clip(0, 1), tints[:, 3:]], 1)
