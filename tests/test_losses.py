"""Gaussian data, where everything is known: TLSM's value, the best path, and what stochastic steps reach."""

import numpy as np
import pytest
import torch
from exact import ExactGaussian

from anisodiff.objectives.losses import tlsm_loss, warp_loss
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.schedules import KnotSchedule, LogLinear, karras_logs, spectral_curve, speed
from anisodiff.paths.subspaces import Subspaces, partition

G_MIN, G_MAX, C = 1e-9, 6400.0, 0.5
SIDE = 4


def gaussian(path: NoisePath) -> ExactGaussian:
    p = torch.arange(SIDE, dtype=torch.float64)
    spectrum = 2.0 / (1 + p[:, None] ** 2 + p[None, :] ** 2) ** 1.5
    return ExactGaussian(path, spectrum[None])


def karras_path(knots: int = 32) -> NoisePath:
    logs = karras_logs(knots, G_MIN, 0.002, 80.0).expand(2, -1)
    return NoisePath(Subspaces(partition(SIDE, "block")), KnotSchedule(logs))


def spectra(model: ExactGaussian) -> list[torch.Tensor]:
    index = model.path.subspaces.index
    return [model.spectrum[:, index == j].flatten() for j in range(model.path.subspaces.count)]


def closed_form(curve: LogLinear, model: ExactGaussian, c: float = C, points: int = 64) -> torch.Tensor:
    """`sum_j int_0^1 w_j(g_j) gdot_j^2 dt`, by Gauss-Legendre quadrature within each knot interval."""
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(points))
    width = curve.nodes.diff()
    t = curve.nodes[:-1, None] + width[:, None] * (nodes + 1) / 2
    noise = curve(t.flatten())
    total = torch.zeros((), dtype=torch.float64)
    for j, spectrum in enumerate(spectra(model)):
        g = noise.g[:, j]
        w = (spectrum / ((g[:, None] + c) * g[:, None] * (spectrum + g[:, None]))).sum(1)
        total = total + ((w * noise.g_dot[:, j] ** 2).reshape(t.shape) @ weights * width / 2).sum()
    return total


def bound(model: ExactGaussian) -> float:
    """`sum_j (int sqrt(w_j) dg)^2`, below which no path can come."""
    logs = torch.linspace(*torch.tensor([G_MIN, G_MAX], dtype=torch.float64).log().tolist(), 4001, dtype=torch.float64)
    g = logs.exp()
    return sum(torch.trapezoid(speed(g, spectrum, C) * g, logs).item() ** 2 for spectrum in spectra(model))


