"""Where the time of a training step goes, as bars: its parts, stage by stage."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from deimkit.explore.curves import INK, panel, quiet
from deimkit.training.profile import PARTS, Profile

COLOURS = {
    "images": "#cfcfcf",
    "copy": "#9a9a9a",
    "queries": "#deebf7",
    "backbone": "#9ecae1",
    "encoder": "#56B4E9",
    "decoder": "#0072B2",
    "matching": "#E69F00",
    "losses": "#D55E00",
    "backward": "#CC79A7",
    "optimiser": "#009E73",
    "average": "#8fd3bd",
    "notes": "#eeeeee",
}
TOLD = 0.03  # of the longest step: parts from this share on have their milliseconds in the bar


def draw_profile(profile: Profile, ax: Axes | None = None) -> Axes:
    """Draw a step of every stage as a bar of its parts, in their order, with the milliseconds of the longer ones.

    Waiting for images is hatched: what more loader processes, or a faster disk, would save.
    """
    ax = ax or panel(9, 1.1 + 0.45 * len(profile.stages))
    longest = max(stage.step_s for stage in profile.stages)
    for y, stage in enumerate(profile.stages):
        left = 0.0
        for part, seconds in stage.seconds.items():
            ax.barh(y, 1e3 * seconds, 0.62, 1e3 * left, **_look(part))
            if seconds > TOLD * longest:
                middle = 1e3 * (left + seconds / 2)
                ink = "white" if part in ("decoder", "losses", "optimiser") else INK
                ax.annotate(f"{1e3 * seconds:.0f}", (middle, y), ha="center", va="center", fontsize=7, color=ink)
            left += seconds
        rate = f"{profile.batch / stage.step_s:.1f} images/s"
        ax.annotate(rate, (1e3 * left, y), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=8)
    for part in (part for part in PARTS if any(part in stage.seconds for stage in profile.stages)):
        ax.barh(0, 0, label=PARTS[part], **_look(part))
    ax.legend(ncols=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=7.5, borderaxespad=0.2)
    ax.set_yticks(range(len(profile.stages)), [stage.stage for stage in profile.stages])
    ax.set_xlabel("ms", color=INK)
    ax.set_xlim(0, 1.16e3 * longest)
    ax.invert_yaxis()
    quiet(ax)
    return ax


def _look(part: str) -> dict[str, Any]:
    """How the bar of a part looks."""
    return {"color": COLOURS[part]} | ({"hatch": "////", "ec": "white"} if part == "images" else {})
