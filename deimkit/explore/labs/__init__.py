"""The labs: matching, losses, box distributions, Dense O2O, schedules and a whole step, to be moved and seen.

Each is a class in a module of its name: `match_lab.MatchLab`, `loss_lab.LossLab`, the three of `fdr_lab`,
`dense_lab.DenseLab`, `schedule_lab.ScheduleLab`, `anatomy_lab.AnatomyLab`. What one computes, and how it is drawn,
stands in modules beside it.
"""

from __future__ import annotations


def prepare() -> str:
    """Let the page read what draws the charts while its reader reads on, so that the first lab is there at once.

    Returns whether labs move: "they move", or what to install where they would be pictures only. Labs do without it;
    then the first of a page shows its picture at once, and the chart over it two seconds later.
    """
    try:
        from deimkit.explore.labs.lab_live import Library
    except ImportError as missing:
        return f"pictures only; `pip install {missing.name}` lets them move"
    Library.of_kernel()
    return "they move"
