"""The features: the layer against NumPy's linear algebra; the three sets; what the features tell without a network."""

from dataclasses import replace
from itertools import combinations

import keras
import numpy as np
import pytest

import train_model_v5 as run5
from data import prepare
from data.heights import GROUPS, Codes, flatten, m_heights, minors
from data.matrices import random_matrices

KS = (4, 5, 6)
LIMIT = 6


def features(*matrices, m=None):
    """The layer's output for matrices of any of the three shapes, in one batch; m is n - k for each unless given."""
    k = np.array([len(P) for P in matrices])
    flat = np.concatenate([flatten(np.asarray(P, dtype=float)[None]) for P in matrices])
    m = 9 - k if m is None else np.full(len(k), m)
    return np.asarray(run5.BasisFeatures()(k[:, None], m[:, None], flat))


def by_linear_algebra(P, m):
    """The same for one code from the definition: G_B^-1 g_a by numpy.linalg.solve."""
    k = len(P)
    G = np.hstack([np.eye(k), P])
    pairs, singular = [], minors(P[None])[0] == 0
    for basis, skipped in zip(combinations(range(9), k), singular, strict=True):
        if not skipped:
            others = [a for a in range(9) if a not in basis]
            norms = np.abs(np.linalg.solve(G[:, basis], G[:, others])).sum(axis=0)
            rising = np.sort(np.log2(np.maximum(norms, 1)))
            s = rising[9 - k - m - 1] if m < 9 - k else 0
            pairs.append((rising[-1] - s, rising[-1]))
    bounds, rho = np.transpose(sorted(pairs, key=lambda pair: -pair[0] - pair[1] / 2**14))
    expected = np.full((2, 126), float(LIMIT))
    expected[0, : len(rho)] = np.minimum(bounds[0] - bounds, LIMIT)
    expected[1, : len(rho)] = np.clip(rho - bounds[0], -LIMIT, LIMIT)
    expected[0, 0] = bounds[0]
    return expected.ravel()


@pytest.mark.parametrize(("k", "m"), GROUPS)
def test_features_are_those_of_linear_algebra(k, m):
    rng = np.random.default_rng(10 * k + m)
    P = np.concatenate([rng.integers(-most, most + 1, size=(5, k, 9 - k)) for most in (1, 4, 20, 100)])
    assert (minors(P) == 0).any()
    for matrix, found in zip(P, features(*P, m=m), strict=True):
        expected = by_linear_algebra(matrix, m)
        # The order of bases whose bounds are nearly equal is up to rounding, so that their rho can change places.
        np.testing.assert_allclose(found[:126], expected[:126], atol=1e-3)
        np.testing.assert_allclose(np.sort(found[126:]), np.sort(expected[126:]), atol=1e-4)
        assert (np.abs(found - expected) > 1e-3).mean() < 0.05


def test_a_singular_basis_is_told_from_one_with_a_small_minor():
    P = np.array([[100, 99, 3, 4, 5], [100, 99, 2, 7, 1], [1, 2, 9, -4, 4], [-3, 8, 2, 2, 6]])
    near = P.copy()
    near[0, 0] -= 1  # Now a minor of order 2 is 99 - 198 and none is 0 any more.
    for matrix in (P, near):
        found = features(matrix, m=3)[0]
        last = found[:126][::-1] == LIMIT, found[126:][::-1] == LIMIT
        singular = int((minors(matrix[None]) == 0).sum())
        assert (last[0] & last[1])[:singular].all() and not (last[0] & last[1])[singular : singular + 20].all()
    assert (minors(P[None]) == 0).sum() > (minors(near[None]) == 0).sum()


