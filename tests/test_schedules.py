import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anisodiff.errors import InvalidArgument
from anisodiff.paths import schedules
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.schedules import (
    FixedSchedule,
    KnotSchedule,
    LogLinear,
    karras_logs,
    karras_sigmas,
    spectral_curve,
    speed,
)
from anisodiff.paths.subspaces import Subspaces, partition

thetas = st.lists(st.floats(-6, 6), min_size=4, max_size=12)
common = settings(deadline=None, max_examples=60)


def plan_of(theta: list[float]) -> KnotSchedule:
    schedule = KnotSchedule(karras_logs(len(theta) + 1, 1e-9, 0.002, 80.0))
    with torch.no_grad():
        schedule.theta.copy_(torch.tensor([theta], dtype=torch.float64))
    return schedule


@common
@given(theta=thetas)
def test_rises_between_exact_ends(theta):
    curve = plan_of(theta).curve
    t = torch.linspace(0, 1, 257, dtype=torch.float64)
    g = curve(t).g[:, 0]
    assert (g.diff() > 0).all()
    assert g[0].item() == pytest.approx(1e-9, rel=1e-12)
    assert g[-1].item() == pytest.approx(6400, rel=1e-12)


@common
@given(theta=thetas, t=st.floats(0, 1))
def test_rate_is_the_derivative(theta, t):
    time = torch.tensor([t], dtype=torch.float64, requires_grad=True)
    found = plan_of(theta).curve(time)
    (slope,) = torch.autograd.grad(found.g.sum(), time)
    assert found.g_dot.item() == pytest.approx(slope.item(), rel=1e-9)


@common
@given(theta=thetas, t=st.floats(0, 1))
def test_inverse_is_exact(theta, t):
    curve = plan_of(theta).curve
    level = curve(torch.tensor([t], dtype=torch.float64)).g[:, 0].log()
    assert curve.time_of(level).item() == pytest.approx(t, abs=1e-9)


@common
@given(theta=thetas)
def test_parameters_survive_the_round_trip_through_their_curve(theta):
    curve = plan_of(theta).curve
    again = KnotSchedule(curve.logs.detach()).curve
    assert torch.allclose(again.logs, curve.logs, rtol=1e-9, atol=1e-9)


def test_starts_on_edms_grid():
    """The knots above the first are EDM's sigma_i for 32 steps (arXiv:2206.00364, Eq. 5)."""
    logs = karras_logs(32, 1e-9, 0.002, 80.0)
    i = torch.arange(32, dtype=torch.float64)
    edm = (80 ** (1 / 7) + i / 31 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose((logs[0, 1:] / 2).exp(), edm.flip(0)[1:])
    assert logs[0, 0].item() == pytest.approx(math.log(1e-9))
    assert torch.allclose(karras_sigmas(i / 31, 0.002, 80.0), edm.flip(0))


def test_falling_knots_are_refused():
    with pytest.raises(InvalidArgument, match="does not rise from knot"):
        LogLinear(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[0.0, 1.0, 1.0]]))
    with pytest.raises(ValueError, match="from 0 to 1"):
        LogLinear(torch.tensor([0.1, 0.5, 1.0]), torch.tensor([[0.0, 1.0, 2.0]]))


@pytest.mark.parametrize("make", [lambda logs: LogLinear(torch.linspace(0, 1, 4).double(), logs), KnotSchedule])
def test_logs_that_do_not_rise_are_named_by_class_subspace_and_knot(make):
    logs = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).repeat(3, 2, 1)
    logs[2, 1, 2] = 1.0
    with pytest.raises(InvalidArgument, match="subspace 1 of class 2 does not rise from knot 1 to 2"):
        make(logs)
    logs[2, 1, 2] = math.nan
    with pytest.raises(InvalidArgument, match="subspace 1 does not rise from knot 1 to 2"):
        make(logs[2])


