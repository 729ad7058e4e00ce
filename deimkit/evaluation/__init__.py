"""Detections become numbers and a report."""
