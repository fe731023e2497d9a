"""The figures: what is drawn where, and that one look means one thing."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.rotated import rotated_basis
from anisodiff.paths.schedules import ExponentSchedule
from anisodiff.report import drawing, geometry_figures, plots, tables, training_figures
from anisodiff.solvers.registry import SOLVERS
from anisodiff.storage import checkpoints

ROOT = Path(__file__).parents[1]


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def drawn(line: Line2D) -> tuple[Any, ...]:
    """The look of a line, as it came out."""
    return line.get_color(), line.get_marker(), line._unscaled_dash_pattern, line.get_markerfacecolor()


@pytest.fixture(autouse=True)
def closed():
    """Figures, closed after each test."""
    yield
    plt.close("all")


def test_published_values_have_panels_of_their_own():
    tidy = pd.DataFrame(
        {"dataset": "cifar10", "method": ["a", "a"], "nfe": [5, 9], "mean": [9.0, 3.0], "error": 0.1, "images": 50000,
         "features": "inception", "on_metric": False}
    )  # fmt: skip
    methods = {"a": ("edm", "heun")}
    published = tables.published_values("cifar10", str(ROOT / "config/published.csv"), ["EDM", "g ani"])
    ours, theirs = plots.distance_against_nfe(tidy, methods, drawing.looks(methods), published).axes
    assert labels(ours) == ["best of all", "a"]
    assert labels(theirs) == ["best of all", "EDM, published\n(edm-cifar10-32x32-cond-vp)",
                              "g ani, published\n(edm-cifar10-32x32-cond-vp finetuned)"]  # fmt: skip
    assert theirs.lines[1].get_ydata().tolist() == [35.55, 14.44, 6.80, 4.32, 3.11]
    assert ours.get_ylim() == theirs.get_ylim()
    assert "published" in theirs.get_title(loc="left")


def test_many_published_values_are_shared_out(tidy):
    file = str(ROOT / "config/published.csv")
    rows = pd.read_csv(file)
    of_cifar = rows[rows["dataset"] == "cifar10"]
    every = sorted(set(of_cifar.dropna(subset="nfe")["method"]))  # what says at how many evaluations
    assert len(every) < of_cifar["method"].nunique()
    published = tables.published_values("cifar10", file, every)
    figure = plots.distance_against_nfe(tidy, METHODS, drawing.looks(METHODS), published)
    drawn = [label for axes in figure.axes if axes.get_visible() for label in labels(axes) if "published" in label]
    assert sorted(label.split(", published")[0] for label in drawn) == every
    assert all(len(axes.get_legend().get_texts()) <= plots.LINES + 1 for axes in figure.axes if axes.get_visible())


METHODS = {
    "edm": ("edm", "heun"), "edm-midpoint": ("edm", "midpoint"), "edm-finetuned": ("edm", "midpoint"),
    "ddim": ("edm", "euler"), "ipndm": ("edm", "ipndm"), "unipc": ("edm", "unipc"), "iso": ("iso", "midpoint"),
    "ani": ("ani", "midpoint"), "ani-ipndm": ("ani", "ipndm"),
}  # fmt: skip


@pytest.fixture
def tidy():
    rows = [
        {"dataset": "toy", "method": name, "nfe": nfe, "mean": 9.0 / nfe + k / 100, "error": 0.1, "images": 50,
         "features": "digits-cnn", "on_metric": False}
        for k, name in enumerate(METHODS) for nfe in (5, 9)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_colour_is_the_path_and_line_and_marker_the_solver():
    look = drawing.looks(METHODS)
    for one, (path, solver) in METHODS.items():
        for other, (its_path, its_solver) in METHODS.items():
            assert (look[one]["color"] == look[other]["color"]) == (path == its_path)
            same = [look[one][key] == look[other][key] for key in ("linestyle", "marker")]
            assert (all(same), any(same)) == (solver == its_solver,) * 2
    assert look["edm-midpoint"] != look["edm-finetuned"]
    assert drawing.path_colours(["edm", "iso", "ani"])["ani"] == look["ani"]["color"]
    everyone = {(str(dash), mark) for dash, mark in drawing.SOLVERS.values()}
    assert set(drawing.SOLVERS) == set(SOLVERS)
    assert len(everyone) == len({mark for _, mark in everyone}) == len(SOLVERS)


def test_a_path_keeps_its_colour_whatever_else_is_configured():
    alone, beside = drawing.path_colours(["ani"]), drawing.path_colours(["new", "iso", "ani", "another"])
    assert alone["ani"] == beside["ani"]
    assert beside == drawing.path_colours(["another", "ani", "new"]) | {"iso": beside["iso"]}
    assert len({*beside.values()}) == len(beside)


def test_unknown_solvers_get_looks_by_name():
    given = {"one": ("edm", "zz"), "two": ("edm", "aa"), "three": ("edm", "heun")}
    look = drawing.looks(given)
    assert look == drawing.looks(dict(reversed(given.items())))
    assert len({(str(each["linestyle"]), each["marker"]) for each in look.values()}) == 3
    known = {(str(dash), marker) for dash, marker in drawing.SOLVERS.values()}
    assert not known & {(str(dash), marker) for dash, marker in drawing.FURTHER_LINES}


def test_known_paths_differ_in_grey_print():
    luminance = [
        np.dot(np.square(colors.to_rgb(colour)), (0.2126, 0.7152, 0.0722)) for colour in drawing.PATHS.values()
    ]
    assert (np.diff(np.sort(np.cbrt(luminance))) > 0.08).all()


def test_every_method_is_in_one_panel_of_few(tidy):
    panels = plots.panels_of(METHODS)
    assert [name for names in panels for name in names] == list(METHODS)
    assert all(len(names) <= plots.LINES for names in panels)
    assert ["iso", "ani", "ani-ipndm"] in panels
    none = tables.published_values("toy", "", [])
    figure = plots.distance_against_nfe(tidy, METHODS, drawing.looks(METHODS), none)
    for axes, names in zip(figure.axes, panels, strict=False):
        assert labels(axes) == ["best of all", *names]
        assert axes.lines[0].get_ydata().tolist() == pytest.approx([9 / 5, 1.0])
        assert axes.get_xlim() == figure.axes[0].get_xlim()


def test_a_row_that_learned_the_metric_is_not_the_best_of_all(tidy):
    tidy.loc[tidy["method"] == "ani", "mean"] = 0.1
    look, none = drawing.looks(METHODS), tables.published_values("toy", "", [])
    for on_metric, best in ((False, 0.1), (True, 1.0)):
        tidy["on_metric"] = (tidy["method"] == "ani") & on_metric
        band = plots.distance_against_nfe(tidy, METHODS, look, none).axes[0].lines[0]
        assert band.get_ydata().tolist()[-1] == pytest.approx(best)


def test_methods_look_the_same_in_every_figure(tidy, tmp_path):
    look, none = drawing.looks(METHODS), tables.published_values("toy", "", [])
    chosen = ["edm", "ipndm", "ani-ipndm"]
    files = {}
    for name in chosen:
        files[name] = str(tmp_path / f"{name}.csv")
        rows = {"kind": ["state", "state", "denoised", "denoised"], "evaluations": [1, 2, 1, 2], "images": 50}
        pd.DataFrame(rows | {"distance": [4.0, 2.0, 3.0, 1.0], "features": "digits-cnn"}).to_csv(files[name])
    panels = plots.distance_against_nfe(tidy, METHODS, look, none).axes
    _, right = geometry_figures.convergence(files, look).axes
    ladder = plots.ladder(tidy, chosen, look).axes[0]
    in_panels = {bars.get_label(): bars.lines[0] for axes in panels for bars in axes.containers}
    for name, at_nodes, in_ladder in zip(chosen, right.lines, ladder.containers, strict=True):
        assert at_nodes.get_label() == name
        assert drawn(in_panels[name]) == drawn(at_nodes) == drawn(in_ladder.lines[0])
        assert drawn(at_nodes)[:2] == (look[name]["color"], look[name]["marker"])
    assert drawn(in_panels["edm-midpoint"]) != drawn(in_panels["edm-finetuned"])


@pytest.fixture
def likely(tidy):
    """The table with bits per dimension of two networks over their paths."""
    for column, of in (("bits_per_dim", {"iso": 3.0, "ani": 2.9}), ("bits_per_dim_bound", {"iso": 3.5})):
        tidy[column] = tidy["method"].map(of)
        tidy[f"{column}_error"] = 0.02
    return tidy


def test_bits_stand_against_the_distance_at_the_largest_budget(likely):
    look = drawing.looks(METHODS)
    published = tables.published_values("cifar10", str(ROOT / "config/published.csv"), ["FP-Noise (Mix)", "LSGM"])
    flow, bound = plots.bits_against_distance(likely, METHODS, look, published).axes
    assert labels(bound) == ["iso, NFE 9", "ani, NFE 9", "FP-Noise (Mix), published", "LSGM, published"]
    for axes, bits in ((flow, {"iso": 3.0, "ani": 2.9}), (bound, {"iso": 3.5})):
        for name, bars in zip(bits, axes.containers, strict=False):
            mean = likely.set_index(["method", "nfe"]).loc[(name, 9), "mean"]
            assert bars.lines[0].get_xydata().tolist() == [[mean, bits[name]]]
            assert (bars.has_xerr, bars.has_yerr) == (True, True)
            assert drawn(bars.lines[0])[:2] == (look[name]["color"], look[name]["marker"])
        assert axes.get_xscale() == "log"
    assert [each.lines[0].get_xydata().tolist() for each in flow.containers[2:]] == [[[2.87, 3.20]]]
    assert [each.lines[0].get_xydata().tolist() for each in bound.containers[1:]] == [[[2.10, 3.43]]]


def test_bits_stand_at_a_budget_that_most_have(likely):
    """One row was drawn at more evaluations too, and one only at those: their distances would mean something else."""
    more = likely[likely["nfe"] == 9].assign(nfe=35, mean=1.0)
    look, published = drawing.looks(METHODS), tables.published_values("toy", "", [])
    both = pd.concat([likely, more[more["method"] == "ani"]])
    assert labels(plots.bits_against_distance(both, METHODS, look, published).axes[1]) == ["iso, NFE 9", "ani, NFE 9"]
    apart = pd.concat([likely[likely["method"] != "ani"], more[more["method"] == "ani"]])
    assert labels(plots.bits_against_distance(apart, METHODS, look, published).axes[1]) == ["iso, NFE 9", "ani, NFE 35"]


def test_bits_are_drawn_where_likelihoods_were_asked_for(likely):
    assert tables.bits_columns(likely) == ["bits_per_dim", "bits_per_dim_bound"]
    assert tables.bits_columns(likely[["method", "mean"]]) == []
    only, none = likely.drop(columns="bits_per_dim"), tables.published_values("toy", "", [])
    assert len(plots.bits_against_distance(only, METHODS, drawing.looks(METHODS), none).axes) == 1


def test_of_many_subspaces_some_are_drawn():
    rates = torch.linspace(-1, 1, 64)
    path = NoisePath(rotated_basis("separable:64", (1, 8, 8)), ExponentSchedule(rates, (1e-9, 6400.0)))
    (levels,), (ratios,) = (draw({"many": path}, {}, 80.0).axes for draw in (plots.learned_levels, plots.log_ratio))
    assert labels(levels) == [f"many, subspace {j}" for j in (1, 22, 43, 64)]
    assert labels(ratios) == [f"many: $g_1/g_{{{j}}}$" for j in (22, 43, 64)]


def test_many_paths_are_shared_out_with_the_first_behind_each():
    def path(j: int) -> NoisePath:
        return NoisePath(rotated_basis(f"separable:{j}", (1, 8, 8)), ExponentSchedule(torch.ones(j), (1e-9, 6400.0)))

    ends = np.log([1e-9, 6400.0])
    warp = Warp(path(1), ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, 9, dtype=torch.float64)[None] ** 0.5)
    first, second = plots.learned_levels({"a": path(1), "b": path(3), "c": path(2)}, {"w": (warp, "a")}, 80.0).axes
    assert labels(first) == ["a", "w (warped)", "b, subspace 1", "b, subspace 2", "b, subspace 3"]
    assert labels(second) == ["a", "c, subspace 1", "c, subspace 2"]
    grey, own = second.lines[0], first.lines[0]
    assert np.array_equal(grey.get_xydata(), own.get_xydata())
    assert (grey.get_color(), own.get_color()) == ("0.82", drawing.path_colours("abc")["a"])


def test_paths_that_are_equal_are_one_line_by_all_their_names():
    paths = {
        name: NoisePath(rotated_basis("separable:2", (1, 8, 8)), ExponentSchedule(torch.tensor(rates), (1e-9, 6400.0)))
        for name, rates in {"a": [0.0, 1.0], "b": [0.0, 1.0], "c": [0.0, 1.5]}.items()
    }
    (levels,) = plots.learned_levels(paths, {}, 80.0).axes
    assert labels(levels) == [f"{name}, subspace {j}" for name in ("a = b", "c") for j in (1, 2)]


def test_a_learned_basis_is_drawn_by_the_vectors_that_turned_most():
    basis = rotated_basis("separable:64", (1, 8, 8))
    assert not plots.is_turned(basis)
    angle = 0.1
    with torch.no_grad():
        basis.turn[0] = angle  # rows 0 and 1 of the first factor: sixteen vectors turn by it, the others stay
    assert plots.is_turned(basis)
    figure = plots.learned_bases({"turned": basis}, count=3)
    before, after = np.array(figure.axes).reshape(2, 3)
    assert [text.get_text() for text in before[0].texts] == ["turned: 1.4° on average"]
    assert [axes.get_title() for axes in after] == ["5.7°"] * 3
    for old, new in zip(before, after, strict=True):
        old, new = (axes.images[0].get_array() - 0.5 for axes in (old, new))
        cosine = (old * new).sum() / np.sqrt((old**2).sum() * (new**2).sum())
        assert cosine == pytest.approx(np.cos(angle), abs=1e-5)


def test_strips_have_the_colours_of_their_paths_and_any_number_of_subspaces(tmp_path):
    look = drawing.looks(METHODS)
    files = {}
    for name, subspaces in (("iso", 1), ("ani", 5)):
        files[name] = str(tmp_path / f"{name}.safetensors")
        levels = torch.linspace(1, 0, 4)[:, None].repeat(1, subspaces)
        checkpoints.save(files[name], {"denoised": torch.zeros(4, 3, 1, 8, 8), "levels": levels}, {})
    axes = plots.denoising_strips(files, look).axes
    for schedule, name in ((axes[1], "iso"), (axes[3], "ani")):
        assert {line.get_color() for line in schedule.lines} == {look[name]["color"]}
        assert all(line.get_markersize() > 0 and line.get_linewidth() > 0 for line in schedule.lines)
        assert len({(line.get_linestyle(), line.get_marker()) for line in schedule.lines}) == len(schedule.lines)


def test_a_ladders_rows_are_named_at_their_ends(tidy):
    names = ["edm", "edm-midpoint", "iso", "ani"]
    tidy.loc[tidy["method"] == "iso", "nfe"] = [3, 5]  # it ends before the others do
    look = drawing.looks(METHODS)
    (axes,) = plots.ladder(tidy, names, look).axes
    assert len(axes.containers) == len(names)
    assert all(bars.has_yerr for bars in axes.containers)
    named = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in named] == names
    assert [text.get_color() for text in named] == [look[name]["color"] for name in names]
    places = np.sort(np.log([text.xy[1] for text in named]))
    low, high = np.log(axes.get_ylim())
    assert (np.diff(places) >= 0.055 * (high - low) - 1e-9).all()
    leaders = [colors.to_hex(text.arrow_patch.get_edgecolor()) for text in axes.texts if text.arrow_patch]
    lines = {colors.to_hex(each["color"]) for each in look.values()}
    assert [leader in lines for leader in leaders] == [True, True, False, True]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_paths_stand_at_the_images_they_have_seen_and_one_that_is_not_trained_is_a_level(tidy, tmp_path):
    files = {}
    for name, kimg, heldout in (("ani", 64.0, 3.0), ("iso", 16, 5.0)):
        files[name] = str(tmp_path / f"{name}.safetensors")
        checkpoints.save(files[name], {}, {"kimg": kimg, "heldout": heldout})
    panel, losses = training_figures.against_kimg(tidy, {"a series": {"edm": None, **files}}).axes
    means = tidy.set_index(["method", "nfe"])["mean"]
    bars = {bar.get_label(): bar.lines[0] for bar in panel.containers}
    dotted = [line for line in panel.lines if line.get_linestyle() == ":" and line.get_label().startswith("_")]
    level = {line.get_color(): line.get_ydata()[0] for line in dotted}
    for nfe in (5, 9):
        line = bars[f"NFE {nfe}"]
        assert line.get_xydata().tolist() == [[16, means["iso", nfe]], [64, means["ani", nfe]]]
        assert level[line.get_color()] == means["edm", nfe]
    assert losses.lines[0].get_xydata().tolist() == [[16, 5], [64, 3]]
    assert labels(losses) == ["edm, not trained", "NFE 5", "NFE 9"]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_labels_keep_their_order_and_distance(values):
    places = drawing.spread(values, 1.0)
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(places)[order]) >= 1 - 1e-9).all()
    apart = np.diff(np.sort(values))
    if (apart >= 1).all():
        assert places == pytest.approx(values)
    assert np.mean(places) == pytest.approx(np.mean(values), abs=1e-9)