@pytest.mark.parametrize("variance", [0.0, 1e-30, -1e-30])
def test_a_subspace_in_which_the_data_does_not_vary_has_no_spectral_schedule(variance):
    """Rounding leaves of a zero what may have either sign."""
    with pytest.raises(InvalidArgument, match=r"not vary in subspace 1, so no closed form"):
        spectral_curve([torch.tensor([2.0, 1.0]), torch.tensor([variance, 0.0])], 1.0, 1e-9, 6400.0)
    with pytest.raises(InvalidArgument, match="do not vary in subspace 0"):
        spectral_curve([torch.zeros(2)], 1.0, 1e-9, 6400.0)


def two_paths(weights=None) -> NoisePath:
    one = karras_logs(32, 1e-9, 0.002, 80.0)
    bent = one.clone()
    bent[:, 1:-1] += 0.3 * torch.sin(torch.linspace(0, 6, 30, dtype=torch.float64))
    return NoisePath(Subspaces(partition(8, "block")), KnotSchedule(torch.cat([one, bent])), weights)


def test_warp_starts_as_the_identity():
    warp = Warp(two_paths())
    t = torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1] + 1e-4
    r, rate = warp(t)
    assert torch.allclose(r, t, atol=1e-12)
    assert torch.allclose(rate, torch.ones_like(rate), rtol=1e-9)


@common
@given(theta=st.lists(st.floats(-3, 3), min_size=31, max_size=31))
def test_warp_rises_to_its_levels(theta):
    path = two_paths(torch.tensor([0.5, 0.5]))
    warp = Warp(path)
    with torch.no_grad():
        warp.schedule.theta.copy_(torch.tensor([theta], dtype=torch.float64))
    t = torch.linspace(0, 1, 65, dtype=torch.float64).requires_grad_()
    r, rate = warp(t)
    assert r[0].item() == pytest.approx(0, abs=1e-9)
    assert r[-1].item() == pytest.approx(1, abs=1e-9)
    assert (r.diff() > 0).all()
    (slope,) = torch.autograd.grad(r.sum(), t, retain_graph=True)
    inside = slice(1, -1)
    assert torch.allclose(rate[inside], slope[inside], rtol=1e-6)
    reached = path.mean_log(path(r).g)
    assert torch.allclose(reached, warp.schedule.curve(t).g[:, 0].log(), atol=1e-8)


def test_splitting_a_subspace_changes_no_label():
    """With weights by rank, a subspace and its two halves give the same mean log-level."""
    g = torch.tensor([[0.2, 3.0]], dtype=torch.float64)
    logs = torch.tensor([[-3.0, 2.0]], dtype=torch.float64)
    fine = torch.tensor([[0, 1], [1, 2]])
    coarse = NoisePath(Subspaces(torch.tensor([[0, 1], [1, 1]])), KnotSchedule(logs.expand(2, -1)))
    split = NoisePath(Subspaces(fine), KnotSchedule(logs.expand(3, -1)))
    assert split.mean_log(g[:, [0, 1, 1]]).item() == pytest.approx(coarse.mean_log(g).item())


def test_spectral_path_moves_at_constant_speed():
    spectra = [torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.01, 0.02])]
    curve = spectral_curve(spectra, 1.0, 1e-9, 6400.0)
    t = torch.linspace(0.003, 0.997, 101, dtype=torch.float64)
    found = curve(t)
    for j, spectrum in enumerate(spectra):
        velocity = speed(found.g[:, j], spectrum.to(torch.float64), 1.0) * found.g_dot[:, j]
        assert (velocity / velocity.mean() - 1).abs().max() < 0.05  # log-linear pieces
    FixedSchedule(curve)


def test_a_closed_form_of_many_subspaces_keeps_some_of_its_nodes(monkeypatch):
    spectra = [torch.tensor([4.0 / 1.5**j], dtype=torch.float64) for j in range(16)]
    whole = spectral_curve(spectra, 1.0, 1e-9, 6400.0)
    monkeypatch.setattr(schedules, "MOST_ENTRIES", 16 * 1000)
    some = spectral_curve(spectra, 1.0, 1e-9, 6400.0)
    assert len(some.nodes) == 1000 < len(whole.nodes) / 5
    assert torch.allclose(some(whole.nodes).g.log(), whole.logs.T, atol=5e-3)
