"""What the network sees of a code: the layer of basis norms, against NumPy's linear algebra, and the drawn codes."""

from itertools import combinations

import keras
import numpy as np
import pytest
import tensorflow as tf

import train_model_v5 as run5
from data.prepare import GROUPS, Codes, cramer_table, draw_codes, flatten, m_heights, minors

KS = (4, 5, 6)
SINGULAR = run5.BasisNorms.LOG2_RANGE[1]


def seen(*matrices, m=None):
    """The layer's output for matrices of any of the three shapes, in one batch; m is n - k for each unless given."""
    k = np.array([len(P) for P in matrices])
    flat = np.concatenate([flatten(np.asarray(P, dtype=float)[None]) for P in matrices])
    m = 9 - k if m is None else np.full(len(k), m)
    return np.asarray(run5.BasisNorms()(k[:, None], m[:, None], flat))


def blocks(row):
    """One row of the output in its four blocks: rho, s, M without each coordinate, rho with it."""
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
    ordered = sorted(pairs, key=lambda pair: (-round(pair[0], 8), pair[1]))
    rho, s = (np.pad(column, (0, 126 - len(column))) for column in np.transpose(ordered))
    return rho, s, *picked


@pytest.mark.parametrize(("k", "m"), GROUPS)
def test_the_view_is_that_of_linear_algebra(k, m):
    rng = np.random.default_rng(k)
    checked = 0
    for largest in (4, 20, 100):
        for P in rng.integers(-largest, largest + 1, size=(12, k, 9 - k)):
            if (minors(P[None]) == 0).any():
                continue
            by_definition = by_linear_algebra(P, m)
            gaps = -np.diff(by_definition[0])
            if ((gaps > 1e-9) & (gaps < 1e-4)).any():
                continue  # The order of what is nearly equal is up to rounding.
            (row,) = seen(P, m=m)
            for got, expected in zip(blocks(row), by_definition, strict=True):
                np.testing.assert_allclose(got, expected, atol=2e-5)
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("k", KS)
def test_every_singular_basis_is_told_from_a_small_minor(k):
    rng = np.random.default_rng(k)
    P = np.concatenate([draw_codes(rng, 300, k, 9 - k), rng.integers(-100, 101, size=(300, k, 9 - k))])
    P[300:, :, 1] = P[300:, :, 0] + rng.integers(-1, 2, size=(300, k))
    D = minors(P).T
    base, swap = cramer_table(9, k)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.log2((D[swap].sum(axis=0) / D[base]).reshape(len(D), 9 - k, -1).max(axis=1))
    assert len(set((D == 0).sum(axis=0))) > 5
    expected = -np.sort(-np.where(D > 0, rho, 0), axis=0).T
    view = seen(*P, m=2)
    np.testing.assert_allclose(view[:, : len(D)], expected, atol=3e-5)
    np.testing.assert_array_equal(view[:, 252:].max(axis=1) == SINGULAR, (D == 0).any(axis=0))


@pytest.mark.parametrize("k", KS)
def test_the_largest_norm_is_the_height_where_m_is_n_minus_k(k):
    P = draw_codes(np.random.default_rng(k), 200, k, 9 - k)
    heights = m_heights(P, [9 - k])[:, 0]
    finite = np.isfinite(heights)
    assert finite.sum() > 30
    view = seen(*P)
    np.testing.assert_allclose(view[finite, 0], np.log2(heights[finite]), atol=1e-5)
    assert (view[:, 126:252] == 0).all()


@pytest.mark.parametrize(("k", "m"), GROUPS)
def test_the_height_is_at_least_rho_by_s_of_each_basis(k, m):
    P = draw_codes(np.random.default_rng(m), 100, k, 9 - k)
    view = seen(*P, m=m)
    assert ((view[:, :126] - view[:, 126:252]).max(axis=1) <= np.log2(m_heights(P, [m])[:, 0]) + 1e-4).all()


