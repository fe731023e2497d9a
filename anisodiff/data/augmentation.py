"""EDM's augmentation (arXiv:2206.00364, Appendix F.2), of which the network is told, so that samples do without it.

Images are mirrored in both directions, scaled, turned, stretched along an axis and moved. What moves pixels by parts of
one is done at twice the resolution between two low-pass filters, as in arXiv:2006.06676, Appendix B.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

LABELS = 9  # numbers that a network is told
DRAWN = 8  # mirrored, upside down, scale, angle, stretch, its axis, move to the right, move down
SCALE_STD = STRETCH_STD = 0.2  # of the base-2 logarithm
MOVE_STD = 0.125  # of the side
# low-pass filter of Daubechies' least asymmetric wavelet with six vanishing moments
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
APRON = len(SYM6) // 4  # pixels around an image that the filter sees


def draw_augmentation(count: int, probability: float, generator: torch.Generator) -> Float[Tensor, "b 8"]:
    """Parameters of the augmentations of images.

    Args:
        count: images.
        probability: share of the images that each kind is chosen for; half of all images are mirrored.
        generator: a CPU generator.
    """
    normal = torch.randn((count, 4), generator=generator)
    uniform = torch.rand((count, 10), generator=generator)
    coins, turns, chosen = uniform[:, :2] < 0.5, 2 * uniform[:, 2:4] - 1, uniform[:, 4:9] < probability
    mirrored, upside_down = coins[:, 0].float(), (coins[:, 1] & chosen[:, 0]).float()
    scale, angle = normal[:, 0] * chosen[:, 1], math.pi * turns[:, 0] * chosen[:, 2]
    stretch, axis = normal[:, 1] * chosen[:, 3], math.pi * turns[:, 1] * (uniform[:, 9] < 0.5)
    right, down = (normal[:, k] * chosen[:, 4] for k in (2, 3))
    return torch.stack([mirrored, upside_down, scale, angle, stretch, axis, right, down], dim=1)


def augmentation_labels(parameters: Float[Tensor, "b 8"]) -> Float[Tensor, "b 9"]:
    """What a network is told of the augmentations: zeros where there are none."""
    mirrored, upside_down, scale, angle, stretch, axis, right, down = parameters.unbind(1)
    turned, stretched = (angle.cos() - 1, angle.sin()), (stretch * axis.cos(), stretch * axis.sin())
    return torch.stack([mirrored, upside_down, scale, *turned, *stretched, right, down], dim=1)


def augmented(images: Float[Tensor, "b c h w"], parameters: Float[Tensor, "b 8"]) -> Float[Tensor, "b c h w"]:
    """Images, augmented; those of which only the flips are chosen keep their pixels to the filters' rounding.

    Args:
        images: square.
        parameters: those that `draw_augmentation` drew.
    """
    flip = lambda kind, dim, x: torch.where(parameters[:, kind, None, None, None] > 0, x.flip(dim), x)  # noqa: E731
    images = flip(1, 2, flip(0, 3, images))
    side = images.shape[-1]
    back = _way_back(parameters, side)
    padded, (left, right, top, bottom) = _padded(images, back)
    # origins are the middles of images: of the padded one, then of pixels at twice the resolution
    back = _moved((left - right) / 2, (top - bottom) / 2, back) @ back
    twice = _filtered_up(padded)
    back = _moved(-0.5, -0.5, back) @ _scaled(2.0, back) @ back @ _scaled(0.5, back) @ _moved(0.5, 0.5, back)
    out = 2 * (side + 2 * APRON)
    inside = _scaled(2 / twice.shape[3], back, 2 / twice.shape[2])
    grid = (inside @ back @ _scaled(out / 2, back))[:, :2]
    shape = (len(images), images.shape[1], out, out)
    places = functional.affine_grid(grid, list(shape), align_corners=False)
    seen = functional.grid_sample(twice, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _filtered_down(seen)


def _way_back(parameters: Tensor, side: int) -> Float[Tensor, "b 3 3"]:
    """Maps from places in the augmented images to places in those that they come from, from their middles on."""
    _, _, scale, angle, stretch, axis, right, down = parameters.unbind(1)
    factor, longer = (-scale * SCALE_STD).exp2(), (-stretch * STRETCH_STD).exp2()
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    rows = lambda *values: torch.stack(values, dim=-1).reshape(-1, 3, 3)  # noqa: E731
    turn = lambda by: rows(by.cos(), -by.sin(), zero, by.sin(), by.cos(), zero, zero, zero, one)  # noqa: E731
    stretched = turn(-axis) @ rows(longer, zero, zero, zero, 1 / longer, zero, zero, zero, one) @ turn(axis)
    moved = rows(one, zero, -right * side * MOVE_STD, zero, one, -down * side * MOVE_STD, zero, zero, one)
    scaled = rows(factor, zero, zero, zero, factor, zero, zero, zero, one)
    return scaled @ turn(angle) @ stretched @ moved


def _scaled(x: float, like: Tensor, y: float | None = None) -> Tensor:
    return torch.diag(like.new_tensor([x, x if y is None else y, 1.0]))


def _moved(x: float, y: float, like: Tensor) -> Tensor:
    return like.new_tensor([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _padded(images: Tensor, back: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Images with as much of their reflection around them as is seen, and how much that is on each side."""
    side = images.shape[-1]
    middle = (side - 1) / 2
    corners = back.new_tensor([[x, y, 1.0] for x in (-middle, middle) for y in (-middle, middle)])
    places = (back @ corners.T)[:, :2].transpose(0, 1).flatten(1)
    reach = torch.cat([-places.amin(1), places.amax(1)]) + 2 * APRON - middle
    left, top, right, bottom = (int(each) for each in reach.clamp(0, side - 1).ceil().tolist())
    return functional.pad(images, (left, right, top, bottom), mode="reflect"), (left, right, top, bottom)


def _filtered(images: Tensor, taps: Tensor, stride: int, padding: int, dim: int) -> Tensor:
    shape, steps, sides = [1, 1], [1, 1], [0, 0]
    shape[dim - 2], steps[dim - 2], sides[dim - 2] = len(taps), stride, padding
    weight = taps.to(images).reshape(1, 1, *shape).expand(images.shape[1], -1, -1, -1)
    return functional.conv2d(images, weight, stride=steps, padding=sides, groups=images.shape[1])


def _filtered_up(images: Tensor) -> Tensor:
    """Twice the resolution: zeros between the pixels, then the filter, in each direction."""
    taps = torch.tensor(SYM6).flip(0)
    for dim in (3, 2):
        between = torch.stack([images, torch.zeros_like(images)], dim=dim + 1).flatten(dim, dim + 1)
        between = between.narrow(dim, 0, between.shape[dim] - 1)
        images = _filtered(between, taps, 1, (len(taps) + 1) // 2, dim)
    return images


def _filtered_down(images: Tensor) -> Tensor:
    """Half the resolution, without the apron."""
    taps = torch.tensor(SYM6)
    for dim in (3, 2):
        images = _filtered(images, taps, 2, (len(taps) - 1) // 2, dim)
        images = images.narrow(dim, APRON, images.shape[dim] - 2 * APRON)
    return images
