"""Storage: checkpoints, EDM's pickles, atomic files, provenance."""
