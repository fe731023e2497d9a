"""The figures: what is drawn where, and that one look means one thing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anisodiff.report import drawing, plots
from anisodiff.solvers.registry import SOLVERS

ROOT = Path(__file__).parents[1]


def test_published_values_are_drawn_behind(tmp_path):
    tidy = pd.DataFrame(
        {"dataset": "cifar10", "method": ["a", "a"], "nfe": [5, 9], "mean": [9.0, 3.0], "std": 0.1, "images": 50000,
         "features": "inception"}
    )  # fmt: skip
    published = plots.published_values("cifar10", str(ROOT / "config/published.csv"), ["EDM", "g ani"])
    axes = plots.distance_against_nfe(
        tidy, {"a": ("edm", "heun")}, drawing.looks({"a": ("edm", "heun")}), published
    ).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["EDM, published\n(edm-cifar10-32x32-cond-vp)",
                      "g ani, published\n(edm-cifar10-32x32-cond-vp finetuned)", "a"]  # fmt: skip
    assert axes.lines[0].get_ydata().tolist() == [35.55, 14.44, 6.80, 4.32, 3.11]


METHODS = {
    "edm": ("edm", "heun"), "edm-midpoint": ("edm", "midpoint"), "edm-finetuned": ("edm", "midpoint"),
    "ddim": ("edm", "euler"), "ipndm": ("edm", "ipndm"), "unipc": ("edm", "unipc"), "iso": ("iso", "midpoint"),
    "ani": ("ani", "midpoint"), "ani-ipndm": ("ani", "ipndm"),
}  # fmt: skip


@pytest.fixture
def tidy():
    rows = [
        {"dataset": "toy", "method": name, "nfe": nfe, "mean": 9.0 / nfe + k / 100, "std": 0.1, "images": 50,
         "features": "digits-cnn"}
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
    assert look["edm-midpoint"]["fillstyle"] != look["edm-finetuned"]["fillstyle"]
    assert drawing.path_colours(["edm", "iso", "ani"])["ani"] == look["ani"]["color"]
    everyone = {(str(dash), mark) for dash, mark in drawing.SOLVERS.values()}
    assert set(drawing.SOLVERS) == set(SOLVERS)
    assert len(everyone) == len({mark for _, mark in everyone}) == len(SOLVERS)


def test_every_method_is_in_one_panel_of_few(tidy):
    panels = plots.panels_of(METHODS)
    assert [name for names in panels for name in names] == list(METHODS)
    assert all(len(names) <= plots.LINES for names in panels)
    assert ["iso", "ani", "ani-ipndm"] in panels
    none = plots.published_values("toy", "", [])
    figure = plots.distance_against_nfe(tidy, METHODS, drawing.looks(METHODS), none)
    for axes, names in zip(figure.axes, panels, strict=False):
        shown = [text.get_text() for text in axes.get_legend().get_texts()]
        assert shown == ["best of all", *names]
        assert axes.lines[0].get_ydata().tolist() == pytest.approx([9 / 5, 1.0])


def test_a_ladders_rows_are_named_at_their_ends(tidy):
    names = ["edm", "edm-midpoint", "iso", "ani"]
    look = drawing.looks(METHODS)
    (axes,) = plots.ladder(tidy, names, look).axes
    assert [text.get_text() for text in axes.texts] == names
    assert [text.get_color() for text in axes.texts] == [look[name]["color"] for name in names]
    places = np.log([text.xyann[1] for text in axes.texts])
    low, high = np.log(axes.get_ylim())
    assert (np.diff(places) >= 0.055 * (high - low) - 1e-9).all()  # the rows' distances rise in this order


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_labels_keep_their_order_and_distance(values):
    places = drawing.spread(values, 1.0)
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(places)[order]) >= 1 - 1e-9).all()
    apart = np.diff(np.sort(values))
    if (apart >= 1).all():
        assert places == pytest.approx(values)
    assert np.mean(places) == pytest.approx(np.mean(values), abs=1e-9)
