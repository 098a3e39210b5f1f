"""The exact labeller against the definition, the invariances, and rows of the course's own data."""

import pickle
import time
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from conftest import COURSE_SAMPLE
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from data.heights import GROUPS, N, m_heights, minors


def generator_matrix(P):
    return np.hstack([np.eye(len(P)), P])


def height_by_lp(P, m):
    """The definition: the largest g_a . u with |g_i . u| <= 1 on n - m other coordinates, by HiGHS."""
    G = generator_matrix(P)
    k, n = G.shape
    best = 0.0
    for S in combinations(range(n), n - m):
        constraints = np.vstack([G[:, S].T, -G[:, S].T])
        for a in set(range(n)) - set(S):
            found = linprog(-G[:, a], constraints, np.ones(2 * len(S)), bounds=[(None, None)] * k, method="highs")
            if found.status != 0:
                # HiGHS may call an unbounded program infeasible (u = 0 is feasible): g_a must be outside span(G_S).
                assert np.linalg.matrix_rank(G[:, [*S, a]]) > np.linalg.matrix_rank(G[:, S]), found.message
                return np.inf
            best = max(best, -found.fun)
    return best


@pytest.mark.parametrize(("k", "m"), GROUPS)
@pytest.mark.parametrize("largest", [1, 3, 100])
def test_heights_are_those_of_the_lp_definition(k, m, largest):
    P = np.random.default_rng([k, m, largest]).integers(-largest, largest + 1, (1, k, N - k))
    assert m_heights(P, [m])[0, 0] == pytest.approx(height_by_lp(P[0], m), rel=1e-9)


@pytest.mark.parametrize(("k", "m"), [(4, 2), (5, 3), (6, 3)])
def test_heights_of_real_matrices_are_those_of_the_lp_definition(k, m):
    P = np.random.default_rng([k, m]).normal(size=(1, k, N - k))
    assert m_heights(P, [m])[0, 0] == pytest.approx(height_by_lp(P[0], m), rel=1e-9)


@pytest.mark.parametrize(("n", "k", "m"), [(2, 1, 1), (5, 2, 2), (10, 4, 2), (10, 7, 3), (12, 1, 11), (12, 10, 1)])
def test_heights_of_other_lengths_are_those_of_the_lp_definition(n, k, m):
    P = np.random.default_rng([n, k, m]).integers(-9, 10, (1, k, n - k))
    assert m_heights(P, [m])[0, 0] == pytest.approx(height_by_lp(P[0], m), rel=1e-9)


@pytest.mark.parametrize("k", [4, 5, 6])
def test_for_m_equal_to_n_minus_k_the_height_is_the_largest_row_sum_over_bases(k):
    P = np.random.default_rng(k).integers(-50, 51, (20, k, N - k))
    heights = m_heights(P, [N - k])[:, 0]
    assert np.isfinite(heights).sum() >= 10
    for matrix, height in zip(P[np.isfinite(heights)], heights[np.isfinite(heights)], strict=True):
        G = generator_matrix(matrix)
        M = [np.abs(np.linalg.solve(G[:, B], G)).sum(axis=0).max() for B in combinations(range(N), k)]
        assert height == pytest.approx(max(M), rel=1e-9)


def test_known_heights():
    # P = 0 leaves codewords of weight 1.
    zero, ones = np.zeros((1, 4, 5)), np.ones((1, 4, 5))
    assert np.isinf(m_heights(zero, [2, 3, 4, 5])).all()
    # With all entries 1 the difference of two rows has weight 2, so every height from m = 2 on is infinite.
    assert m_heights(ones, [1])[0, 0] < np.inf
    assert np.isinf(m_heights(ones, [2, 3, 4, 5])).all()
    # k = 1: one codeword up to scale, so the height can be read off its sorted entries.
    assert m_heights(np.ones((1, 1, 8)), [8])[0, 0] == 1
    assert m_heights(np.array([[[3, 1]]]), [1, 2]).tolist() == [[3, 3]]


def test_every_m_at_once_is_each_m_alone_in_any_order():
    P = np.random.default_rng(0).integers(-8, 9, (300, 4, 5))
    together = m_heights(P, [5, 2, 4, 3, 2])
    for column, m in enumerate([5, 2, 4, 3, 2]):
        np.testing.assert_array_equal(together[:, column], m_heights(P, [m])[:, 0])
    assert m_heights(P[:0], [2]).shape == (0, 1)


def exact_minors(P):
    """|maximal minors of G| of one matrix as fractions."""

    def det(rows):
        if not rows:
            return Fraction(1)
        return sum((-1) ** j * x * det([r[:j] + r[j + 1 :] for r in rows[1:]]) for j, x in enumerate(rows[0]))

    G = [[Fraction(float(x)) for x in row] for row in generator_matrix(P)]
    k, n = len(G), len(G[0])
    return [abs(det([[row[i] for i in B] for row in G])) for B in combinations(range(n), k)]


