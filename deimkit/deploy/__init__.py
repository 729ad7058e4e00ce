"""Shipping a detector: export with proof, runtimes with one face, and latency that can be believed."""