@pytest.mark.parametrize(("k", "m"), GROUPS)
def test_no_height_is_below_the_largest_bound_and_where_m_is_n_minus_k_they_are_equal(k, m):
    P = random_matrices(np.random.default_rng(m), 300, k, 9 - k)
    height = m_heights(P, [m])[:, 0]
    finite = np.isfinite(height)
    assert finite.sum() > 30
    bound, height = features(*P[finite], m=m)[:, 0], np.log2(height[finite])
    assert (bound <= height + 1e-5).all()
    if m == 9 - k:
        np.testing.assert_allclose(bound, height, atol=1e-5)
    else:
        assert (bound < height - 0.01).any()


@pytest.mark.parametrize("k", KS)
def test_permutations_and_signs_change_nothing(k):
    rng = np.random.default_rng(k)
    P = random_matrices(rng, 60, k, 9 - k)
    same = []
    for matrix in P:
        signs = rng.choice([-1, 1], size=k)[:, None] * rng.choice([-1, 1], size=9 - k)
        same.append((signs * matrix)[rng.permutation(k)][:, rng.permutation(9 - k)])
    for m in range(2, 10 - k):
        first, second = np.split(features(*P, *same, m=m), 2)
        np.testing.assert_allclose(first[:, :126], second[:, :126], atol=2e-3)
        # Bases whose bounds differ in rounding alone may change places.
        assert (np.abs(first - second)[:, 126:] > 1e-3).mean() < 1e-3


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
        np.testing.assert_allclose(first[:, :126], second[:, :126], atol=1e-3)
        np.testing.assert_allclose(np.sort(first[:, 126:]), np.sort(second[:, 126:]), atol=1e-3)


def test_features_of_a_code_do_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(0)
    mixed = [random_matrices(rng, 1, KS[i % 3], 9 - KS[i % 3])[0] for i in range(12)]
    together = features(*mixed, m=2)
    for P, row in zip(mixed, together, strict=True):
        np.testing.assert_allclose(features(P, m=2)[0], row, atol=1e-6)
    assert (together[2::3, 84:126] == LIMIT).all() and (together[2::3, 210:] == LIMIT).all()


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


def test_three_sets_carry_features_and_share_no_code(small, short_search):
    settings = run5.Settings(features="raw", extra_codes=4, test_codes=50)
    train_rows, val_rows = run5.split_dataset(small)
    sets = run5.three_sets(small, settings)
    assert list(sets) == ["training", "validation", "test"]
    for name in ("k", "m", "P", "height", "key"):
        np.testing.assert_array_equal(getattr(sets["validation"], name), getattr(small, name)[val_rows])
        np.testing.assert_array_equal(getattr(sets["training"], name)[:306], getattr(small, name)[train_rows])
    for data in sets.values():
        np.testing.assert_array_equal(data.features, data.P)
        exact = prepare.label(Codes(np.full(len(data), 9), data.k, data.m, data.P))
        np.testing.assert_array_equal(data.height, exact)
    rows = run5.describe_sets(sets)
    assert list(rows.index) == list(GROUPS)
    assert {tuple(row) for row in rows.to_numpy()} == {(34 + 4 * 34, 6, 50)}
    assert len(np.unique(np.concatenate([data.key for data in sets.values()]))) == 9 * (34 + 4 * 34 + 6 + 50)
    assert np.bincount(sets["test"].group, sets["test"].low).tolist() == [5] * 9

    again = run5.three_sets(small, settings)
    np.testing.assert_array_equal(again["training"].P, sets["training"].P)
    other = run5.three_sets(small, replace(settings, seed=43))
    assert (other["training"].P[306:400] != sets["training"].P[306:400]).any()
    np.testing.assert_array_equal(other["test"].P, sets["test"].P)  # Seeds are compared on the same test set.
    without = run5.three_sets(small, replace(settings, extra_codes=0))
    np.testing.assert_array_equal(without["training"].P, sets["training"].P[:306])


def test_a_code_in_two_sets_would_be_found(small):
    sets = {"training": small.take(np.arange(10)), "validation": small.take(np.arange(9, 20))}
    with pytest.raises(RuntimeError, match="1 codes are in the training set and in the validation set"):
        run5.describe_sets(sets)


