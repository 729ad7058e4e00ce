"""The labs: matching, losses, box distributions, Dense O2O, schedules and a whole step, to be moved and seen.

Each is a class in a module of its name: `match_lab.MatchLab`, `loss_lab.LossLab`, the three of `fdr_lab`,
`dense_lab.DenseLab`, `schedule_lab.ScheduleLab`, `anatomy_lab.AnatomyLab`. What one computes, and how it is drawn,
stands in modules beside it.
"""