def draws(model: ExactGaussian, batch: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(batch, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)  # noqa: E731
    x0 = model.path.to_pixels(normal() * model.spectrum.sqrt())
    t = (torch.rand(batch, generator=generator, dtype=torch.float64) + torch.arange(batch)) / batch
    return x0, normal(), t


def test_loss_of_the_exact_network_is_the_closed_form():
    model = gaussian(karras_path())
    losses = torch.cat([tlsm_loss(model, *draws(model, 20_000, seed), c=C).detach() for seed in range(5)])
    error = losses.mean() - closed_form(model.path.schedule.curve, model)
    assert abs(error) < 4 * losses.std() / len(losses) ** 0.5


def test_spectral_path_meets_the_bound():
    model = gaussian(karras_path())
    curve = spectral_curve(spectra(model), C, G_MIN, G_MAX, resolution=2000)
    best = bound(model)
    assert closed_form(curve, model).item() == pytest.approx(best, rel=2e-3)
    assert closed_form(curve, model).item() > best * (1 - 1e-4)


def best_of_the_family(model: ExactGaussian) -> float:
    """Deterministic minimisation of the closed form over 32 log-linear knots, from the spectral path."""
    t = torch.linspace(0, 1, 32, dtype=torch.float64)
    schedule = KnotSchedule(spectral_curve(spectra(model), C, G_MIN, G_MAX)(t).g.log().T)
    optimizer = torch.optim.LBFGS(
        schedule.parameters(), max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure():
        optimizer.zero_grad()
        loss = closed_form(schedule.curve, model)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closed_form(schedule.curve, model).item()


@pytest.mark.parametrize("mode", ["envelope", "full"])
def test_stochastic_steps_find_the_best_path(mode):
    path = karras_path()
    model = gaussian(path)
    best, floor = best_of_the_family(model), bound(model)
    assert floor < best < 1.06 * floor
    first = closed_form(path.schedule.curve, model).item()
    steps = 1500
    optimizer = torch.optim.Adam(path.schedule.parameters(), lr=0.03)
    average = None
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        x0, eps, t = draws(model, 512, step)
        probes = None
        if mode == "full":
            probes = torch.randn(1, 64, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(step)).sign().double()
        order = torch.randperm(512, generator=torch.Generator().manual_seed(step))  # probes on any times
        optimizer.zero_grad()
        tlsm_loss(model, x0[order], eps[order], t[order], None, C, probes).mean().backward()
        optimizer.step()
        theta = path.schedule.theta.detach()
        average = theta.clone() if step < steps // 2 else average.lerp(theta, 0.02)
    with torch.no_grad():
        path.schedule.theta.copy_(average)
    last = closed_form(path.schedule.curve, model).item()
    assert last < 1.03 * best < first
    assert last > floor


def test_warp_loss_by_brute_force():
    """One image at a time, with each formula of Section 5.2 written out, on unequal levels and a bent warp."""
    logs = karras_logs(6, 1e-4, 0.05, 4.0)
    path = NoisePath(Subspaces(partition(SIDE, "block")), KnotSchedule(torch.cat([logs, logs + 0.0]))).requires_grad_(
        False
    )
    with torch.no_grad():
        path.schedule.theta[1] += torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
    model, warp = gaussian(path), Warp(path, knots=6)
    with torch.no_grad():
        warp.schedule.theta += torch.linspace(0.3, -0.3, 5, dtype=torch.float64)
    x0, eps, _ = draws(model, 3, 0)
    start, end, test = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.9, 0.6, 0.1], [0.7, 0.5, 0.0], [0.8, 0.51, 0.06])
    )
    found = warp_loss(model, path, warp, x0, eps, start, end, test, None, C)

    def values(t: torch.Tensor):
        time = t.clone().requires_grad_()
        m = path.scale(torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64), path(warp(time[None])[0]).g)
        rate = torch.autograd.functional.jacobian(
            lambda s: path.scale(torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64), path(warp(s[None])[0]).g), t
        )
        return m.detach(), rate.detach()

    for i in range(3):
        flow = lambda x, m: -m.sqrt() * x / (model.spectrum + m)  # noqa: E731
        (m, m_dot), (m_hat, _), (m_t, m_t_dot) = (values(s) for s in (start[i], (start[i] + end[i]) / 2, test[i]))
        x = path.from_pixels(x0[i : i + 1]) + m.sqrt() * eps[i]
        f = flow(x, m)
        x_hat = x - (m_hat.sqrt() - m.sqrt()) * f
        slope = (flow(x_hat, m_hat) - f) / (m_hat.sqrt() - m.sqrt())
        step = m_t.sqrt() - m.sqrt()
        reached = x - step * f - step**2 / 2 * slope
        difference = m_t_dot / m_t.sqrt() * (flow(reached, m_t) - (f + step * slope))
        h = (difference**2 / (m_t + C)).sum()
        net = f / m.sqrt()
        a = m_dot**2 / (m + C)
        l_hat = (-2 * (x - m.sqrt() * eps[i] - x) / m * a * net + 2 * a * net**2).sum()
        assert found[0][i].item() == pytest.approx(h.item(), rel=1e-8)
        assert found[1][i].item() == pytest.approx(l_hat.item(), rel=1e-8)


@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-6])
def test_warp_loss_and_its_gradient_go_to_their_limit_where_start_and_end_meet(apart):
    """The discretisation loss vanishes and score matching is left, also where levels are all but flat."""
    logs = karras_logs(6, 1e-4, 0.05, 4.0)
    flat = logs.clone()
    flat[:, 3] = flat[:, 2] + 1e-6
    path = NoisePath(Subspaces(partition(SIDE, "block")), KnotSchedule(torch.cat([flat, flat]))).requires_grad_(False)
    model, warp = gaussian(path), Warp(path, knots=6)
    start = torch.cat([torch.tensor([1e-6, 0.5, 1.0]), torch.linspace(0.01, 0.99, 61)]).double()
    end = (start - apart).clamp(min=0)
    x0, eps, share = draws(model, len(start), 0)
    found = warp_loss(model, path, warp, x0, eps, start, end, torch.lerp(end, start, share), None, C)
    assert found[0].abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(sum(found).mean(), warp.schedule.theta, retain_graph=True)
    (limit,) = torch.autograd.grad(found[1].mean(), warp.schedule.theta)
    assert limit.abs().max() > 1e-3
    torch.testing.assert_close(gradient, limit, rtol=1e-9, atol=1e-12)


