"""Objectives: the losses that networks, paths and warps minimise, and the path's gradient."""
