"""data/augmented.npz and what makes it, npz files of others, and the split."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data import matrices, prepare
from data.dataset import Dataset, InputError, exact_heights, flatten, load_dataset, read_codes
from data.heights import GROUPS, OPEN_GROUPS, N, code_keys, m_heights
from data.matrices import STRUCTURED_SHARE, UNIFORM_RANGES, random_matrices
from train_model_v5 import split_dataset

SHIPPED = ROOT / "data" / "augmented.npz"


@pytest.fixture(scope="module")
def shipped():
    return load_dataset(SHIPPED)


def scramble(rng, P):
    """The same code again: rows and columns permuted, signs flipped."""
    k, r = P.shape
    signs = np.outer(rng.choice([-1, 1], k), rng.choice([-1, 1], r))
    return (signs * P)[np.ix_(rng.permutation(k), rng.permutation(r))]


def as_dataset(rows):
    """A Dataset from (k, m, P) tuples, with heights of 2."""
    k, m, P = zip(*rows, strict=True)
    flat = np.concatenate([flatten(matrix[None]) for matrix in P])
    keys = np.concatenate([code_keys(matrix[None]) for matrix in P])
    same = {"height": np.full(len(k), 2.0), "low": np.zeros(len(k), dtype=bool)}
    return Dataset(np.array(k), np.array(m), flat, key=keys, about={"file": "rows"}, **same)


def test_the_shipped_dataset_is_exact_and_has_the_rows_it_promises(shipped):
    assert np.bincount(shipped.group).tolist() == [12_000] * 9
    assert len(np.unique(shipped.key)) == shipped.about["rows"] == 108_000
    assert (np.abs(shipped.P) <= 100).all()
    np.testing.assert_array_equal(exact_heights(read_codes(SHIPPED)), shipped.height)


def test_the_shipped_file_is_what_prepare_makes(shipped, tmp_path, capsys, whole_search):
    assert prepare.main(["--output", str(tmp_path / "again.npz")]) == 0
    said = capsys.readouterr().out
    log2 = shipped.log2_height.reshape(9, -1)
    table = re.findall(r"^(?:4|5|6)? +\d +12000\.0 +([\d.]+) .* ([\d.]+)$", said, re.MULTILINE)
    expected = np.stack([log2.mean(axis=1), log2.max(axis=1)], axis=1)
    np.testing.assert_allclose(np.array(table, dtype=float), expected, atol=0.006)
    assert "108,000 rows" in said
    with np.load(SHIPPED) as file, np.load(tmp_path / "again.npz") as again:
        assert sorted(file) == sorted(again) == ["P", "height", "k", "m"]
        for name in file:
            assert file[name].dtype == again[name].dtype
            np.testing.assert_array_equal(file[name], again[name])


def test_random_matrices_are_as_described():
    P = random_matrices(np.random.default_rng(0), 40_000, 4, 5)
    largest = np.abs(P).max(axis=(1, 2))
    for bound in UNIFORM_RANGES:
        below = sum(share for most, share in UNIFORM_RANGES.items() if most <= bound)
        assert (largest <= bound).mean() == pytest.approx(below, abs=STRUCTURED_SHARE + 0.01)
    assert (largest <= 1).mean() == pytest.approx(STRUCTURED_SHARE / 3, rel=0.15)
    near = (np.abs(P[:, :, 1] - P[:, :, 0]) <= 1).all(axis=1) & (largest > 8)
    assert near.mean() == pytest.approx(STRUCTURED_SHARE / 3 * 0.68, rel=0.25)
    low = np.linalg.matrix_rank(P[largest > 1].astype(float)) < 4
    assert low.mean() == pytest.approx(STRUCTURED_SHARE / 3, rel=0.15)


def test_a_search_lowers_heights_within_the_range_of_each_matrix():
    rng = np.random.default_rng(0)
    P, rounds = random_matrices(rng, 200, 5, 4), np.repeat([0, 10, 100], [50, 75, 75])
    found = matrices.search(rng, P, 3, rounds)
    before, after = (np.log2(np.minimum(m_heights(x, [3])[:, 0], 1e9)) for x in (P, found))
    np.testing.assert_array_equal(found[:50], P[:50])
    gain = before - after
    assert (gain >= 0).all() and 0.3 < np.median(gain[50:125]) < np.median(gain[125:]) - 0.5
    assert (np.abs(found).max(axis=(1, 2)) <= np.abs(P).max(axis=(1, 2))).all()
    assert 1 <= (found != P)[50:].sum(axis=(1, 2)).mean() <= 20


def test_a_tenth_of_each_group_is_low_and_known_codes_are_left_out(whole_search):
    made = prepare.make_dataset(200, seed=3)
    assert made.low.reshape(9, 200).tolist() == [[False] * 180 + [True] * 20] * 9
    log2 = made.log2_height.reshape(9, 200)
    assert (np.median(log2[:, 180:], axis=1) < np.median(log2, axis=1) - 0.5).all()
    other = prepare.make_dataset(200, seed=3, known=made.key)
    assert len(np.unique([made.key, other.key])) == 2 * len(made) == 3600


def test_some_extra_codes_are_of_very_small_height():
    made = [*prepare.make_extra_codes(200, 3, ())]
    assert [(part.k[0], part.m[0]) for part in made] == [*OPEN_GROUPS]
    assert all(part.low.tolist() == [False] * 132 + [True] * 68 for part in made)
    counts = np.unique(np.concatenate([part.key for part in made]), return_counts=True)[1]
    assert np.bincount(counts).tolist() == [0, 6 * 152, 0, 6 * 16]
    log2 = np.stack([part.log2_height for part in made])
    random, _, very_low = (np.median(x, axis=1) for x in np.split(log2, [132, 152], axis=1))
    assert (very_low < random - 1).all()


def test_extra_codes_are_none_of_those_for_the_accuracy_at_very_small_heights(monkeypatch):
    (first, *_) = prepare.make_extra_codes(200, 3, ())
    monkeypatch.setattr(prepare, "load_dataset", {prepare.VERY_LOW: first}.get)
    (again, *_) = prepare.make_extra_codes(200, 3, ())
    assert not set(first.key) & set(again.key)


def test_the_codes_of_very_small_height_are_the_lowest_of_long_searches(monkeypatch, whole_search):
    searched = []
    monkeypatch.setattr(matrices, "search", lambda rng, P, m, rounds: searched.append(rounds) or P)
    matrices.very_low_matrices(np.random.default_rng(0), 5, 4, 2, (3000, 3000))
    assert searched.pop().tolist() == [3000] * 5
    P = matrices.very_low_matrices(np.random.default_rng(0), 999, 4, 2)
    assert {*np.abs(P).max(axis=(1, 2)).tolist()} == {*range(1, 9)}
    rounds = np.quantile(searched[0], [0, 0.5, 1])
    np.testing.assert_allclose(rounds, [30, 300, 3000], rtol=0.15)

    rng = np.random.default_rng(0)
    found = {(k, m): random_matrices(rng, 300, k, N - k) for k, m in GROUPS}
    rising = {(k, m): P[np.argsort(m_heights(P, m)[:, 0])] for (k, m), P in found.items()}
    in_dataset = np.concatenate([code_keys(P[5:50]) for P in rising.values()])

    def instead(function, arguments, workers):
        streams, *others = zip(*arguments, strict=True)
        assert len({rng.integers(2**60) for rng in streams}) == 9
        return (found[group] for group in zip(*others[1:3], strict=True))

    monkeypatch.setattr(prepare, "in_parallel", instead)
    monkeypatch.setattr(prepare, "load_dataset", lambda _: SimpleNamespace(key=in_dataset))
    codes = prepare.very_low_codes()
    for (k, m), P in rising.items():
        heights = exact_heights(codes.take((codes.k == k) & (codes.m == m)))[1:]
        expected = m_heights(P[[*range(5), *range(50, 300)]], m)[:, 0]
        expected = expected[np.isfinite(expected)][:100]
        np.testing.assert_array_equal(heights, expected)


def test_each_file_that_is_made_has_its_name():
    for options, path in (([], prepare.DATASET), (["--very-low"], prepare.VERY_LOW)):
        assert prepare.parse_arguments(options).output == path


def test_codes_for_the_accuracy_at_very_small_heights_are_not_those_of_the_dataset(shipped):
    very_low = load_dataset(prepare.VERY_LOW)
    known = pd.read_csv(prepare.KNOWN_HEIGHTS)["height"][:9].tolist()
    assert very_low.height[:9].tolist() == known
    rest = very_low.take(np.arange(9, len(very_low)))
    assert not set(rest.key) & set(shipped.key) and np.bincount(rest.group).max() == 100
    for i in range(9):
        usual = np.quantile(shipped.height[shipped.group == i], 0.01)
        assert np.median(rest.height[rest.group == i]) < usual


@pytest.mark.slow
def test_the_shipped_codes_of_very_small_height_are_what_prepare_makes(tmp_path, whole_search):
    assert prepare.main(["--very-low", "--output", str(tmp_path / "again.npz")]) == 0
    again, shipped = (load_dataset(x) for x in (tmp_path / "again.npz", prepare.VERY_LOW))
    np.testing.assert_array_equal(again.P, shipped.P)


@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([4, 5, 6]), real=st.booleans())
def test_one_code_has_one_key_and_another_code_another(seed, k, real):
    rng = np.random.default_rng(seed)
    largest = rng.choice([1, 9, 100, 10**6])
    P = rng.integers(-largest, largest + 1, (k, N - k)) + real * rng.normal(size=(k, N - k))
    other = P.copy()
    other[0, 0] += 10 * largest + 7
    keys = code_keys(np.stack([P, scramble(rng, P), other]))
    assert keys[0] == keys[1] != keys[2]
    assert code_keys(P[None])[0] != code_keys(P.T[None])[0]


@pytest.mark.parametrize("largest", [3, 60])
def test_a_code_of_integers_has_one_key_in_every_systematic_form_of_integers(largest):
    P = np.random.default_rng(0).integers(-largest, largest + 1, (20, 4, 5))
    P[:, 0, 0] = 1
    other = P - P[:, :, :1] * P[:, :1]  # Unit column 0 is exchanged for column 0 of P.
    other[:, 0], other[:, :, 0] = P[:, 0], -P[:, :, 0]
    other[:, 0, 0] = 1
    keys = code_keys(np.concatenate([P, P[:1] / 3]))  # Whatever is beside them.
    np.testing.assert_array_equal(keys[:20], code_keys(other))
    assert len(np.unique(keys)) == 21


def test_a_group_that_would_have_no_row_in_one_set_is_refused():
    """It has one code, which has a row of another group before, by which it is counted."""
    rng = np.random.default_rng(0)
    rows = [(k, m, P) for k, m in GROUPS for P in rng.integers(1, 99, (20, k, N - k))]
    rows = [row for row in rows if row[:2] != (4, 3)] + [(4, 3, rows[0][2])]
    with pytest.raises(InputError, match=r"\(4, 3\)"):
        split_dataset(as_dataset(rows))


def check_split(dataset, train, val):
    assert sorted([*train, *val]) == list(range(len(dataset)))
    assert not set(dataset.key[train]) & set(dataset.key[val])
    assert set(dataset.group[train]) == set(dataset.group[val]) == set(range(9))


@pytest.mark.parametrize("real", [False, True])
def test_duplicates_and_other_m_of_a_code_stay_together(real):
    rng, rows = np.random.default_rng(3), []
    for k, ms in ((4, (2, 3, 4, 5)), (5, (2, 3, 4)), (6, (2, 3))):
        for P in rng.integers(-20, 21, (200, k, N - k)) + real * rng.normal(size=(200, k, N - k)):
            for m in rng.choice(ms, rng.integers(1, len(ms) + 1), replace=False):
                rows += [(k, m, scramble(rng, P)) for _ in range(rng.integers(1, 4))]
    dataset = as_dataset(rows)
    assert len(np.unique(dataset.key)) == 600
    check_split(dataset, *split_dataset(dataset))
    shares = np.bincount(dataset.group[split_dataset(dataset)[1]]) / np.bincount(dataset.group)
    np.testing.assert_allclose(shares, 0.15, atol=0.05)


@given(seed=st.integers(0, 2**32 - 1), most=st.integers(1, 40), largest=st.sampled_from([1, 100]))
def test_a_split_is_clean_or_refused_for_too_few_codes(seed, most, largest):
    rng, rows = np.random.default_rng(seed), []
    for k, m in GROUPS:
        P = rng.integers(-largest, largest + 1, (most, k, N - k))
        chosen = rng.integers(0, most, rng.integers(1, 2 * most + 1))
        rows += [(k, m, scramble(rng, P[i])) for i in chosen]
    dataset = as_dataset(rows)
    codes = [len(np.unique(dataset.key[dataset.group == i])) for i in range(9)]
    try:
        check_split(dataset, *split_dataset(dataset, seed=seed))
    except InputError as error:
        assert min(codes) < 7 and "\n" not in str(error)
