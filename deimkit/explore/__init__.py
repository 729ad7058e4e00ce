"""What people look at: boxes, curves, boards of runs, and the labs."""
