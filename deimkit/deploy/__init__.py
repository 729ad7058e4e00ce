"""Shipping a detector: export with proof, runtimes with one face, and in `bench` how fast they are."""
