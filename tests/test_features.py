"""The features: the layer of basis norms against NumPy's linear algebra, and the training set they are computed for."""

from dataclasses import replace
from itertools import combinations

import keras
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import train_model_v5 as run5
from data import prepare
from data.heights import GROUPS, cramer_table, flatten, m_heights, minors

KS = (4, 5, 6)
SINGULAR = run5.BasisFeatures.LOG2_RANGE[1]


def features(*matrices, m=None):
    """The layer's output for matrices of any of the three shapes, in one batch; m is n - k for each unless given."""
    k = np.array([len(P) for P in matrices])
    flat = np.concatenate([flatten(np.asarray(P, dtype=float)[None]) for P in matrices])
    m = 9 - k if m is None else np.full(len(k), m)
    return np.asarray(run5.BasisFeatures()(k[:, None], m[:, None], flat))


def blocks(row):
    """One row of the output in its four blocks: rho, s, quantiles of M without each coordinate, of rho with it."""
    rho, s, without, within = np.split(row, [126, 252, 252 + 216])
    return rho, s, without.reshape(9, 24), within.reshape(9, 16)


def by_linear_algebra(P, m):
    """The same four for a code without singular basis, from the definition: G_B^-1 g_a by numpy.linalg.solve."""
    k = len(P)
    d = 9 - k - m + 1
    G = np.hstack([np.eye(k), P])
    without, within, pairs = [[] for _ in range(9)], [[] for _ in range(9)], []
    for basis in combinations(range(9), k):
        others = [a for a in range(9) if a not in basis]
        logs = np.log2(np.abs(np.linalg.solve(G[:, basis], G[:, others])).sum(axis=0))
        for a, log in zip(others, logs, strict=True):
            without[a].append(log)
        for a in basis:
            within[a].append(logs.max())
        pairs.append((logs.max(), max(0, np.sort(logs)[d - 2]) if d > 1 else 0))
    picked = []
    for values, count in ((without, 24), (within, 16)):
        rows = np.sort(np.array(values), axis=1)
        rows = rows[:, np.rint(np.linspace(0, rows.shape[1] - 1, count)).astype(int)]
        picked.append(rows[np.argsort(rows.mean(axis=1))])
    ordered = sorted(pairs, key=lambda pair: pair[1] / 2**14 - pair[0])
    rho, s = (np.pad(column, (0, 126 - len(column))) for column in np.transpose(ordered))
    return rho, s, *picked


@pytest.mark.parametrize(("k", "m"), GROUPS)
def test_features_are_those_of_linear_algebra(k, m):
    rng = np.random.default_rng(k)
    P = np.concatenate([rng.integers(-most, most + 1, size=(8, k, 9 - k)) for most in (4, 20, 100)])
    P = P[(minors(P) > 0).all(axis=1)]
    checked = 0
    for matrix, row in zip(P, features(*P, m=m), strict=True):
        by_definition = by_linear_algebra(matrix, m)
        gaps = -np.diff(np.trim_zeros(by_definition[0] - by_definition[1] / 2**14, "b"))
        if not ((gaps > 1e-9) & (gaps < 1e-5)).any():  # The order of what is nearly equal is up to rounding.
            for got, expected in zip(blocks(row), by_definition, strict=True):
                np.testing.assert_allclose(got, expected, atol=2e-5)
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("k", KS)
def test_every_singular_basis_is_told_from_a_small_minor(k):
    rng = np.random.default_rng(k)
    P = np.concatenate([prepare.random_matrices(rng, 300, k, 9 - k), rng.integers(-100, 101, size=(300, k, 9 - k))])
    P[300:, :, 1] = P[300:, :, 0] + rng.integers(-1, 2, size=(300, k))
    D = minors(P).T
    base, swap = cramer_table(9, k)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.log2((D[swap].sum(axis=0) / D[base]).reshape(len(D), 9 - k, -1).max(axis=1))
    assert len(set((D == 0).sum(axis=0))) > 5
    found = features(*P, m=2)
    # By falling rho, regular bases first.
    expected = -np.sort(np.where(D > 0, -rho, np.inf), axis=0).T
    expected[np.isinf(expected)] = 0
    np.testing.assert_allclose(found[:, : len(D)], expected, atol=2e-3)
    np.testing.assert_allclose(np.sort(found[:, : len(D)]), np.sort(expected), atol=3e-5)
    np.testing.assert_array_equal(found[:, 252:].max(axis=1) == SINGULAR, (D == 0).any(axis=0))


