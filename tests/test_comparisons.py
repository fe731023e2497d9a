"""Spreads and comparisons on synthetic features and tables, whose answers are known."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from anisodiff.errors import StageError
from anisodiff.metrics import fidelity, frechet, spread
from anisodiff.report.cells import cells, errors_over_images
from anisodiff.report.comparisons import Comparisons, bits_difference, compare

NORMAL = torch.distributions.Normal(0, 1)


def gaussian(dimension: int) -> frechet.Gaussian:
    return frechet.Gaussian(torch.zeros(dimension).double(), torch.eye(dimension).double())


def drawn(count: int, seed: int, shift: float = 0.0, dimension: int = 4) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) + shift


def measured(features: torch.Tensor, truth: frechet.Gaussian) -> tuple[float, np.ndarray]:
    groups = spread.in_groups(features)
    total = groups[0]
    for each in groups[1:]:
        total = total + each
    return frechet.distance(total.gaussian, truth), np.array(spread.without_each(groups, truth))


def test_leaving_out_a_group_is_measuring_the_others():
    features, truth = drawn(100, 0), gaussian(4)
    _, left = measured(features, truth)
    statistics = frechet.FeatureStatistics(4)
    statistics.add(features[10:])
    assert len(left) == spread.GROUPS
    assert left[0] == pytest.approx(frechet.distance(statistics.gaussian, truth), rel=1e-9)


def test_error_is_the_spread_of_fresh_images_and_the_correction_takes_the_bias_out():
    truth = gaussian(4)
    found = [measured(drawn(400, seed, 0.5), truth) for seed in range(200)]
    values = np.array([value for value, _ in found])
    errors = np.array([spread.error(left) for _, left in found])
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(ddof=1), rel=0.15)
    exact = 4 * 0.5**2
    plain, unbiased = values.mean() - exact, np.mean([spread.corrected(*each) for each in found]) - exact
    standard = values.std(ddof=1) / 200**0.5
    assert plain > 3 * standard  # what few images add
    assert abs(unbiased) < 3 * standard


def table(values: dict[str, np.ndarray], dataset: str = "toy") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and left-out means of methods whose distance is a plain mean of numbers, `[training seeds, images]`."""
    rows, left = [], []
    for method, of_seeds in values.items():
        for seed, numbers in enumerate(of_seeds):
            key = {"method": method, "nfe": 5, "training_seed": seed, "range": 0}
            about = {"dataset": dataset, "images": len(numbers), "evaluations": 5, "features": "digits-cnn"}
            rows.append(key | about | {"distance": numbers.mean(), "version": "1", "commit": "a"})
            parts = np.split(numbers, spread.GROUPS)
            for group in range(spread.GROUPS):
                others = np.concatenate([part for at, part in enumerate(parts) if at != group])
                left.append(key | {"group": group, "distance": others.mean()})
    return pd.DataFrame(rows), pd.DataFrame(left)


def test_a_difference_on_shared_noises_is_surer_than_its_rows():
    generator = np.random.default_rng(0)
    common, own = generator.normal(size=1000), 0.1 * generator.normal(size=(2, 1000))
    rows, left = table({"a": (common + own[0])[None], "b": (common + own[1] + 0.02)[None]})
    found = Comparisons(rows, left).difference("b", "a", 5)
    of_rows = errors_over_images(left)
    assert found.value == pytest.approx(own[1].mean() - own[0].mean() + 0.02)
    assert found.error == pytest.approx((own[1] - own[0]).std() / 1000**0.5, rel=0.4)
    assert found.error < 0.2 * of_rows["a", 5]
    assert found.degrees_of_freedom == spread.GROUPS - 1


def test_a_range_without_groups_leaves_the_spread_over_images_unknown():
    """A range of one shard, whose features were not kept, has none."""
    numbers = np.random.default_rng(3).normal(size=(2, 1000))
    rows, left = table({"a": numbers[:1], "b": numbers[1:]})
    rows = pd.concat([rows, rows.assign(range=1)])
    assert np.isnan(Comparisons(rows, left).difference("b", "a", 5).error)
    assert cells(rows, left, ["a", "b"])["error"].isna().all()
    both = pd.concat([left, left.assign(range=1)])
    assert Comparisons(rows, both).difference("b", "a", 5).error > 0
    assert cells(rows, both, ["a", "b"])["error"].notna().all()


