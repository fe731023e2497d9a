"""Noise paths: bases and subspaces, variance schedules, the path over them and its time warp."""
