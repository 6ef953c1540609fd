"""Generates a synthetic dataset in the nuScenes v1.0 format: camera images, lidar sweeps, CAN bus messages and the thirteen tables."""
