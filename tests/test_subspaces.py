import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anisodiff.errors import InvalidArgument
from anisodiff.paths.subspaces import Subspaces, dct_matrix, partition


@pytest.mark.parametrize("size", [2, 8, 32])
def test_dct_is_scipys_orthonormal_dct(size):
    x = torch.randn(3, 2, size, size, dtype=torch.float64)
    subspaces = Subspaces(partition(size, "block"))
    expected = scipy.fft.dctn(x.numpy(), type=2, norm="ortho", axes=(-2, -1))
    assert torch.allclose(subspaces.from_pixels(x), torch.from_numpy(expected), atol=1e-12)
    assert torch.allclose(subspaces.to_pixels(subspaces.from_pixels(x)), x, atol=1e-12)


def test_basis_is_orthonormal():
    modes = dct_matrix(16)
    assert torch.allclose(modes @ modes.T, torch.eye(16, dtype=torch.float64), atol=1e-13)


def test_scale_is_the_dense_product_with_projections():
    """`F(M) x = sum_j F(g_j) V_j^T V_j x`, as the paper writes it (Eq. 9)."""
    size, values = 4, torch.tensor([[0.3, 2.0, 5.0], [1.0, 0.1, 7.0]], dtype=torch.float64)
    subspaces = Subspaces(partition(size, "radial:3"))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    modes = dct_matrix(size)
    dense = torch.zeros_like(x)
    for p in range(size):
        for q in range(size):
            v = torch.outer(modes[p], modes[q])
            weight = values[:, subspaces.index[p, q]]
            dense += weight[:, None, None, None] * (x * v).sum((-2, -1), keepdim=True) * v
    ours = subspaces.to_pixels(subspaces.scale(subspaces.from_pixels(x), values))
    assert torch.allclose(ours, dense, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 16), count=st.integers(1, 6))
def test_radial_bands_cover_and_rise(size, count):
    try:
        index = partition(size, f"radial:{count}")
    except InvalidArgument:
        return  # more bands than radii: refused by name
    assert sorted(index.unique().tolist()) == list(range(count))
    p = torch.arange(size)
    radius = p[:, None] ** 2 + p[None, :] ** 2
    largest = [radius[index == j].max() for j in range(count)]
    smallest = [radius[index == j].min() for j in range(count)]
    assert all(a < b for a, b in zip(largest[:-1], smallest[1:], strict=True))
    assert torch.equal(index, index.T)


def test_inner_products_of_each_subspace():
    subspaces = Subspaces(partition(4, "block"))
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    products = subspaces.inner(z, y)
    assert torch.allclose(products[:, 0], (z * y)[..., :2, :2].sum((1, 2, 3)))
    assert torch.allclose(products.sum(1), (z * y).sum((1, 2, 3)))
    assert subspaces.ranks.tolist() == [4, 12]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ([[0, 0], [0, -1]], r"mode \(1, 1\) in no subspace"),
        ([[0, 0], [0, 2]], r"no mode in subspace \[1\]"),
        ([[0, 0, 0], [0, 0]], "2 rows of 2"),
        ("radial:9", "fewer subspaces"),
        ("radial:0", "fewer subspaces"),
        ("wavelets", "use whole, block, radial:J"),
    ],
)
def test_partitions_that_do_not_cover_are_refused(kind, words):
    with pytest.raises(InvalidArgument, match=words):
        partition(2, kind)
