"""Data: image sets on disk, the sources that they are read from, and downloads."""
