"""Shape annotations are checked in every test; exact models shared by the oracle tests."""

from jaxtyping import install_import_hook

install_import_hook("anisodiff", "beartype.beartype")

import torch  # noqa: E402 - after the hook

torch.set_num_threads(1)  # the tensors are small