@pytest.mark.parametrize("k", KS)
def test_the_largest_norm_is_the_height_where_m_is_n_minus_k(k):
    P = prepare.random_matrices(np.random.default_rng(k), 200, k, 9 - k)
    heights = m_heights(P, [9 - k])[:, 0]
    finite = np.isfinite(heights)
    assert finite.sum() > 30
    found = features(*P)
    np.testing.assert_allclose(found[finite, 0], np.log2(heights[finite]), atol=1e-5)
    assert (found[:, 126:252] == 0).all()


@pytest.mark.parametrize(("k", "m"), GROUPS)
def test_the_height_is_at_least_rho_by_s_of_each_basis(k, m):
    P = prepare.random_matrices(np.random.default_rng(m), 100, k, 9 - k)
    found = features(*P, m=m)
    assert ((found[:, :126] - found[:, 126:252]).max(axis=1) <= np.log2(m_heights(P, [m])[:, 0]) + 1e-4).all()


@pytest.mark.parametrize("k", KS)
def test_permutations_and_signs_change_nothing(k):
    rng = np.random.default_rng(k)
    P = prepare.random_matrices(rng, 60, k, 9 - k)
    same = []
    for matrix in P:
        signs = rng.choice([-1, 1], size=k)[:, None] * rng.choice([-1, 1], size=9 - k)
        same.append((signs * matrix)[rng.permutation(k)][:, rng.permutation(9 - k)])
    for m in range(2, 10 - k):
        first, second = np.split(features(*P, *same, m=m), 2)
        rho, s = (np.abs(first - second)[:, part] for part in (slice(126), slice(126, 252)))
        assert np.abs(first - second)[:, 252:].max() < 1e-6 and rho.max() < 1e-6
        # Bases of the same rho and nearly the same s may change places.
        assert s.max() < 0.03 and (s > 1e-5).mean() < 1e-3


@pytest.mark.parametrize("k", KS)
def test_another_systematic_form_of_the_code_has_the_same_features(k):
    rng = np.random.default_rng(k)
    P = rng.integers(1, 1000, size=(4, k, 9 - k)) * rng.choice([-1, 1], size=(4, k, 9 - k))
    assert (minors(P) > 0).all()
    others = []
    for matrix in P:
        G = np.hstack([np.eye(k), matrix])
        basis = sorted(rng.choice(9, size=k, replace=False))
        others.append(np.linalg.solve(G[:, basis], G[:, [a for a in range(9) if a not in basis]]))
    for m in range(2, 10 - k):
        first, second = np.split(features(*P, *others, m=m), 2)
        np.testing.assert_allclose(np.sort(first[:, :252]), np.sort(second[:, :252]), atol=1e-3)
        np.testing.assert_allclose(first[:, 252:], second[:, 252:], atol=1e-3)


def test_features_of_a_code_do_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(0)
    mixed = [prepare.random_matrices(rng, 1, KS[i % 3], 9 - KS[i % 3])[0] for i in range(12)]
    together = features(*mixed, m=2)
    for P, row in zip(mixed, together, strict=True):
        np.testing.assert_allclose(features(P, m=2)[0], row, atol=1e-6)
    assert (together[2::3, 84:126] == 0).all() and (together[2::3, 210:252] == 0).all()


def test_the_precision_of_the_network_does_not_reach_into_the_layer():
    P = np.random.default_rng(1).integers(-100, 101, size=(20, 4, 5))
    expected = features(*P)
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = run5.BasisFeatures()
    again = layer(np.full((20, 1), 4), np.full((20, 1), 5), flatten(P.astype(float)))
    assert layer.compute_dtype == "float64" and keras.backend.standardize_dtype(again.dtype) == "float32"
    np.testing.assert_allclose(np.asarray(again), expected, atol=1e-6)
    raw = run5.feature_model("raw")
    assert raw.output.dtype == "float32"


def test_features_are_in_the_order_of_the_rows_and_raw_ones_are_P(small):
    order = np.random.default_rng(0).permutation(len(small))
    twice = run5.predict_all(run5.feature_model("basis"), small.take(np.concatenate([order, np.arange(len(small))])))
    np.testing.assert_array_equal(twice[: len(small)], twice[len(small) :][order])
    np.testing.assert_array_equal(run5.predict_all(run5.feature_model("raw"), small), small.P)


