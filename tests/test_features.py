"""The features against NumPy's linear algebra, and the three sets."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

import train_model_v5 as run5
from data import prepare
from data.dataset import Codes, exact_heights, flatten
from data.features import BasisFeatures, MinimumDistance
from data.heights import GROUPS, OPEN_GROUPS, N, m_heights, minors
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
    np.testing.assert_allclose(first[:, :126], second[:, :126], atol=2e-3)
    rising, other = np.sort(first[:, 126:]), np.sort(second[:, 126:])
    np.testing.assert_allclose(rising, other, atol=1e-3)
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
    np.testing.assert_allclose(features(*P, m=3), alone, atol=1e-6)
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
    infinite = np.isinf(m_heights(P, range(1, N - k + 1)))
    column = np.full((200, 1), k)
    for scale in (1, 0.1):  # By 0.1 entries are rounded, and minors that are 0 need not be.
        distance = MinimumDistance()(column, column, scale * flatten(P))
        np.testing.assert_array_equal(np.arange(1, N - k + 1) >= distance, infinite)
    for change in (1e-14, 1e-10):  # Below and above what may be rounding.
        near = P * np.where(largest == P, 1 + change, 1) * 0.1
        infinite = np.isinf(m_heights(near, range(1, N - k + 1)))
        distance = MinimumDistance()(column, column, flatten(near))
        np.testing.assert_array_equal(np.arange(1, N - k + 1) >= distance, infinite)


def test_a_singular_basis_is_found_among_integers_whose_products_are_above_2_to_the_53():
    rng = np.random.default_rng(0)
    P = rng.integers(1, 10, (50, 4, 5))
    P[:, :3, :3] = rng.integers(-1000, 1001, (50, 3, 2)) @ rng.integers(-1000, 1001, (50, 2, 3))
    column = np.full((50, 1), 4)
    distance = MinimumDistance()(column, column, flatten(P))
    assert np.isinf(m_heights(P, 5)).all() and (np.asarray(distance) <= 5).all()


def test_features_are_in_the_order_of_the_rows_and_raw_ones_are_P(small):
    order = np.random.default_rng(0).permutation(360)
    twice = small.take(np.concatenate([order, np.arange(360)] * 4))  # In more than one step.
    found = run5.outputs_of(run5.feature_model("basis"), twice)
    np.testing.assert_array_equal(found[:360], found[-360:][order])
    np.testing.assert_array_equal(run5.outputs_of(run5.feature_model("raw"), small), small.P)


def all_sets(dataset, settings):
    sets = run5.add_extra_codes(run5.make_sets(dataset, settings), settings)
    run5.require_disjoint(sets)
    return sets


def test_the_three_sets_have_exact_heights_and_share_no_code(small, capsys):
    settings = run5.Settings(extra_codes=4, test_codes=50)
    sets = all_sets(small, settings)
    said = capsys.readouterr().out
    assert "1,224 extra codes" in said and "--extra-codes 0" in said
    assert said.count("204 codes") == len(OPEN_GROUPS) == 6
    for name, rows in zip(("training", "validation"), run5.split_dataset(small), strict=True):
        np.testing.assert_array_equal(sets[name].P[: len(rows)], small.P[rows])
    in_training = [34 + 204 * (m < N - k) for k, m in GROUPS]
    for data, counts in zip(sets.values(), (in_training, [6] * 9, [50] * 9), strict=True):
        assert np.bincount(data.group).tolist() == counts
        codes = Codes(np.full(len(data), N), data.k, data.m, data.P)
        np.testing.assert_array_equal(data.height, exact_heights(codes))
    for one, other in combinations(sets.values(), 2):
        assert not set(one.key) & set(other.key)
    assert np.bincount(sets["test"].group, sets["test"].low).tolist() == [5] * 9

    for one, other in combinations(sets, 2):
        with pytest.raises(
            RuntimeError, match=f"1 codes are in the {one} set and in the {other} set"
        ):
            run5.require_disjoint(sets | {other: sets[other].extended(sets[one].take([0]))})

    other = all_sets(small, replace(settings, seed=43))
    for rows in (slice(None, 306), slice(306, None)):
        assert (other["training"].P[rows] != sets["training"].P[rows]).any()
    np.testing.assert_array_equal(other["test"].P, sets["test"].P)
    without = all_sets(small, replace(settings, extra_codes=0))
    np.testing.assert_array_equal(without["training"].P, sets["training"].P[:306])


@pytest.mark.parametrize("name", ["make_dataset", "make_extra_codes"])
def test_codes_of_the_dataset_are_not_made_again_or_found(name, monkeypatch):
    settings = run5.Settings(extra_codes=1, seed=5, test_codes=100)
    dataset = prepare.make_dataset(100, run5.TEST_SEED)  # The test set, were it not known.
    if name == "make_extra_codes":
        per_group = settings.extra_codes * len(run5.split_dataset(dataset, seed=5)[0]) // 6
        dataset = dataset.extended(*prepare.make_extra_codes(per_group, 5, ()))
    sets, rows = all_sets(dataset, settings), run5.split_dataset(dataset, seed=5)[0]
    assert not {*sets["training"].key[len(rows) :]} & {*dataset.key}
    make = getattr(prepare, name)
    monkeypatch.setattr(run5, name, lambda rows, seed, known: make(rows, seed, ()))
    with pytest.raises(RuntimeError, match="codes are in the"):
        all_sets(dataset, settings)


def test_simple_predictions_are_fitted_to_training_rows_alone_and_know_a_line(small):
    rng = np.random.default_rng(0)
    x, lines = rng.normal(size=(360, 3)).astype("float32"), rng.normal(size=(9, 3))
    data = replace(small, height=2 ** ((x * lines[small.group]).sum(axis=1) + 9))
    even, odd = np.arange(0, 360, 2), np.arange(1, 360, 2)
    train_set, other = (replace(data.take(rows), features=x[rows]) for rows in (even, odd))
    table = run5.simple_predictions(train_set, other, "basis")
    errors = run5.group_errors(other, other.log2_height, table)
    assert (errors["ridge"] < 0.05 * errors["mean"]).all() and (errors["n"] == 20).all()
    np.testing.assert_array_equal(table["bound"], x[odd, 0])
    means = train_set.log2_height.reshape(9, 20).mean(axis=1)
    np.testing.assert_allclose(table["mean"], means[other.group])
    assert list(run5.simple_predictions(train_set, other, "raw")) == ["mean", "ridge"]
