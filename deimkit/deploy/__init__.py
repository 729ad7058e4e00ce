"""Detectors leave the notebook: export, parity and benchmarks."""
