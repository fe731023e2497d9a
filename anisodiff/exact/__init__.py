"""Denoisers in closed form."""
