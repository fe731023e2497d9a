"""Entries of registries: facts that need no torch, which the configuration is checked with, and where the code is."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """Something that is chosen by name, loaded when it is used.

    Attributes:
        source: where it is, `module:name` below `anisodiff`.
    """

    source: str

    def load(self) -> Any:
        """The class or function itself."""
        module, _, name = self.source.partition(":")
        return getattr(import_module(f"anisodiff.{module}"), name)
