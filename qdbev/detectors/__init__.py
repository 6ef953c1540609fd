"""The detectors of this project."""
