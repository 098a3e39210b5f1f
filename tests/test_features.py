"""The features against NumPy's linear algebra, and the three sets."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from conftest import watch
from numpy.testing import assert_allclose, assert_array_equal

import train_model_v5 as run5
from data.dataset import Codes, exact_heights, flatten
from data.features import BasisFeatures, MinimumDistance
from data.heights import GROUPS, N, m_heights, minors
from data.matrices import random_matrices

LIMIT = 6  # Of the features that are relative to the largest bound, the first feature.


def features(*matrices, m):
    """The layer's output for matrices of any of the three shapes, in one batch."""
    k = np.array([[len(P)] for P in matrices])
    flat = np.concatenate([flatten(np.asarray(P, dtype=float)[None]) for P in matrices])
    return np.asarray(BasisFeatures()(k, np.full_like(k, m), flat))


def by_linear_algebra(P, m):
    """The same for one code from the definition: G_B^-1 g_a by numpy.linalg.solve."""
    k = len(P)
    G = np.hstack([np.eye(k), P])
    pairs = []
    for basis, minor in zip(combinations(range(N), k), minors(P[None])[0], strict=True):
        if minor > 0:
            others = [a for a in range(N) if a not in basis]
            norms = np.abs(np.linalg.solve(G[:, basis], G[:, others])).sum(axis=0)
            rising = np.sort(np.log2(np.maximum(norms, 1)))
            s = rising[N - k - m - 1] if m < N - k else 0
            pairs.append((rising[-1] - s, rising[-1]))
    bounds, rho = np.transpose(sorted(pairs, key=lambda pair: -pair[0] - pair[1] / 2**14))
    largest = bounds.max()
    expected = np.full((2, 126), float(LIMIT))
    expected[0, : len(rho)] = np.minimum(largest - bounds, LIMIT)
    expected[1, : len(rho)] = np.clip(rho - largest, -LIMIT, LIMIT)
    expected[0, 0] = largest
    return expected.ravel()


def check_same(first, second, apart):
    """Equal but for bases whose bounds differ in rounding alone, of which rho may change places.

    apart: the share of the features for which that is so.
    """
    assert_allclose(first[:, :126], second[:, :126], atol=2e-3)
    rising, other = np.sort(first[:, 126:]), np.sort(second[:, 126:])
    assert_allclose(rising, other, atol=1e-3)
    assert (np.abs(first - second) > 1e-3).mean() <= apart


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_features_of_a_mixed_batch_are_those_of_linear_algebra_on_each_code(m):
    rng, ks = np.random.default_rng(m), [k for k, other in GROUPS if other == m]
    ranges = [(most, k) for most in (1, 4, 20, 100) * 5 for k in ks]
    P = [rng.integers(-most, most + 1, (k, N - k)) for most, k in ranges]
    for k in ks:  # In float32 their singular bases would not be found.
        P.append(rng.integers(50, 101, (k, N - k)))
        P[-1][3] = P[-1][0] + P[-1][1] - P[-1][2]
    check_same(features(*P, m=m), np.array([by_linear_algebra(x, m) for x in P]), apart=0.02)


@pytest.mark.parametrize(("k", "m"), GROUPS)
def test_the_bound_is_below_the_height_and_equal_to_it_where_m_is_n_minus_k(k, m):
    P = random_matrices(np.random.default_rng(m), 300, k, N - k)
    height = m_heights(P, [m])[:, 0]
    finite = np.isfinite(height)
    assert finite.sum() > 30
    found = features(*P[finite], m=m)
    below = np.log2(height[finite]) - found[:, 0]
    assert (below >= -1e-5).all() and (below > 0.01).any() == (m < N - k)


def test_features_do_not_depend_on_the_other_codes_of_a_batch():
    P = np.random.default_rng(0).normal(size=(3, 4, 5)) * np.array([1e-20, 1, 1e20])[:, None, None]
    alone = np.concatenate([features(matrix, m=3) for matrix in P])
    assert_allclose(features(*P, m=3), alone, atol=1e-6)
    check_same(alone, np.array([by_linear_algebra(matrix, 3) for matrix in P]), apart=0.02)


