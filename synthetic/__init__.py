"""A synthetic world in the nuScenes v1.0 format: streets, cameras, lidar, and the thirteen tables that describe them."""