@pytest.mark.parametrize("k", KS)
def test_permutations_and_signs_change_nothing(k):
    rng = np.random.default_rng(k)
    m = rng.integers(2, 10 - k, size=30)
    for i, P in enumerate(draw_codes(rng, 30, k, 9 - k)):
        signs = rng.choice([-1, 1], size=k)[:, None] * rng.choice([-1, 1], size=9 - k)
        same = (signs * P)[rng.permutation(k)][:, rng.permutation(9 - k)]
        np.testing.assert_allclose(*seen(P, same, m=m[i]), atol=1e-6)


@pytest.mark.parametrize("k", KS)
def test_another_systematic_form_of_the_code_looks_the_same(k):
    rng = np.random.default_rng(k)
    for P in rng.integers(-20, 21, size=(20, k, 9 - k)):
        G = np.hstack([np.eye(k), P])
        basis = sorted(rng.choice(9, size=k, replace=False))
        if np.linalg.matrix_rank(G[:, basis]) < k:
            continue
        other = np.linalg.solve(G[:, basis], G[:, [a for a in range(9) if a not in basis]])
        for m in range(2, 10 - k):
            first, second = seen(P, other, m=m)
            np.testing.assert_allclose(first, second, atol=1e-3)


def test_a_code_is_seen_alike_in_any_company():
    rng = np.random.default_rng(0)
    mixed = [draw_codes(rng, 1, KS[i % 3], 9 - KS[i % 3])[0] for i in range(12)]
    together = seen(*mixed, m=2)
    for P, row in zip(mixed, together, strict=True):
        np.testing.assert_allclose(seen(P, m=2)[0], row, atol=1e-6)
    assert (together[2::3, 84:126] == 0).all() and (together[2::3, 210:252] == 0).all()


@pytest.mark.parametrize("k", KS)
def test_sorted_by_numpy_or_by_keras_it_is_the_same_to_the_bit(k, monkeypatch):
    """A GPU sorts by Keras what was learned on a CPU. Small entries, so that there are many ties."""
    codes = draw_codes(np.random.default_rng(k), 60, k, 9 - k) % 4
    by_numpy = seen(*codes)
    monkeypatch.setattr(run5, "has_gpu", lambda: True)
    np.testing.assert_array_equal(seen(*codes), by_numpy)


def test_precision_policy_does_not_reach_into_the_layer():
    P = np.random.default_rng(1).integers(-100, 101, size=(20, 4, 5))
    expected = seen(*P)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = run5.BasisNorms()
        again = layer(np.full((20, 1), 4), np.full((20, 1), 5), flatten(P.astype(float)))
    finally:
        keras.config.set_dtype_policy("float32")
    assert layer.compute_dtype == "float64" and keras.backend.standardize_dtype(again.dtype) == "float32"
    np.testing.assert_allclose(np.asarray(again), expected, atol=1e-6)


@pytest.mark.parametrize("features", ["basis", "raw"])
@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_layer_is_saved_by_name_and_has_no_weights(features, suffix, small_npz, tmp_path):
    dataset = run5.load_dataset(small_npz)
    view = run5.see(dataset, features)
    model = run5.height_model(run5.build_network(view.shape[1], run5.fit_scaler(view, np.arange(len(view)))), features)
    assert model.get_layer("P_seen").weights == []
    model.save(tmp_path / f"model.{suffix}")
    again = keras.models.load_model(tmp_path / f"model.{suffix}")
    assert type(again.get_layer("P_seen")) is run5.FEATURES[features]
    inputs = run5.model_inputs(dataset, np.arange(len(dataset)))
    np.testing.assert_array_equal(again.predict(inputs, verbose=0), model.predict(inputs, verbose=0))


def test_what_the_network_sees_is_in_the_order_of_the_rows(small_npz):
    dataset = run5.load_dataset(small_npz)
    order = np.random.default_rng(0).permutation(len(dataset))
    mixed = Codes(dataset.k[order], dataset.m[order], dataset.P[order])
    np.testing.assert_allclose(run5.see(mixed, "basis"), run5.see(dataset, "basis")[order], atol=1e-6)
    np.testing.assert_array_equal(run5.see(mixed, "raw"), mixed.P)


