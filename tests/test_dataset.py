"""data/augmented.npz and what makes it; the loader; the split."""

import numpy as np
import pytest
from conftest import ROOT, run_script, write_dataset
from hypothesis import given
from hypothesis import strategies as st

import train_model_v5 as run5
from data import prepare
from data.heights import GROUPS, N, code_keys, flatten, m_heights, unflatten
from data.matrices import LOW_KINDS, STRUCTURED_SHARE, UNIFORM_RANGES, low_matrices, random_matrices, search


@pytest.fixture(scope="module")
def shipped():
    return run5.load_dataset(ROOT / "data" / "augmented.npz")


def scramble(rng, P):
    """The same code again: rows and columns permuted, signs flipped."""
    k, r = P.shape
    signs = np.outer(rng.choice([-1, 1], k), rng.choice([-1, 1], r))
    return (signs * P)[np.ix_(rng.permutation(k), rng.permutation(r))]


def as_dataset(rows):
    """A Dataset from (k, m, P, height) tuples."""
    k, m, P, height = zip(*rows, strict=True)
    flat = np.concatenate([flatten(matrix[None]) for matrix in P])
    keys = np.concatenate([code_keys(matrix[None]) for matrix in P])
    low = np.zeros(len(keys), dtype=bool)
    return run5.Dataset(np.array(k), np.array(m), flat.astype(float), np.array(height, dtype=float), keys, low)


