"""References: the paper's code (`data/paper`), and the definition as a minimum."""

import torch
from conftest import PAPER_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sae_lens_multilayer.training import geometric_median as module
from sae_lens_multilayer.training.geometric_median import geometric_median

REFERENCE = load_file(PAPER_DATA / "geometric_median.safetensors")
RESID_POST = load_file(PAPER_DATA / "activations.safetensors")["resid_post"]


def total_distance(points, m):
    return (points - m).norm(dim=1).sum()


def random_points(seed, n, d):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator)


def test_agrees_with_the_papers_code_on_points_with_outliers():
    median = geometric_median(REFERENCE["points"].flatten(0, 2))
    torch.testing.assert_close(median, REFERENCE["points_median"], atol=1e-6, rtol=0)
    assert (median - REFERENCE["points_mean"]).norm() > 0.1


def test_agrees_with_the_papers_code_on_a_residual_stream():
    median = geometric_median(RESID_POST.flatten(0, 2))
    expected = REFERENCE["resid_post_median"]
    torch.testing.assert_close(median, expected, atol=1e-5, rtol=1e-5)


def test_agrees_with_the_papers_code_on_standardised_vectors():
    x = RESID_POST.flatten(0, 2)
    u = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    expected = REFERENCE["resid_post_standardized_median"]
    torch.testing.assert_close(geometric_median(u), expected, atol=1e-5, rtol=1e-5)


def test_of_one_point_is_that_point():
    point = torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(geometric_median(point), point[0])


def test_of_equal_points_is_that_point():
    points = torch.tensor([[0.1, 0.7]]).expand(1000, 2)
    torch.testing.assert_close(geometric_median(points), points[0])


def test_on_a_line_is_the_median():
    points = torch.tensor([[0.0], [1.0], [2.0], [7.0], [1000.0]], dtype=torch.float64)
    median = geometric_median(points, max_iter=10_000, tol=1e-12)
    torch.testing.assert_close(median, torch.tensor([2.0], dtype=torch.float64))


def test_leaves_a_point_that_is_the_mean_but_not_the_median():
    # The mean, 0, is a point. Weiszfeld's step stays there; 1 has the majority.
    points = torch.tensor([[0.0], [-3.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    median = geometric_median(points, max_iter=1000, tol=1e-9)
    torch.testing.assert_close(median, torch.ones(1, dtype=torch.float64))


def test_a_step_from_a_point_is_that_of_vardi_and_zhang():
    # From 0: the others' weighted mean is (-3 / 3 + 3 * 1) / (1 / 3 + 3) = 0.6, their
    # force -1 + 3 = 2, and the point itself holds with 1: half the way.
    points = torch.tensor([[0.0], [-3.0], [1.0], [1.0], [1.0]])
    torch.testing.assert_close(
        geometric_median(points, max_iter=1), torch.tensor([0.3])
    )


def test_stays_at_a_point_that_is_mean_and_median():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2]])
    assert geometric_median(points).tolist() == [0.0, 0.0]


def test_does_not_overflow_for_points_next_to_the_mean():
    tiny = torch.finfo(torch.float32).tiny
    points = torch.tensor([[0.0, tiny], [0.0, -tiny], [tiny, 0.0], [-tiny, 0.0]])
    assert geometric_median(points).abs().max() <= 1e-30


def test_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    points = random_points(0, 100, 3)
    whole = geometric_median(points)
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 7)
    torch.testing.assert_close(geometric_median(points), whole, rtol=0, atol=1e-13)


def test_takes_no_more_steps_than_allowed():
    points = random_points(0, 20, 3)
    torch.testing.assert_close(geometric_median(points, max_iter=0), points.mean(0))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), d=st.integers(1, 4))
def test_moves_with_the_points(seed, n, d):
    points, shift = random_points(seed, n, d), random_points(seed + 1, 1, d)[0]
    moved = geometric_median(points + shift)
    torch.testing.assert_close(
        moved, geometric_median(points) + shift, atol=1e-3, rtol=0
    )


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), n_others=st.integers(1, 6), d=st.integers(1, 4))
def test_a_majority_of_equal_points_wins(seed, n_others, d):
    others, winner = random_points(seed, n_others, d), random_points(seed + 1, 1, d)
    points = torch.cat([others, winner.expand(n_others + 2, d)])
    median = geometric_median(points, max_iter=2000, tol=1e-10)
    torch.testing.assert_close(median, winner[0], atol=1e-4, rtol=0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=9)
)
def test_no_point_is_better_even_where_many_coincide(rows):
    # Points on a small grid: the mean and the steps often fall on one of them.
    points = torch.tensor(rows, dtype=torch.float64)
    median = geometric_median(points, max_iter=300, tol=1e-12)
    best = min(total_distance(points, m) for m in [*points, points.mean(0)])
    assert median.isfinite().all()
    assert total_distance(points, median) <= best + 1e-2
