"""The error of few-step images: what a path is for, where its loss is not."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.experiment.budgets import steps_for_nfe
from anisodiff.experiment.settings import MethodSettings
from anisodiff.grids.levels import GridRequest
from anisodiff.grids.registry import GRIDS
from anisodiff.solvers.generation import final_states
from anisodiff.solvers.registry import SOLVERS

FIRST_SEED = 1_900_000_000  # of noises that no table reports on
TEACHER_NFE = 35
BATCH = 64
METHOD = MethodSettings(network="base", path="own", grid="path-time", solver="midpoint")


def image_error(denoiser: Denoiser, images: int, nfe: int, device: str) -> Callable[[], float]:
    """Mean squared distance of a denoiser's few-step images to those that it now makes in many, from the same noise.

    Steps are of the paper's sampler: the midpoint, uniform in the path's time.

    Args:
        denoiser: whose images are watched while network and path are trained.
        images: noises.
        nfe: evaluations of the few-step images.
        device: where it computes.
    """
    truth = _drawn(denoiser, images, TEACHER_NFE, device)
    return lambda: float((_drawn(denoiser, images, nfe, device) - truth).square().flatten(1).sum(1).mean())


def _drawn(denoiser: Denoiser, images: int, nfe: int, device: str) -> Float[Tensor, "n c h w"]:
    budget, network = steps_for_nfe(nfe, METHOD), denoiser.network
    request = GridRequest(budget.points, budget.append_zero, denoiser.path)
    levels, step = GRIDS[METHOD.grid].load()(request), SOLVERS[METHOD.solver].with_order()
    seeds, found = range(FIRST_SEED, FIRST_SEED + images), []
    for chosen, z in final_states(denoiser, levels, step, seeds, network.shape, network.classes, BATCH, device):
        found.append(denoiser.path.to_pixels(z)[: len(chosen)].to("cpu", torch.float64))
    return torch.cat(found)
