"""Formats of an exported method: a document with everything, and the lists of sigmas that other software reads."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal


def decimals(sigmas: Sequence[float]) -> str:
    """Numbers between commas, without exponents, which ComfyUI's ManualSigmas would take for numbers of their own."""
    return ", ".join(format(Decimal(repr(each)), "f") for each in sigmas)


@dataclass(frozen=True)
class SigmaList:
    """A list of sigmas as some software reads it.

    Attributes:
        software: who reads it.
        takes: where it is given to it.
        samplers: those that make our steps, by the solver's name, with its order where it remembers.
        write: the text of the list.
        flow: sigmas are those of a rectified flow, `sigma / (1 + sigma)`, and the software appends the last one, 0.
    """

    software: str
    takes: str
    samplers: Mapping[str, str]
    write: Callable[[Sequence[float]], str] = json.dumps
    flow: bool = False


UNIPC = "UniPCMultistepScheduler(solver_order={}{})"
FLOW = ", use_flow_sigmas=True, prediction_type='flow_prediction'"
LISTS = {
    "k-diffusion": SigmaList(
        "k-diffusion",
        "a sampler's argument sigmas",
        {"euler": "sample_euler", "heun": "sample_heun", "dpm2": "sample_dpm_2", "dpmpp-2": "sample_dpmpp_2m"},
    ),
    "comfyui": SigmaList(
        "ComfyUI",
        "the node ManualSigmas",
        {"euler": "euler", "heun": "heun", "dpm2": "dpm_2", "dpmpp-2": "dpmpp_2m"},
        decimals,
    ),
    "diffusers": SigmaList(
        "diffusers",
        "EulerDiscreteScheduler.set_timesteps(sigmas=), or the sigmas of another scheduler after set_timesteps",
        {
            "euler": "EulerDiscreteScheduler()",
            "heun": "HeunDiscreteScheduler()",
            "dpmpp-2": "DPMSolverMultistepScheduler(solver_order=2)",
            "dpmpp-3": "DPMSolverMultistepScheduler(solver_order=3)  # under 15 steps",
            "exp-ab-2": "DPMSolverMultistepScheduler(solver_order=2, solver_type='heun')",
            **{f"unipc-{order}": UNIPC.format(order, "") for order in (1, 2, 3)},
        },
    ),
    "diffusers-flow": SigmaList(
        "diffusers",
        "set_timesteps(sigmas=), an array, of a scheduler without shift",
        {
            "euler": "FlowMatchEulerDiscreteScheduler()",
            **{f"unipc-{order}": UNIPC.format(order, FLOW) for order in (1, 2, 3)},
        },
        flow=True,
    ),
}
DOCUMENT = "json"
FORMATS = (DOCUMENT, *LISTS)
