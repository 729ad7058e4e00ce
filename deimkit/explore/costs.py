"""What trainings will cost, as bars: hours by stage, beside one another."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from deimkit.explore.curves import INK, STAGES, panel, quiet
from deimkit.training.rehearsal import Forecast, in_words

EVALUATION = "#8a8a8a"


def draw_forecasts(forecasts: Sequence[Forecast], ax: Axes | None = None) -> Axes:
    """Draw the hours of trainings to come, one bar each, split by stage, with the range that their steps leave open.

    Waiting for images is hatched: what more loader processes, or a faster disk, would save.
    """
    ax = ax or panel(9, 0.7 + 0.5 * len(forecasts))
    names = [f"{f.recipe.name}, {f.devices} x {f.device}, {f.workers} loaders" for f in forecasts]
    for y, forecast in enumerate(forecasts):
        left = 0.0
        for stage in forecast.stages:
            waiting = stage.steps * (stage.step - stage.compute) / 3600
            ax.barh(y, stage.hours - waiting, 0.62, left, color=STAGES[stage.stage])
            ax.barh(y, waiting, 0.62, left + stage.hours - waiting, color=STAGES[stage.stage], hatch="////", ec="white")
            left += stage.hours
        ax.barh(y, forecast.evaluation / 3600, 0.62, left, color=EVALUATION)
        low, high = forecast.range
        ax.plot([low, high], [y, y], color=INK, lw=1.4, marker="|", ms=8)
        ax.annotate(in_words(forecast.hours), (high, y), (6, 0), textcoords="offset points", va="center", color=INK)
    used = [name for name in STAGES if any(name == s.stage for f in forecasts for s in f.stages)]
    for name in [*used, "evaluation"]:
        ax.barh(0, 0, color=STAGES.get(name, EVALUATION), label=name)
    ax.legend(ncols=5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, borderaxespad=0.2)
    ax.set_yticks(range(len(forecasts)), names)
    ax.set_xlabel("hours", color=INK)
    ax.set_xlim(0, 1.12 * max(f.range[1] for f in forecasts))
    ax.invert_yaxis()
    quiet(ax)
    return ax
