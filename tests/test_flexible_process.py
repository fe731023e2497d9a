"""The linear process against its differential equations, its change of variables and its marginals."""

import math

import numpy as np
import pytest
import torch
from exact import measured_orders
from torch.distributions import MultivariateNormal

from anisodiff.errors import InvalidArgument
from anisodiff.exact.flexible_process import FlexibleProcess, critically_damped, factor_heun

D = 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def processes() -> dict[str, FlexibleProcess]:
    basis = torch.linalg.qr(normal(D, D, seed=1))[0]
    noise = basis @ torch.diag(torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)) @ basis.T
    skew = normal(D, D, seed=2)
    drift = (skew - skew.T) / 2
    unit, nothing = torch.eye(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
    return {
        "noise": FlexibleProcess(noise, nothing),
        "drift": FlexibleProcess(unit, drift),
        "both": FlexibleProcess(noise, drift),
    }


@pytest.fixture(params=["noise", "drift", "both"])
def process(request) -> FlexibleProcess:
    return processes()[request.param]


def lyapunov(process: FlexibleProcess, beta: float) -> torch.Tensor:
    """`int exp(-K r) A exp(-K r)^T dr` over [0, beta], by Gauss and Legendre: the solution of
    `S' = -K S - S K^T + A` from 0."""
    roots, weights = np.polynomial.legendre.leggauss(40)
    total = torch.zeros_like(process.noise)
    for root, weight in zip(roots, weights, strict=True):
        phi = process.transition(float(beta * (root + 1) / 2))[0]
        total += weight * beta / 2 * phi @ process.noise @ phi.T
    return total


@pytest.mark.parametrize("beta", [0.01, 1.0, 3.0])
def test_covariance_solves_the_lyapunov_equation(process, beta):
    assert (process.transition(beta)[1] - lyapunov(process, beta)).abs().max() < 1e-13


def test_the_printed_covariance_holds_only_where_noise_and_drift_commute():
    """Theorem 3.5: `I - exp(-beta A)`."""
    for name, process in processes().items():
        printed = torch.eye(D, dtype=torch.float64) - torch.linalg.matrix_exp(-process.noise)
        off = (printed - process.transition(1.0)[1]).abs().max()
        assert off > 0.05 if name == "both" else off < 1e-13


def mixture_density(x: torch.Tensor, phi: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Log density of `phi x0 + N(0, covariance)` for x0 from a mixture of two Gaussians."""
    means = normal(2, D, seed=3)
    factors = normal(2, D, D, seed=4)
    parts = [
        MultivariateNormal(phi @ mean, phi @ factor @ factor.T @ phi.T + covariance).log_prob(x)
        for mean, factor in zip(means, factors, strict=True)
    ]
    return torch.stack(parts).logsumexp(0) - math.log(2)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_densities_change_by_the_determinant(process, beta):
    """`log q(y) - log p(x) - log det Phi` of a mixture is 0."""
    x = normal(7, D, seed=5)
    phi, covariance = process.transition(beta)
    unrolled, m = process.additive(beta)
    added = mixture_density(x @ unrolled.T, torch.eye(D, dtype=torch.float64), m)
    difference = added - mixture_density(x, phi, covariance) - torch.logdet(phi)
    assert difference.abs().max() < 1e-13


def test_noise_alone_is_a_path_in_the_eigenvectors_of_a():
    """`g_k = exp(lambda_k beta) - 1`; at unit variance of the data c_in y is the paper's x, and the flow is the same
    number in both coordinates: `M^{1/2} score_y = Sigma^{1/2} score_x`."""
    process = processes()["noise"]
    rates, vectors = torch.linalg.eigh(process.noise)
    g = torch.expm1(rates * 0.7)
    phi, covariance = process.transition(0.7)
    assert (vectors @ torch.diag(g) @ vectors.T - process.additive(0.7)[1]).abs().max() < 1e-13
    assert (vectors @ torch.diag((1 + g).rsqrt()) @ vectors.T - phi).abs().max() < 1e-13
    x = normal(5, D, seed=6).requires_grad_()
    (score,) = torch.autograd.grad(mixture_density(x, phi, covariance).sum(), x)
    y = (x.detach() @ torch.linalg.inv(phi).T).requires_grad_()
    added = mixture_density(y, torch.eye(D, dtype=torch.float64), process.additive(0.7)[1])
    (score_y,) = torch.autograd.grad(added.sum(), y)
    root = lambda values: vectors @ torch.diag(values.sqrt()) @ vectors.T  # noqa: E731
    assert (score_y @ root(g) - score @ root(-torch.expm1(-rates * 0.7))).abs().max() < 1e-12


def test_langevin_dynamics_by_hand():
    """Critical damping: a double root, `Phi = exp(-beta) [[1 + beta, beta], [-beta, 1 - beta]]`."""
    process = critically_damped(2)
    for beta in (0.1, 1.0, 5.0):
        block = torch.tensor([[1 + beta, beta], [-beta, 1 - beta]], dtype=torch.float64) * math.exp(-beta)
        phi, covariance = process.transition(beta)
        assert (phi - torch.kron(block, torch.eye(2, dtype=torch.float64))).abs().max() < 1e-14
        assert (covariance - lyapunov(process, beta)).abs().max() < 1e-13


def test_noise_on_the_velocities_alone_reaches_the_positions():
    """Corollary 3.4: by omega, at third order in beta; the whole goes to N(0, I)."""
    process = critically_damped(1)
    assert float(process.transition(1e-2)[1][0, 0]) == pytest.approx(4 / 3 * 1e-6, rel=0.03)
    phi, covariance = process.transition(30.0)
    assert phi.abs().max() < 1e-11
    assert (covariance - torch.eye(2, dtype=torch.float64)).abs().max() < 1e-15
    frozen = FlexibleProcess(process.noise, torch.zeros_like(process.drift)).transition(30.0)
    assert (frozen[0][0, 0], frozen[1][0, 0]) == (1, 0)


def carried(integrate, steps: int) -> float:
    """How far the covariance that a linear integrator carries from the start is from the exact one at the end."""
    process = processes()["both"]
    spectrum = torch.diag(torch.tensor([1.0, 0.25, 0.04], dtype=torch.float64))
    marginal = lambda beta: spectrum + process.additive(beta)[1]  # noqa: E731
    score = lambda y, beta: -torch.linalg.solve(marginal(beta), y.T).T  # noqa: E731
    betas = torch.logspace(math.log10(4), -1, steps + 1, dtype=torch.float64)
    matrix = integrate(process, score, torch.eye(D, dtype=torch.float64), betas).T
    end = matrix @ marginal(float(betas[0])) @ matrix.T
    return float((end - marginal(float(betas[-1]))).norm())


def eigenvector_euler(process, score, y, betas):
    """Levels in the present eigenvectors of M_t, as if they were those of a path."""
    for now, after in zip(betas[:-1].tolist(), betas[1:].tolist(), strict=True):
        (levels, vectors), (levels_after, _) = (torch.linalg.eigh(process.additive(beta)[1]) for beta in (now, after))
        flow = score(y, now) @ vectors * levels.sqrt()
        y = y - (flow * (levels_after.sqrt() - levels.sqrt())) @ vectors.T
    return y


def test_the_factors_equation_has_the_right_marginals_at_order_two():
    errors = [carried(factor_heun, steps) for steps in (50, 100, 200)]
    assert errors[-1] < 1e-3
    assert torch.allclose(measured_orders(errors), torch.full((2,), 2.0), atol=0.1)


def test_levels_in_the_present_eigenvectors_do_not_converge():
    errors = [carried(eigenvector_euler, steps) for steps in (50, 400)]
    assert min(errors) > 0.1
    assert errors[1] > errors[0] / 2


def test_what_is_no_such_process_is_refused():
    unit = torch.eye(2, dtype=torch.float64)
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    for noise, drift, words in ((skew, skew, "noise's"), (-unit, skew, "noise's"), (unit, unit, "drift's")):
        with pytest.raises(InvalidArgument, match=words):
            FlexibleProcess(noise, drift)
