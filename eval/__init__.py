"""Scores models with the official nuScenes metric, compares them tensor by tensor, and draws and tabulates the results."""
