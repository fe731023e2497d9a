"""Generation with one seed an image: all noise, and the label, of image n depend on seed n alone."""

from collections.abc import Iterator, Sequence
from typing import Unpack

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.grids.levels import Levels
from anisodiff.pixels import to_uint8
from anisodiff.solvers.loop import SolveOptions, solve
from anisodiff.solvers.singlestep import Step


class Draws:
    """What chance gives each image, from one CPU generator a seed: its first noise, its label, and further noise.

    Attributes:
        noise: standard normal, in pixels, `[B, C, H, W]`.
        labels: one-hot classes `[B, classes]`; None if there are none.

    Args:
        seeds: of the images.
        shape: channels, height, width.
        classes: number of classes; 0 gives no labels.
        device: where what is drawn is put.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], classes: int, device: str = "cpu"):
        self.shape, self.device = shape, device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.noise, self.labels = self(), None
        if classes:
            index = torch.stack([torch.randint(classes, (), generator=each) for each in self._generators])
            self.labels = functional.one_hot(index, classes).to(device, torch.float32)

    def __call__(self) -> Float[Tensor, "b c h w"]:
        """Draw on from every generator: standard normal noise, in pixels."""
        return torch.stack([torch.randn(self.shape, generator=each) for each in self._generators]).to(self.device)


def draw(
    seeds: Sequence[int], shape: tuple[int, int, int], classes: int
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"] | None]:
    """First noise and labels alone, see `Draws`."""
    drawn = Draws(seeds, shape, classes)
    return drawn.noise, drawn.labels


def draw_for(
    denoiser: Denoiser, seeds: Sequence[int], labelled: bool, device: str
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"] | None]:
    """Noise and labels of a denoiser's images, on its device; no labels if they are not wanted."""
    network = denoiser.network
    drawn = Draws(seeds, network.shape, network.classes if labelled else 0, device)
    return drawn.noise, drawn.labels


def batches(seeds: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Seeds, `size` at a time: those meant, and padded with the last. Kernels differ with the size of a batch."""
    for first in range(0, len(seeds), size):
        chosen = seeds[first : first + size]
        yield chosen, [*chosen, *[chosen[-1]] * (size - len(chosen))]


@torch.no_grad()
def start(
    denoiser: Denoiser,
    noise: Float[Tensor, "b c h w"],
    levels: Levels,
    labels: Float[Tensor, "b k"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Coefficients at the first level: `sqrt(g_k(T)) eps` of the path."""
    path = denoiser.path.for_labels(labels)
    return path.scale(path.from_pixels(noise), levels.nodes[0].to(noise.device))


def finished(
    denoiser: Denoiser, z: Float[Tensor, "b c h w"], seeds: Sequence[int], name: str
) -> UInt8[Tensor, "n c h w"]:
    """Images of final coefficients, in uint8 on the CPU.

    Args:
        denoiser: over the path whose coefficients they are.
        z: coefficients; those after the seeds' are padding.
        seeds: of the images.
        name: of the method and its budget, for the message.

    Raises:
        InvalidArgument: an image is NaN or infinite, which uint8 cannot say.
    """
    pixels = denoiser.path.to_pixels(z)[: len(seeds)]
    bad = ~pixels.isfinite().flatten(1).all(1)
    if bad.any():
        raise InvalidArgument(f"{name}: the image of seed {seeds[int(bad.to(torch.int8).argmax())]} is NaN or infinite")
    return to_uint8(pixels).cpu()


def final_states(
    denoiser: Denoiser,
    levels: Levels,
    step: Step,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    classes: int,
    batch: int,
    device: str = "cpu",
    **options: Unpack[SolveOptions],
) -> Iterator[tuple[Sequence[int], Float[Tensor, "b c h w"]]]:
    """Yield seeds and coefficients at the last level, a batch at a time; those after the seeds' are padding.

    Args:
        denoiser: network over the path.
        levels: the grid.
        step: the solver's step.
        seeds: one an image.
        shape: channels, height, width.
        classes: number of classes; 0 for an unconditional network.
        batch: images at a time.
        device: where to compute.
        options: keyword arguments of `solve`.
    """
    for chosen, padded in batches(seeds, batch):
        drawn = Draws(padded, shape, classes, device)
        own = levels.for_labels(drawn.labels)
        first = start(denoiser, drawn.noise, own, drawn.labels)
        yield chosen, solve(denoiser, first, own, step, drawn.labels, source=drawn, **options)


def generate(
    denoiser: Denoiser,
    levels: Levels,
    step: Step,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    classes: int,
    batch: int,
    device: str = "cpu",
    name: str = "generate",
    **options: Unpack[SolveOptions],
) -> Iterator[tuple[Sequence[int], UInt8[Tensor, "b c h w"]]]:
    """Yield seeds and their images, a batch at a time.

    Args:
        denoiser: network over the path.
        levels: the grid.
        step: the solver's step.
        seeds: one an image.
        shape: channels, height, width.
        classes: number of classes; 0 for an unconditional network.
        batch: images at a time.
        device: where to compute.
        name: of the method and its budget, for messages.
        options: keyword arguments of `solve`.

    Raises:
        InvalidArgument: an image is NaN or infinite.
    """
    for chosen, z in final_states(denoiser, levels, step, seeds, shape, classes, batch, device, **options):
        yield chosen, finished(denoiser, z, chosen, name)
