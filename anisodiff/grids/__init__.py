"""Grids: the levels at which a solver evaluates a path, fixed or searched."""