def test_a_learned_warp_lowers_the_discretisation_loss():
    """From r(t) = t, on a path whose time is badly spent, with gamma alone learning."""
    logs = torch.cat([karras_logs(16, G_MIN, 0.002, 80.0)[:, :1], torch.linspace(-2, 8.7640, 15).double()[None]], dim=1)
    path = NoisePath(Subspaces(partition(SIDE, "whole")), KnotSchedule(logs)).requires_grad_(False)
    model, warp = gaussian(path), Warp(path, knots=16)
    optimizer = torch.optim.Adam(warp.parameters(), lr=0.02)

    def value(seed: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        x0, eps, start = draws(model, batch, seed)
        end = (start - 1 / 8).clamp(min=0)
        test = torch.lerp(end, start, torch.rand(batch, generator=torch.Generator().manual_seed(seed)).double())
        discretisation, score_matching = warp_loss(model, path, warp, x0, eps, start, end, test, None, C)
        return discretisation.mean(), score_matching.mean()

    before = value(10_000, 4096)[0].item()
    for step in range(200):
        optimizer.zero_grad()
        sum(value(step, 512)).backward()
        optimizer.step()
    assert value(10_000, 4096)[0].item() < 0.8 * before
    assert path.schedule.theta.grad is None


def bent_path() -> NoisePath:
    logs = karras_logs(6, 1e-4, 0.05, 4.0)
    path = NoisePath(Subspaces(partition(SIDE, "block")), KnotSchedule(torch.cat([logs, logs])))
    with torch.no_grad():
        path.schedule.theta[1] += torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
    return path


def discretisation_loss(model, *drawn):
    """Sum of the two losses in the path's own time."""
    return sum(warp_loss(model, model.path, None, *drawn))


def steps(model, batch: int, seed: int):
    x0, eps, start = draws(model, batch, seed)
    end = (start - 1 / 8).clamp(min=0)
    return x0, eps, start, end, torch.lerp(end, start, torch.rand(batch, dtype=torch.float64).fill_(0.3))


def test_discretisation_of_a_path_is_that_of_the_warp_that_does_nothing():
    path = bent_path()
    model = gaussian(path)
    drawn = steps(model, 8, 0)
    with torch.no_grad():
        found = discretisation_loss(model, *drawn, None, C)
        expected = sum(warp_loss(model, path, Warp(path, knots=6), *drawn, None, C))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradient_of_the_discretisation_loss_by_finite_differences():
    path = bent_path()
    model = gaussian(path)
    drawn = steps(model, 16, 1)
    value = lambda: discretisation_loss(model, *drawn, None, C).mean()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(), path.schedule.theta)
    apart = 1e-6
    for place in ((0, 1), (1, 3)):
        with torch.no_grad():
            path.schedule.theta[place] += apart
            above = value()
            path.schedule.theta[place] -= 2 * apart
            below = value()
            path.schedule.theta[place] += apart
        assert float(gradient[place]) == pytest.approx(float((above - below) / (2 * apart)), rel=1e-5)


def test_a_path_learns_to_be_discretised():
    """Learning is in both subspaces, from EDM's schedule."""
    path = bent_path()
    model = gaussian(path)
    optimizer = torch.optim.Adam([path.schedule.theta], lr=0.02)
    before = discretisation_loss(model, *steps(model, 4096, 10_000), None, C).mean().item()
    for step in range(300):
        optimizer.zero_grad()
        discretisation_loss(model, *steps(model, 256, step), None, C).mean().backward()
        optimizer.step()
    assert discretisation_loss(model, *steps(model, 4096, 10_000), None, C).mean().item() < 0.92 * before
