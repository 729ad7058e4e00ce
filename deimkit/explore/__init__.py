"""What people look at: boxes, curves, and in time the labs."""
