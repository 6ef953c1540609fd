"""Reads datasets in the nuScenes v1.0 format: which files they consist of, whether all are there, and their content as `Infos`."""
