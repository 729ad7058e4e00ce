"""Plotly's scenes of three dimensions, drawn by matplotlib: surfaces, lines and points, seen by the same camera."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]
from numpy.typing import NDArray

from deimkit.explore.still.axes import Numbers
from deimkit.explore.still.values import POINT, Part, colour, knows, lettering, one_of, plain

FINEST = 72  # cells along the side of a surface; a finer one is thinned out
VIEW = 45  # degrees that plotly's camera sees from top to bottom
WINDOW = 0.185  # what matplotlib's sees from top to bottom, at a distance of one focal length
SCENE = {"domain", "camera", "aspectmode", "aspectratio", "xaxis", "yaxis", "zaxis", "bgcolor"}
SCENE |= {"dragmode", "hovermode", "uirevision"}
UNIT = 1.9057  # the length of the diagonal of matplotlib's box


class Scene:
    """The matplotlib axes of a scene, and what has to be drawn in one go so that near things hide far ones."""

    def __init__(self, ax: Any, said: Part, font: Part) -> None:
        self.ax, self.said, self.font = ax, said, font
        self.faces: list[NDArray[Any]] = []  # (n, 4, 3) corners
        self.tints: list[NDArray[Any]] = []  # (n, 4) RGBA
        self.points: list[NDArray[Any]] = []  # (n, 3) of everything drawn
        ax.computed_zorder = False
        knows("a scene", said, SCENE)
        if "bgcolor" in said:
            ax.set_facecolor(colour(said["bgcolor"]))

    def surface(self, x: NDArray[Any], y: NDArray[Any], z: NDArray[Any], tints: NDArray[Any]) -> None:
        """Add a surface: x, y, z (h, w) of its points, tints (h, w, 4) of their colours."""
        corners = np.stack([x, y, z], -1)
        self.points.append(corners.reshape(-1, 3))
        rows, columns = (_thinned(side) for side in z.shape)
        corners, tints = corners[np.ix_(rows, columns)], tints[np.ix_(rows, columns)]
        # the corners of each cell, once around: (h - 1, w - 1, 4, ..) -> (n, 4, ..)
        around = [(slice(None, -1), slice(None, -1)), (slice(None, -1), slice(1, None))]
        around += [(slice(1, None), slice(1, None)), (slice(1, None), slice(None, -1))]
        faces = np.stack([corners[at] for at in around], 2).reshape(-1, 4, 3)
        shades = np.stack([tints[at] for at in around], 2).reshape(-1, 4, 4).mean(1)
        whole = np.isfinite(faces).all((1, 2))
        self.faces.append(faces[whole])
        self.tints.append(shades[whole])

    def finish(self) -> None:
        """Draw the surfaces, set up the camera and dress the axes."""
        ends = self._ends()
        sides = self._sides(ends)
        if self.faces:
            faces, tints = np.concatenate(self.faces), np.concatenate(self.tints)
            spans = [(high - low) / side for (low, high), side in zip(ends, sides, strict=True)]
            shades = _lit(faces / np.asarray(spans), tints)
            drawn = Poly3DCollection(faces, facecolors=shades, edgecolors=shades, linewidths=0.3, zorder=2)
            self.ax.add_collection3d(drawn)
        for way, (low, high) in zip("xyz", ends, strict=True):
            getattr(self.ax, f"set_{way}lim")(low, high)
        self._camera(sides)
        for way in "xyz":
            self._dress(way)

    def _ends(self) -> list[tuple[float, float]]:
        points = np.concatenate(self.points or [np.zeros((1, 3))])
        found = []
        for way, low, high in zip("xyz", np.nanmin(points, 0), np.nanmax(points, 0), strict=True):
            said = self.said.get(f"{way}axis", {})
            first, last = said.get("range") or (None, None)
            low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
            ends = float(low if first is None else first), float(high if last is None else last)
            found.append(ends[::-1] if said.get("autorange") == "reversed" else ends)
        return found

    def _sides(self, ends: list[tuple[float, float]]) -> NDArray[Any]:
        """How long the sides of the box are: (3,), 1 being that of plotly's cube."""
        spans = np.asarray([abs(high - low) for low, high in ends])
        mode = self.said.get("aspectmode", "manual" if "aspectratio" in self.said else "auto")
        if mode == "manual":
            return np.asarray([self.said["aspectratio"].get(way, 1) for way in "xyz"], float)
        if mode == "data" or (mode == "auto" and spans.max() <= 4 * spans.min()):
            return spans / math.prod(spans) ** (1 / 3)
        return np.ones(3)

    def _camera(self, sides: NDArray[Any]) -> None:
        camera = self.said.get("camera", {})
        eye = np.asarray([{"x": 1.25, "y": 1.25, "z": 1.25, **camera.get("eye", {})}[way] for way in "xyz"], float)
        far = float(np.linalg.norm(eye))
        self.ax.view_init(math.degrees(math.asin(eye[2] / far)), math.degrees(math.atan2(eye[1], eye[0])))
        seen = 2 * math.tan(math.radians(VIEW / 2))
        zoom = 10 * WINDOW / (seen * far) * float(np.linalg.norm(sides)) / UNIT
        self.ax.set_box_aspect(sides, zoom=zoom)
        if camera.get("projection", {}).get("type") == "orthographic":
            self.ax.set_proj_type("ortho")
        else:
            self.ax.set_proj_type("persp", focal_length=WINDOW / seen)

    def _dress(self, way: str) -> None:
        said = self.said.get(f"{way}axis", {})
        axis: Any = getattr(self.ax, f"{way}axis")
        if said.get("type", "linear") not in ("-", "linear"):
            raise one_of("axes of a scene", ("linear",), said["type"])
        ground = said.get("backgroundcolor", "#fff") if said.get("showbackground") else "rgba(255,255,255,0)"
        axis.set_pane_color(colour(ground))
        axis.pane.set_edgecolor(colour(said.get("gridcolor", "#ddd")))
        axis.line.set_color(colour(said.get("linecolor", "#888")))
        # matplotlib keeps the look of three-dimensional grids and ticks nowhere else
        axis._axinfo["grid"].update(color=colour(said.get("gridcolor", "#ddd")), linewidth=POINT)
        axis._axinfo["tick"].update(inward_factor=0.0, outward_factor=0.0)
        look = lettering({**self.font, "size": 0.9 * self.font["size"], **said.get("tickfont", {})})
        self.ax.tick_params(axis=way, labelsize=look["fontsize"], labelcolor=look["color"], pad=-1)
        axis.set_major_locator(MaxNLocator(said.get("nticks") or 5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(Numbers(said))
        if said.get("tickvals") is not None:
            words = said.get("ticktext")
            axis.set_ticks(list(said["tickvals"]), None if words is None else [plain(word) for word in words])
        if said.get("showticklabels") is False:
            axis.set_ticklabels([])
        title = said.get("title", {})
        text = title.get("text", way)  # plotly names the axes of a scene by themselves
        axis.set_label_text(plain(text), **lettering({**self.font, **title.get("font", {})}, text))
        axis.labelpad = -4
        if said.get("visible") is False:
            axis.set_visible(False)


def _thinned(side: int) -> NDArray[Any]:
    """The places of the points that are kept along a side, with both ends."""
    return np.unique(np.linspace(0, side - 1, min(side, FINEST + 1)).round().astype(int))


def _lit(faces: NDArray[Any], tints: NDArray[Any]) -> NDArray[Any]:
    """The colours of faces (n, 4, 3) in a soft light from above: those that lean are darker."""
    normal = np.cross(faces[:, 2] - faces[:, 0], faces[:, 3] - faces[:, 1])
    length = np.linalg.norm(normal, axis=1)
    up = np.divide(np.abs(normal @ np.asarray([0.3, 0.2, 0.93])), length, out=np.ones_like(length), where=length > 0)
    return np.concatenate([tints[:, :3] * (0.7 + 0.3 * up[:, None]).clip(0, 1), tints[:, 3:]], 1)
