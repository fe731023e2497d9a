"""Metrics: feature networks and distances, and the shapes of trajectories."""
