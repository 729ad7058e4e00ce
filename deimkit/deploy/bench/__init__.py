"""Latency that can be believed: what is timed and how, on which machine and at which clocks, and what may be said."""
