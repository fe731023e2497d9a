"""Solvers that add noise at every step: of the reverse-time stochastic equation, not of the probability flow.

Their noise comes from the state's source, which `generation.py` gives one generator a seed.
"""

from anisodiff.errors import InvalidArgument
from anisodiff.grids.levels import Levels
from anisodiff.solvers.singlestep import ProbabilityFlow, State, euler


def euler_maruyama(problem: ProbabilityFlow, state: State, k: int, levels: Levels) -> State:
    """Euler and Maruyama's step of the reverse-time equation, in variance-preserving coordinates.

    With `x = z / sqrt(s^2 + g)` and `b = log(s^2 + g)` every subspace follows `dx = -1/2 x db + sqrt(db) dW`; a step
    back by db is `x + (x / 2 + score) db + sqrt(db) xi` (arXiv:2011.13456, Eq. 6), `score = sqrt((s^2 + g) / g) flow`.
    For s = 1 and `g_k = exp(lambda_k beta) - 1` it is the step of the flexible process (arXiv:2206.10365, Eq. 13).

    A step to 0 is a plain Euler step: it returns the denoised image, as those of the other solvers do, and adds no
    noise, which nothing would remove. First order in the moments. One evaluation.

    Raises:
        InvalidArgument: there is no source of noise.
    """
    if state.source is None:
        raise InvalidArgument("solver: euler-maruyama draws noise at every step: give `solve` a source of it")
    if levels.ends_at_zero(k):
        return euler(problem, state, k, levels)
    total, total_next = (problem.denoiser.sigma_data**2 + levels.nodes[each].square() for each in (k, k + 1))
    step = (total / total_next).log()
    noise = problem.path.from_pixels(state.source().to(state.z))
    flow = problem.flow(state.z, levels.nodes[k])
    x = problem.scale(state.z, total.rsqrt() * (1 + step / 2))
    x = x + problem.scale(flow, step * total.sqrt() / levels.nodes[k]) + problem.scale(noise, step.sqrt())
    return State(problem.scale(x, total_next.sqrt()), (flow,), source=state.source)
