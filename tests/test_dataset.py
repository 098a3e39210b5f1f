"""data/augmented.npz and what makes it, and the split."""

import re
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data import matrices, prepare
from data.dataset import Dataset, InputError, flatten, load_dataset
from data.heights import GROUPS, OPEN_GROUPS, N, code_keys
from train_model_v5 import split_dataset

SHIPPED = ROOT / "data" / "augmented.npz"


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


def test_the_shipped_file_is_what_prepare_makes(tmp_path, capsys, whole_search):
    assert prepare.parse_arguments([]).output.samefile(SHIPPED)
    assert prepare.main(["--output", str(tmp_path / "again.npz")]) == 0
    said = capsys.readouterr().out
    log2 = load_dataset(SHIPPED).log2_height.reshape(9, -1)
    table = re.findall(r"^(?:4|5|6)? +\d +12000\.0 +([\d.]+) .* ([\d.]+)$", said, re.MULTILINE)
    expected = np.stack([log2.mean(axis=1), log2.max(axis=1)], axis=1)
    np.testing.assert_allclose(np.array(table, dtype=float), expected, atol=0.006)
    assert "108,000 rows" in said
    with np.load(SHIPPED) as file, np.load(tmp_path / "again.npz") as again:
        assert sorted(file) == sorted(again) == ["P", "height", "k", "m"]
        for name in file:
            assert file[name].dtype == again[name].dtype
            np.testing.assert_array_equal(file[name], again[name])


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


def test_extra_codes_are_none_of_the_known_ones_and_of_those_of_very_small_height(monkeypatch):
    (first, *_) = prepare.make_extra_codes(200, 3, ())
    very_low = first.take(np.arange(100))
    monkeypatch.setattr(prepare, "load_dataset", {prepare.VERY_LOW: very_low}.get)
    (again, *_) = prepare.make_extra_codes(200, 3, first.key[100:])
    assert not set(first.key) & set(again.key)


def test_a_process_of_the_search_that_is_killed_is_named(monkeypatch):
    killed = mock.Mock(side_effect=BrokenProcessPool)
    monkeypatch.setattr(prepare.joblib, "Parallel", lambda *_, **__: killed)
    with pytest.raises(InputError, match="killed"):
        next(prepare.make_extra_codes(10, 1, ()))


def test_very_low_codes_are_searched_for_long_from_small_entries(monkeypatch, whole_search):
    searched = []
    monkeypatch.setattr(matrices, "search", lambda rng, P, m, rounds: searched.append(rounds) or P)
    P = matrices.very_low_matrices(np.random.default_rng(0), 999, 4, 2)
    assert {*np.abs(P).max(axis=(1, 2)).tolist()} == {*range(1, 9)}
    rounds = np.quantile(searched[0], [0, 0.5, 1])
    np.testing.assert_allclose(rounds, [30, 300, 3000], rtol=0.15)


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


@pytest.mark.parametrize("real", [False, True])
def test_duplicates_and_other_m_of_a_code_stay_together(real):
    rng, rows = np.random.default_rng(3), []
    for k, ms in ((4, (2, 3, 4, 5)), (5, (2, 3, 4)), (6, (2, 3))):
        for P in rng.integers(-20, 21, (200, k, N - k)) + real * rng.normal(size=(200, k, N - k)):
            for m in rng.choice(ms, rng.integers(1, len(ms) + 1), replace=False):
                rows += [(k, m, scramble(rng, P)) for _ in range(rng.integers(1, 4))]
    dataset = as_dataset(rows)
    assert len(np.unique(dataset.key)) == 600
    train, val = split_dataset(dataset)
    assert sorted([*train, *val]) == list(range(len(dataset)))
    assert not set(dataset.key[train]) & set(dataset.key[val])
    shares = np.bincount(dataset.group[val]) / np.bincount(dataset.group)
    np.testing.assert_allclose(shares, 0.15, atol=0.05)