def test_shipped_dataset_has_the_rows_it_promises(shipped):
    assert len(shipped) == 108_000
    assert np.bincount(shipped.group).tolist() == [12_000] * 9
    assert len(np.unique(shipped.key)) == 108_000
    assert (np.abs(shipped.P) <= 100).all()
    with np.load(ROOT / "data" / "augmented.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["P", "height", "k", "m"]
        assert {name: file[name].dtype.kind for name in file.files} == {"k": "i", "m": "i", "P": "i", "height": "f"}


def test_shipped_heights_are_exact(shipped):
    for i, (k, m) in enumerate(GROUPS):
        rows = np.flatnonzero(shipped.group == i)[::20]
        np.testing.assert_array_equal(m_heights(unflatten(shipped.P[rows], k), [m])[:, 0], shipped.height[rows])


def test_shipped_file_is_what_prepare_makes(tmp_path, shipped):
    made = run_script("--output", tmp_path / "again.npz", script="data/prepare.py", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "100% of all" in made.stdout
    again = run5.load_dataset(tmp_path / "again.npz")
    for name in ("k", "m", "P", "height"):
        np.testing.assert_array_equal(getattr(again, name), getattr(shipped, name))


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    for name in ("one.npz", "two.npz"):
        prepare.main(["--rows", "10", "--output", str(tmp_path / name)])
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]


def test_another_seed_makes_another_dataset(small_npz):
    again, other = prepare.make_dataset(40, seed=1), prepare.make_dataset(10, seed=2)
    with np.load(small_npz) as file:
        assert all((file[name] == getattr(again, name)).all() for name in file.files)
    assert (other.P[:10] != again.P[:10]).any()


def test_random_matrices_are_as_described():
    rng = np.random.default_rng(0)
    P = random_matrices(rng, 40_000, 4, 5)
    largest = np.abs(P).max(axis=(1, 2))
    for bound, share in UNIFORM_RANGES.items():
        below = sum(p for r, p in UNIFORM_RANGES.items() if r <= bound)
        assert (largest <= bound).mean() == pytest.approx(below, abs=STRUCTURED_SHARE + 0.01), share
    assert (largest <= 1).mean() == pytest.approx(STRUCTURED_SHARE / 3, rel=0.15)
    near = (np.abs(P[:, :, 1] - P[:, :, 0]) <= 1).all(axis=1) & (largest > 8)
    assert near.mean() == pytest.approx(STRUCTURED_SHARE / 3 * 0.68, rel=0.25)
    low = np.array([np.linalg.matrix_rank(matrix) for matrix in P[:4000].astype(float)]) < 4
    assert low.mean() > STRUCTURED_SHARE / 3


def test_a_search_lowers_heights_within_the_range_of_each_matrix():
    rng = np.random.default_rng(0)
    P = random_matrices(rng, 200, 5, 4)
    rounds = np.repeat([0, 10, 100], [50, 75, 75])
    found = search(rng, P, 3, rounds)
    before, after = (m_heights(x, [3])[:, 0] for x in (P, found))
    np.testing.assert_array_equal(found[:50], P[:50])
    assert (after <= before).all()
    finite = np.isfinite(before)
    few, many = (np.log2(before[rows] / after[rows]).mean() for rows in (finite & (rounds == n) for n in (10, 100)))
    assert 0.3 < few < many - 0.5
    assert (np.abs(found).max(axis=(1, 2)) <= np.abs(P).max(axis=(1, 2))).all()
    assert found.dtype == P.dtype and 1 <= (found != P).sum(axis=(1, 2))[50:].mean() <= 20


def test_low_matrices_are_of_three_kinds():
    P = low_matrices(np.random.default_rng(0), 1000, 4, 3)
    spread = P.max(axis=(1, 2)) - P.min(axis=(1, 2))
    near = (spread <= 16) & (P.min(axis=(1, 2)) > 1)
    small = np.abs(P).max(axis=(1, 2)) <= 3
    assert near.mean() == pytest.approx(LOW_KINDS["near-constant"], abs=0.03)
    assert small.mean() == pytest.approx(LOW_KINDS["small"], abs=0.04)
    assert np.abs(P).max() <= 100
    log2 = np.log2(m_heights(P, [3])[:, 0])
    usual = np.log2(m_heights(random_matrices(np.random.default_rng(1), 2000, 4, 5), [3])[:, 0])
    for kind in (near, small, ~near & ~small):
        assert np.median(log2[kind & np.isfinite(log2)]) < np.median(usual[np.isfinite(usual)]) - 1


def test_a_tenth_of_each_group_is_low_and_known_codes_are_left_out():
    made = prepare.make_dataset(200, seed=3)
    assert np.bincount(made.group, made.low).tolist() == [20] * 9
    for i in range(9):
        group = made.take(made.group == i)
        assert group.low[180:].all() and not group.low[:180].any()
        assert np.median(group.log2_height[180:]) < np.median(group.log2_height) - 0.5
    other = prepare.make_dataset(200, seed=3, known=made.key.tolist())
    assert len(other) == len(made) and not np.isin(other.key, made.key).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows: found 0, expected a whole number from 1 to"),
        (["--seed", "-1"], "--seed: found -1, expected a whole number from 0 to"),
        (["--output", "no/such/folder.npz"], "is not a file name in an existing folder"),
    ],
)
def test_prepare_refuses_bad_options(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        prepare.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@given(
    seed=st.integers(0, 2**32 - 1), k=st.sampled_from([4, 5, 6]), real=st.booleans(), low=st.sampled_from([1, 9, 100])
)
def test_one_code_has_one_key_and_another_code_another(seed, k, real, low):
    rng = np.random.default_rng(seed)
    P = rng.integers(-low, low + 1, (k, N - k)) + (rng.normal(size=(k, N - k)) if real else 0)
    other = P.copy()
    other[0, 0] += 1000
    keys = code_keys(np.stack([P, scramble(rng, P), other]))
    assert keys[0] == keys[1] != keys[2]


def test_transposed_matrices_of_another_k_are_other_codes():
    P = np.random.default_rng(0).integers(-9, 10, (1, 4, 5))
    assert code_keys(P)[0] != code_keys(P.transpose(0, 2, 1))[0]


def check_split(dataset, train, val):
    assert sorted([*train, *val]) == list(range(len(dataset)))
    assert not set(dataset.key[train]) & set(dataset.key[val])
    for i in range(len(GROUPS)):
        assert (dataset.group[train] == i).any()
        assert (dataset.group[val] == i).any()


def test_default_split_holds_out_1800_rows_of_each_group(shipped):
    train, val = run5.split_dataset(shipped)
    check_split(shipped, train, val)
    assert np.bincount(shipped.group[val]).tolist() == [1800] * 9
    again = run5.split_dataset(shipped, val_fraction=0.15, seed=42)
    assert (again[0] == train).all() and (again[1] == val).all()
    assert (run5.split_dataset(shipped, seed=43)[1] != val).any()


def test_duplicates_and_other_m_of_a_code_stay_together():
    rng = np.random.default_rng(3)
    rows = []
    for k, ms in ((4, (2, 3, 4, 5)), (5, (2, 3, 4)), (6, (2, 3))):
        for P in rng.integers(-20, 21, (200, k, N - k)):
            for m in rng.choice(ms, rng.integers(1, len(ms) + 1), replace=False):
                rows += [(k, m, scramble(rng, P), 2.0) for _ in range(rng.integers(1, 4))]
    dataset = as_dataset(rows)
    assert len(np.unique(dataset.key)) == 600
    train, val = run5.split_dataset(dataset)
    check_split(dataset, train, val)
    for i in range(len(GROUPS)):
        inside = dataset.group == i
        assert inside[val].sum() / inside.sum() == pytest.approx(0.15, abs=0.05)


def test_every_row_three_times_is_split_as_exactly_as_once(small):
    three = small.take(np.random.default_rng(0).permutation(np.repeat(np.arange(len(small)), 3)))
    train, val = run5.split_dataset(three)
    check_split(three, train, val)
    assert np.bincount(three.group[val]).tolist() == [18] * 9


@given(seed=st.integers(0, 2**32 - 1), codes=st.integers(1, 40), largest=st.sampled_from([1, 3, 100]))
def test_a_split_is_clean_or_refused(seed, codes, largest):
    rng = np.random.default_rng(seed)
    rows = []
    for k, m in GROUPS:
        P = rng.integers(-largest, largest + 1, (codes, k, N - k))
        rows += [(k, m, scramble(rng, P[i]), 2.0) for i in rng.integers(0, codes, rng.integers(1, 2 * codes + 1))]
    dataset = as_dataset(rows)
    try:
        train, val = run5.split_dataset(dataset, seed=seed)
    except run5.InputError as error:
        assert "cannot hold out 15%" in str(error) or "group k=" in str(error)
    else:
        check_split(dataset, train, val)


def test_real_valued_matrices_are_split_by_code():
    rng = np.random.default_rng(5)
    rows = []
    for k, m in GROUPS:
        for P in rng.normal(size=(20, k, N - k)):
            rows += [(k, m, P, 2.0), (k, m, scramble(rng, P), 2.0)]
    dataset = as_dataset(rows)
    assert len(np.unique(dataset.key)) == 180
    check_split(dataset, *run5.split_dataset(dataset))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("height"), "has no array height, expected arrays height"),
        (lambda a: a.update(k=a["k"][:-1]), "array m has shape \\(360,\\), expected \\(359,\\)"),
        (lambda a: a.update(P=a["P"][:, :19]), "array P has shape \\(360, 19\\), expected \\(360, 20\\)"),
        (lambda a: a.update(height=a["height"].astype(str)), "array height has dtype .*, expected numbers"),
        (lambda a: a["k"].__setitem__(7, 3), "row 7: found \\(k, m\\) = \\(3, 2\\)"),
        (lambda a: a.update(P=np.where(np.arange(20) == 4, np.nan, a["P"])), "row 0: found NaN or inf in P"),
        (lambda a: a["P"].__setitem__((359, 19), 1), "row 359: found more than .* = 18 entries in P"),
        (lambda a: a["height"].__setitem__(5, 0.5), "row 5: found height 0.5, expected 1 or more"),
        (lambda a: a.update({name: array[:0] for name, array in a.items()}), "found no rows"),
    ],
)
def test_a_malformed_dataset_is_refused_in_one_line(tmp_path, change, message):
    arrays = write_dataset(tmp_path / "good.npz")
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(run5.InputError, match=message) as error:
        run5.load_dataset(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"not a zip", "cannot be read"), (b"PK\x03\x04 torn", "cannot be read")],
)
def test_what_is_no_npz_is_refused(tmp_path, content, message):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(run5.InputError, match=rf"bad\.npz: {message}"):
        run5.load_dataset(tmp_path / "bad.npz")


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(run5.InputError, match=r"none\.npz: cannot be read: No such file"):
        run5.load_dataset(tmp_path / "none.npz")


def test_an_object_array_is_never_unpickled(tmp_path, small_npz):
    with np.load(small_npz) as file:
        arrays = dict(file)
    np.savez(tmp_path / "bad.npz", **arrays | {"P": arrays["P"].astype(object)})
    with pytest.raises(run5.InputError, match="cannot be read"):
        run5.load_dataset(tmp_path / "bad.npz")
