"""Solvers: steps of one evaluation memory or many, by name, and the loops that run them."""
