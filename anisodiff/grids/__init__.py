"""Grids: the levels at which a solver evaluates a path, fixed, searched or learned."""