def test_ranges_that_share_the_real_images_make_kids_error_no_smaller():
    rows, left = table({"a": np.zeros((1, 1000))})
    rows = pd.concat([rows.assign(kid=0.5, kid_error=0.1), rows.assign(range=1, kid=0.7, kid_error=0.3)])
    assert cells(rows, left, ["a"])[["kid", "kid_error"]].iloc[0].tolist() == pytest.approx([0.6, 0.2])


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_row_that_is_no_better_is_marked_as_often_as_it_should_be(seeds):
    generator = np.random.default_rng(1)
    above = []
    for _ in range(600):
        common, trained = generator.normal(size=200), 0.2 * generator.normal(size=(2, seeds, 1))
        noise = 0.5 * generator.normal(size=(2, 1, 200))
        a, b = (common + noise[row] + (trained[row] if seeds > 1 else 0) for row in range(2))
        a, b = (np.broadcast_to(each, (seeds, 200)) for each in (a, b))
        above.append(Comparisons(*table({"a": a, "b": b})).difference("b", "a", 5).is_above)
    rate = np.mean(above)  # "b" is called worse, although it is not
    assert rate == pytest.approx(0.05, abs=0.02 if seeds == 1 else 0.035)


@pytest.mark.parametrize(("rows", "bold"), [(2, 0.95), (20, 0.75)])
def test_how_often_one_of_equal_rows_is_marked_best(rows, bold):
    """The lowest of many is partly the luckiest: docs/reading-results.md says how much that costs."""
    generator = np.random.default_rng(4)
    marked = []
    for _ in range(300 // rows):
        common = generator.normal(size=100)
        values = {str(row): (common + 0.5 * generator.normal(size=100))[None] for row in range(rows)}
        compared, lowest = Comparisons(*table(values)), min(values, key=lambda name: values[name].mean())
        marked += [not compared.difference(name, lowest, 5).is_above for name in values]
    assert np.mean(marked) == pytest.approx(bold, abs=0.06)


def test_a_row_that_is_worse_is_found():
    generator = np.random.default_rng(2)
    common = generator.normal(size=1000)
    a, b = common[None] + 0.1 * generator.normal(size=(3, 1000)), common[None] + 0.1 * generator.normal(size=(3, 1000))
    found = Comparisons(*table({"a": a, "b": b + 0.1})).difference("b", "a", 5)
    assert found.is_above
    assert found.value - found.interval < 0.1 < found.value + found.interval
    assert not Comparisons(*table({"a": a, "b": b + 0.1})).difference("a", "b", 5).is_above


def test_without_groups_only_the_lowest_is_best():
    rows, left = table({"a": np.ones((1, 10)), "b": np.ones((1, 10)) + 1e-3})
    comparisons = Comparisons(rows, left.iloc[:0])
    assert comparisons.difference("b", "a", 5).is_above
    assert not comparisons.difference("a", "a", 5).is_above
    assert np.isnan(comparisons.difference("b", "a", 5).interval)


def test_a_folder_is_compared_at_the_budgets_that_rows_share(tmp_path):
    noise = 0.1 * np.random.default_rng(0).normal(size=(3, 1, 1000))
    rows, left = table({"a": 2 + noise[0], "b": 3 + noise[1], "c": 2 + noise[2]})
    also = rows[rows["method"] == "a"].assign(nfe=9)
    pd.concat([rows, also]).to_csv(tmp_path / "distances.csv")
    left.to_csv(tmp_path / "distances-left-out.csv")
    head, _, own, worse, same, *_ = compare(tmp_path, "a", ["b", "c"]).splitlines()
    assert head == "| row | NFE 5 | NFE 9 |"
    assert own == "| a | 2.00 | 2.00 |"
    assert re.fullmatch(r"\| b less a \| \*\*\+\d\.\d\d ± 0\.01\*\* \|  \|", worse)
    assert "**" not in same
    with pytest.raises(StageError, match=r"no row bb: did you mean b or . or .\?"):
        compare(tmp_path, "a", ["bb"])
    with pytest.raises(StageError, match="no such folder"):
        compare(tmp_path / "none", "a", ["b"])
    (tmp_path / "distances-left-out.csv").unlink()
    with pytest.raises(StageError, match=r"no distances-left-out\.csv: name a dataset's results"):
        compare(tmp_path, "a", ["b"])


def test_bits_are_compared_image_by_image_and_over_trainings(tmp_path):
    generator = np.random.default_rng(2)
    own, apart, trained = generator.normal(size=100), 0.01 * generator.normal(size=100), np.array([0.2, 0.3, 0.5])
    bits = {("a", 0): own, **{("b", seed): own + apart + by for seed, by in enumerate(trained)}}
    images = pd.concat(
        pd.DataFrame(
            {"likelihood": name, "training_seed": seed, "estimator": "ode", "image": range(100), "bits_per_dim": each}
        )
        for (name, seed), each in bits.items()
    )
    found = bits_difference(images, "b", "a")
    assert found.value == pytest.approx(apart.mean() + trained.mean())
    assert found.error == pytest.approx((apart.var(ddof=1) / 100 + trained.var(ddof=1) / 3) ** 0.5)
    assert 2 < found.degrees_of_freedom < 2.1  # nearly all of it is known of three trainings
    assert np.isnan(bits_difference(images, "a", "a").interval)
    rows, left = table({"a": np.ones((1, 10)), "b": np.ones((1, 10)), "c": np.ones((1, 10))})
    for name, each in {"distances": rows, "distances-left-out": left, "likelihood-images": images}.items():
        each.to_csv(tmp_path / f"{name}.csv", index=False)
    head, _, baseline, other, without, *_ = compare(tmp_path, "a", ["b", "c"]).splitlines()
    assert head == "| row | NFE 5 | bits/dim, ode |"
    assert baseline == f"| a | 1.00 | {own.mean():.3f} |"
    assert other.endswith(f"| {found:.3f} |")  # 0.333 ± 0.379: it holds 0
    assert without.endswith("|  |")


def test_cells_average_over_training_seeds():
    generator = np.random.default_rng(3)
    values = generator.normal(size=(3, 100)) + np.array([[1.0], [2.0], [4.0]])
    rows, left = table({"a": values, "b": values[:1]})
    found = cells(rows, left, ["a", "b"]).set_index("method")
    means = values.mean(1)
    assert found.loc["a", "mean"] == pytest.approx(means.mean())
    assert found.loc["a", "seed_error"] == pytest.approx(means.std(ddof=1) / 3**0.5)
    assert found.loc["a", "error"] == pytest.approx(values.mean(0).std(ddof=1) / 10, rel=0.5)
    assert found.loc["a", "seeds"] == 3
    assert np.isnan(found.loc["b", "seed_error"])
    assert found.loc["b", "error"] > 0


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_kernel_distance_is_the_unbiased_estimate_in_groups():
    a, b = drawn(60, 0, 0.3).double().numpy(), drawn(80, 1).double().numpy()
    found, values = fidelity.kernel_distance(torch.from_numpy(a), torch.from_numpy(b)), []
    for k in range(spread.GROUPS):
        x, y = a[6 * k : 6 * k + 6], b[6 * k : 6 * k + 6]
        off = ~np.eye(6, dtype=bool)
        values.append(kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean())
    assert found.value == pytest.approx(np.mean(values), rel=1e-9)
    assert found.error == pytest.approx(np.std(values, ddof=1) / spread.GROUPS**0.5, rel=1e-9)


def test_precision_and_recall_are_shares_inside_balls_of_the_third_neighbour():
    a, b = drawn(50, 0, 1.0).numpy(), drawn(70, 1).numpy()
    far = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=2)  # noqa: E731
    radius = lambda x: np.sort(far(x, x), axis=1)[:, 3]  # noqa: E731 - column 0 is the point itself
    found = fidelity.precision_recall(torch.from_numpy(a), torch.from_numpy(b))
    assert found.precision == pytest.approx((far(a, b) <= radius(b)).any(1).mean())
    assert found.recall == pytest.approx((far(b, a) <= radius(a)).any(1).mean())
    assert 0 < found.recall < 1