def test_rows_are_seen_when_first_asked_for_and_kept(small_npz, monkeypatch):
    """In small batches here: what is seen of a row must not depend on its company, or a resumed run would differ."""
    dataset = run5.load_dataset(small_npz)
    whole = run5.see(dataset, "basis")
    monkeypatch.setattr(run5, "PREDICTION_BATCH", 16)
    seen = run5.Seen(dataset, "basis")
    assert seen.shape == whole.shape and seen.made == 0
    rng = np.random.default_rng(0)
    rows = rng.integers(len(dataset), size=50)
    np.testing.assert_array_equal(seen[rows], whole[rows])
    assert seen.made == len(np.unique(rows))
    everything = rng.permutation(len(dataset))
    np.testing.assert_array_equal(seen[everything], whole[everything])
    assert seen.made == len(dataset)
    seen.view = None
    np.testing.assert_array_equal(seen[rows], whole[rows])


def test_xla_leaves_the_view_alone(small_npz):
    """It rounds in another way, and rows are seen while a step that it compiles is running."""
    dataset = run5.load_dataset(small_npz)
    outside = run5.see(dataset, "basis")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with run5.compiled_between_products():
            assert tf.config.optimizer.get_jit()
            inside = run5.see(dataset, "basis")
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(inside, outside)


def test_drawn_codes_are_new_labelled_exactly_and_follow_from_the_seed(small_npz):
    dataset = run5.load_dataset(small_npz)
    train_rows, val_rows = run5.split_dataset(dataset)
    pool, rows = run5.add_drawn(dataset, train_rows, 4, seed=42)
    drawn = np.arange(len(dataset), len(pool))
    for name in ("k", "m", "P", "height"):
        np.testing.assert_array_equal(getattr(pool, name)[: len(dataset)], getattr(dataset, name))
    np.testing.assert_array_equal(rows, [*train_rows, *drawn])
    assert 0.99 * 4 * len(train_rows) < len(drawn) <= 4 * len(train_rows)
    assert np.ptp(np.bincount(pool.group[drawn])) <= 0.02 * len(drawn)
    assert not np.intersect1d(pool.code[drawn], pool.code[: len(dataset)]).size
    assert sum(row["val_rows"] for row in run5.describe_split(pool, rows, val_rows)) == len(val_rows)
    run5.check_labels(pool)
    np.testing.assert_array_equal(run5.add_drawn(dataset, train_rows, 4, seed=42)[0].P, pool.P)
    assert (run5.add_drawn(dataset, train_rows, 4, seed=43)[0].P[drawn[:100]] != pool.P[drawn[:100]]).any()


def test_the_keys_of_the_pool_are_those_of_its_codes(small_npz):
    dataset = run5.load_dataset(small_npz)
    pool, _ = run5.add_drawn(dataset, np.arange(0, 360, 2), 3, seed=7)
    afresh = run5.Dataset(pool.k, pool.m, pool.P, pool.height)
    np.testing.assert_array_equal(pool.key, afresh.key)


def test_a_code_of_the_dataset_is_not_drawn_again(small_npz, monkeypatch):
    dataset = run5.load_dataset(small_npz)
    train_rows, val_rows = run5.split_dataset(dataset)
    own = {name: getattr(dataset, name)[val_rows] for name in ("k", "m", "P", "height", "key")}
    fresh = run5.make_dataset(5, seed=8)
    both = {name: np.concatenate([own[name], fresh[name]]) for name in own}
    monkeypatch.setattr(run5, "make_dataset", lambda *_: both)
    pool, rows = run5.add_drawn(dataset, train_rows, 1, seed=1)
    assert len(pool) - len(dataset) == len(rows) - len(train_rows) == 45
    np.testing.assert_array_equal(pool.P[len(dataset) :], fresh["P"])


def test_without_drawn_codes_the_dataset_is_as_it_was(small_npz):
    dataset = run5.load_dataset(small_npz)
    pool, rows = run5.add_drawn(dataset, np.arange(50), 0, seed=1)
    assert pool is dataset
    np.testing.assert_array_equal(rows, np.arange(50))