def test_the_two_sets_carry_features_and_the_training_set_ends_with_extra_codes(small):
    settings = run5.Settings(features="raw", extra_codes=4)
    train_rows, val_rows = run5.split_dataset(small)
    train_set, val_set = run5.training_and_validation_sets(small, settings)
    for name in ("k", "m", "P", "height", "key"):
        np.testing.assert_array_equal(getattr(val_set, name), getattr(small, name)[val_rows])
        np.testing.assert_array_equal(getattr(train_set, name)[:306], getattr(small, name)[train_rows])
    np.testing.assert_array_equal(train_set.features, train_set.P)
    np.testing.assert_array_equal(val_set.features, val_set.P)
    extra = train_set.take(np.arange(306, len(train_set)))
    assert 0.99 * 4 * 306 < len(extra) <= 4 * 306
    assert np.ptp(np.bincount(extra.group)) <= 0.02 * len(extra)
    assert not np.isin(extra.key, small.key).any()
    prepare.check_labels(train_set)

    again, _ = run5.training_and_validation_sets(small, settings)
    np.testing.assert_array_equal(again.P, train_set.P)
    other, _ = run5.training_and_validation_sets(small, replace(settings, seed=43))
    assert (other.P[306:400] != train_set.P[306:400]).any()
    without, _ = run5.training_and_validation_sets(small, replace(settings, extra_codes=0))
    np.testing.assert_array_equal(without.P, train_set.P[:306])


def test_the_keys_of_extra_codes_are_those_of_their_matrices():
    made = prepare.make_dataset(30, seed=7)
    for k in KS:
        rows = made.k == k
        P = prepare.unflatten(made.P[rows], k)
        np.testing.assert_array_equal(made.key[rows], prepare.code_keys(P))


def test_extra_codes_that_the_dataset_has_are_left_out():
    dataset = prepare.make_dataset(100, seed=[5, 1])
    settings = run5.Settings(features="raw", extra_codes=1, seed=5)
    train_set, val_set = run5.training_and_validation_sets(dataset, settings)
    assert len(train_set) + len(val_set) == len(np.unique(np.concatenate([train_set.key, val_set.key])))
    lost = 900 + 85 * 9 - len(train_set) - len(val_set)
    assert lost == np.isin(prepare.make_dataset(85, seed=[5, 1]).key, dataset.key).sum() > 50


@pytest.mark.slow
def test_what_the_features_tell_without_a_network():
    """Default dataset and split: predicting the mean, the largest bound, and a ridge regression for each group."""
    settings = run5.Settings(extra_codes=0)
    sets = run5.training_and_validation_sets(run5.load_dataset(*settings.data), settings)

    def by_falling_bound(data):
        """log2 of rho_B / s_B, the largest first, and of rho_B in that order; singular bases last and 0."""
        rho, s = data.features[:, :126], data.features[:, 126:252]
        bound = np.where((rho == 0) & (s == 0), -np.inf, rho - s)
        order = np.argsort(-bound, axis=1)
        both = [np.take_along_axis(x, order, axis=1) for x in (bound, rho)]
        return np.nan_to_num(np.hstack(both), neginf=0)

    table = {}
    for i, group in enumerate(GROUPS):
        train, val = (data.take(data.group == i) for data in sets)
        x, x_val = (by_falling_bound(replace(data, features=data.features[data.group == i])) for data in sets)
        ridge = make_pipeline(StandardScaler(), Ridge(1.0)).fit(x, train.log2_height)
        guesses = {"mean": train.log2_height.mean(), "largest bound": x_val[:, 0], "ridge": ridge.predict(x_val)}
        table[group] = {name: np.mean((val.log2_height - guess) ** 2) for name, guess in guesses.items()}
    table = pd.DataFrame(table)
    print(f"\n{table.T.round(4).to_string()}\nmeans of the groups: {table.mean(axis=1).round(4).to_dict()}")
    assert table.loc["ridge"].mean() < table.loc["largest bound"].mean() < 0.11 < table.loc["mean"].min()
    assert (table.loc["ridge"] < 0.04).all()
