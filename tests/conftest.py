"""Shape annotations are checked in every test; exact models shared by the oracle tests."""

from jaxtyping import install_import_hook

install_import_hook("anisodiff", "beartype.beartype")