def test_codes_that_the_dataset_has_are_in_neither_the_test_set_nor_the_extra_codes(short_search):
    settings = run5.Settings(features="raw", extra_codes=1, seed=5, test_codes=100)
    for seed in (run5.TEST_SEED, [5, 1]):
        dataset = prepare.make_dataset(100, seed)
        run5.describe_sets(run5.three_sets(dataset, settings))  # It raises where sets share a code.


def test_the_keys_of_made_codes_are_those_of_their_matrices():
    made = prepare.make_dataset(30, seed=7)
    for k in KS:
        rows = made.k == k
        P = prepare.unflatten(made.P[rows], k)
        np.testing.assert_array_equal(made.key[rows], prepare.code_keys(P))


def test_simple_models_are_fitted_to_training_rows_alone_and_know_a_line(small):
    rng = np.random.default_rng(0)
    lines = {(k, m): rng.normal(size=3) for k, m in GROUPS}
    x = np.hstack([np.full((len(small), 1), 2.0), rng.normal(size=(len(small), 3))])
    log2 = np.array([row[1:] @ lines[k, m] + 9 for row, k, m in zip(x, small.k, small.m, strict=True)])
    data = replace(small, features=x.astype("float32"), height=2**log2)
    parts = [
        replace(data.take(rows), features=data.features[rows]) for rows in (np.arange(0, 360, 2), np.arange(1, 360, 2))
    ]
    table = run5.simple_predictions(*parts, "basis")
    errors = run5.group_errors(parts[1], parts[1].log2_height, table)
    assert list(errors.columns) == ["mean", "bound", "ridge", "n"] and (errors["n"] == 20).all()
    assert (errors["ridge"] < 0.05 * errors["mean"]).all()
    np.testing.assert_allclose(table["bound"], 2)
    for i in range(9):
        mean = parts[0].log2_height[parts[0].group == i].mean()
        np.testing.assert_allclose(table["mean"][parts[1].group == i], mean)
    assert list(run5.simple_predictions(*parts, "raw")) == ["mean", "ridge"]


@pytest.mark.slow
def test_trials_of_features(tmp_path):
    """Validation errors after three epochs on other features than the default: the table of data/feature_trials.md."""

    def levels(x):
        return np.hstack([x[:, :1], x[:, :1] - x[:, 1:126], x[:, :1] + x[:, 126:]])

    trials = {
        "the default": (lambda x: x, "basis"),
        "bounds and rho_B themselves, not relative to the largest bound": (levels, "basis"),
        "bounds alone, without rho_B": (lambda x: x[:, :126], "basis"),
        "the default, the largest bound not added to the output": (lambda x: x, "raw"),
    }
    settings = run5.Settings(extra_codes=1, test_codes=10, epochs=3, seed=1)
    sets = run5.three_sets(run5.load_dataset(*settings.data), settings)
    errors = {}
    for number, (name, (transform, kind)) in enumerate(trials.items()):
        parts = (sets["training"], sets["validation"])
        train_set, val_set = (replace(data, features=transform(data.features)) for data in parts)
        run5.set_up_keras(settings.seed, run5.precision_for("auto"))
        network = run5.build_network(train_set.features, replace(settings, features=kind))
        run5.compile_network(network, keras.optimizers.AdamW(1e-3, weight_decay=1e-4, clipnorm=1.0))
        rate = keras.callbacks.LearningRateScheduler(lambda epoch, _: 1e-3 * 0.3**epoch)
        (tmp_path / str(number)).mkdir()
        checkpoint = run5.Checkpoint(tmp_path / str(number), {})
        run5.fit(network, run5.Batches(train_set, settings), val_set, [rate], checkpoint)
        errors[name] = [epoch["val_loss"] for epoch in checkpoint.history]
        print(f"{name}: {' '.join(f'{error:.4f}' for error in errors[name])}", flush=True)
    assert min(errors, key=lambda name: errors[name][-1]) == "the default"
