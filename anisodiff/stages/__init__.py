"""Stages: each reads files, calls the kernels, and writes files. None imports another."""