def test_no_bound_is_above_the_first_feature():
    """Where bounds are within 0.002 of each other, the order is by rho and may be another."""
    P = flatten(np.random.default_rng(0).integers(-100, 101, (8000, 4, 5)))
    k, m = np.full((8000, 1), 4), np.full((8000, 1), 2)
    below = np.asarray(BasisFeatures()(k, m, P))[:, 1:126]
    assert below.min() == 0 and (np.diff(below, axis=1) < 0).any()


@pytest.mark.parametrize("k", [4, 5, 6])
@pytest.mark.parametrize("largest", [0, 1, 2, 8])
def test_heights_are_infinite_from_the_minimum_distance_on(k, largest):
    P = np.random.default_rng(k).integers(-largest, largest + 1, (200, k, N - k))
    column = np.full((200, 1), k)
    around = [np.where(largest == P, 1 + change, 1) for change in (1e-14, 1e-10)]
    for factor in (1, 0.1, *(0.1 * x for x in around)):  # By 0.1 entries are rounded.
        infinite = np.isinf(m_heights(P * factor, range(1, N - k + 1)))
        distance = MinimumDistance()(column, column, flatten(P * factor))
        assert_array_equal(np.arange(1, N - k + 1) >= distance, infinite)


def test_a_singular_basis_is_found_among_integers_whose_products_are_above_2_to_the_53():
    rng = np.random.default_rng(0)
    P = rng.integers(1, 10, (50, 4, 5))
    P[:, :3, :3] = rng.integers(-1000, 1001, (50, 3, 2)) @ rng.integers(-1000, 1001, (50, 2, 3))
    column = np.full((50, 1), 4)
    distance = MinimumDistance()(column, column, flatten(P))
    assert np.isinf(m_heights(P, 5)).all() and (np.asarray(distance) <= 5).all()


def test_features_are_in_the_order_of_the_rows_and_raw_ones_are_P(small):
    order = np.resize(np.random.default_rng(0).permutation(360), 2049)  # More than one step.
    to_features = run5.feature_model("basis")
    features, many = (run5.outputs_of(to_features, x) for x in (small, small.take(order)))
    assert_array_equal(many, features[order])
    assert_array_equal(run5.outputs_of(run5.feature_model("raw"), small), small.P)


def test_the_three_sets_have_exact_heights_and_share_no_code(small):
    settings = run5.Settings(extra_codes=4, test_codes=50)
    with watch(run5, "make_dataset") as make_test, watch(run5, "make_extra_codes") as make_extra:
        sets = run5.make_sets(small, settings)
        known = {*small.key, *sets["test"].key}
        sets = run5.add_extra_codes(sets, settings)
    assert {*make_test.call_args.kwargs["known"]} == {*small.key}
    assert {*make_extra.call_args.args[2]} == known
    run5.require_disjoint(sets)
    for name, rows in zip(("training", "validation"), run5.split_dataset(small), strict=True):
        assert_array_equal(sets[name].P[: len(rows)], small.P[rows])
    in_training = [34 + 204 * (m < N - k) for k, m in GROUPS]
    for data, counts in zip(sets.values(), (in_training, [6] * 9, [50] * 9), strict=True):
        assert np.bincount(data.group).tolist() == counts
        codes = Codes(np.full(len(data), N), data.k, data.m, data.P)
        assert_array_equal(data.height, exact_heights(codes))
    assert np.bincount(sets["test"].group, sets["test"].low).tolist() == [5] * 9
    for one, other in combinations(sets, 2):
        with pytest.raises(RuntimeError, match=f"1 codes .* the {one} set and in the {other} set"):
            run5.require_disjoint(sets | {other: sets[other].extended(sets[one].take([0]))})

    settings = replace(settings, seed=43)
    other = run5.add_extra_codes(run5.make_sets(small, settings), settings)
    for rows in (slice(None, 306), slice(306, None)):
        assert (other["training"].P[rows] != sets["training"].P[rows]).any()
    assert_array_equal(other["test"].P, sets["test"].P)