@pytest.mark.parametrize("k", [4, 5, 6])
def test_integer_minors_are_exact(k):
    P = np.random.default_rng(k).integers(-100, 101, (2, k, N - k))
    for matrix, found in zip(P, minors(P), strict=True):
        assert [Fraction(x) for x in found.tolist()] == exact_minors(matrix)


@pytest.mark.parametrize("k", [4, 5, 6])
@pytest.mark.parametrize("scale", [0.1, 1e7])
def test_minors_beyond_exact_integers_are_singular_only_where_they_are(k, scale):
    # Two equal columns up to a factor 2, and one entry off by the last bit: float64 alone cannot tell these apart.
    P = np.random.default_rng(k).integers(-9, 10, (2, k, N - k)) * scale
    P[:, :, 1] = 2 * P[:, :, 0]
    P[1, 0, 1] = np.nextafter(P[1, 0, 1], np.inf)
    for matrix, found in zip(P, minors(P), strict=True):
        for value, exact in zip(found.tolist(), exact_minors(matrix), strict=True):
            assert (value == 0) == (exact == 0)
            assert value == pytest.approx(float(exact), rel=1e-10)


@st.composite
def matrices(draw):
    k = draw(st.sampled_from([4, 5, 6]))
    bound = draw(st.sampled_from([1, 2, 8, 100]))
    entries = st.lists(st.integers(-bound, bound), min_size=k * (N - k), max_size=k * (N - k))
    return np.array(draw(entries)).reshape(k, N - k)


@given(P=matrices(), data=st.data())
def test_heights_do_not_change_with_the_order_and_sign_of_rows_and_columns(P, data):
    k, r = P.shape
    rows, cols = data.draw(st.permutations(range(k))), data.draw(st.permutations(range(r)))
    sign = st.sampled_from([-1, 1])
    row_signs = np.array(data.draw(st.lists(sign, min_size=k, max_size=k)))
    col_signs = np.array(data.draw(st.lists(sign, min_size=r, max_size=r)))
    other = (row_signs[:, None] * P * col_signs)[np.ix_(rows, cols)]
    ms = list(range(1, r + 1))
    np.testing.assert_allclose(m_heights(other[None], ms), m_heights(P[None], ms), rtol=1e-12)


@given(P=matrices(), data=st.data())
def test_heights_do_not_change_with_the_systematic_basis(P, data):
    # Exchanging unit column i for column j of P is exact over the integers where P[i, j] is 1.
    k, r = P.shape
    i, j = data.draw(st.integers(0, k - 1)), data.draw(st.integers(0, r - 1))
    P[i, j] = 1
    other = P - np.outer(P[:, j], P[i])
    other[i], other[:, j] = P[i], -P[:, j]
    other[i, j] = 1
    ms = list(range(1, r + 1))
    np.testing.assert_allclose(m_heights(other[None], ms), m_heights(P[None], ms), rtol=1e-12)


@given(P=matrices())
def test_heights_grow_with_m(P):
    heights = m_heights(P[None], range(1, P.shape[1] + 1))[0]
    assert heights[0] >= 1
    assert (heights[1:] >= heights[:-1]).all()


@pytest.mark.parametrize(
    ("P", "ms", "message"),
    [
        (np.zeros((4, 5)), [2], r"shape \(batch, k, n - k\), found \(4, 5\)"),
        (np.full((1, 4, 5), np.nan), [2], "NaN or inf"),
        (np.full((1, 4, 5), 1e80), [2], "of size 1e-50 to 1e\\+50"),
        (np.full((1, 4, 5), 1e-80), [2], "of size 1e-50 to 1e\\+50"),
        (np.ones((1, 4, 5)), [6], "m: found 6, expected 1 to n - k = 5"),
        (np.ones((1, 4, 5)), [0], "m: found 0"),
    ],
)
def test_what_has_no_height_is_refused(P, ms, message):
    with pytest.raises(ValueError, match=message):
        m_heights(P, ms)


@pytest.mark.skipif(not COURSE_SAMPLE.exists(), reason="the course's sample is not here")
def test_heights_are_those_of_the_course():
    with open(COURSE_SAMPLE / "DS-1-sample_n_k_m_P.pkl", "rb") as file:
        rows = pickle.load(file)
    with open(COURSE_SAMPLE / "DS-1-sample_mHeights.pkl", "rb") as file:
        labels = np.array(pickle.load(file))
    for k, m in GROUPS:
        inside = [i for i, row in enumerate(rows) if row[1:3] == [k, m]]
        heights = m_heights(np.stack([rows[i][3] for i in inside]), [m])[:, 0]
        np.testing.assert_allclose(np.log2(heights), np.log2(labels[inside]), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "least"), [(4, 10_000), (5, 50_000), (6, 100_000)])
def test_rate_of_the_labeller(k, least):
    """Matrices a second, every m of a group at once, in one process; the best of five readings."""
    P = np.random.default_rng(0).integers(-100, 101, (20_000, k, N - k))
    ms = [m for group, m in GROUPS if group == k]
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        m_heights(P, ms)
        rates.append(len(P) / (time.perf_counter() - start))
    print(f"k={k}: {max(rates):,.0f} matrices a second")
    assert max(rates) >= least
