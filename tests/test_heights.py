"""The exact heights against the definition, their invariances and the course's own labels."""

import json
from fractions import Fraction
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import linprog

from data.heights import GROUPS, N, m_heights, minors


def generator_matrix(P):
    return np.hstack([np.eye(len(P)), P])


def height_by_lp(P, m):
    """By definition: the largest g_a . u with |g_i . u| <= 1 on n - m other coordinates i."""
    G = generator_matrix(P)
    n, rank = G.shape[1], np.linalg.matrix_rank
    best = 0.0
    for S in combinations(range(n), n - m):
        constraints, limits = np.vstack([G[:, S].T, -G[:, S].T]), np.ones(2 * len(S))
        for a in set(range(n)) - set(S):
            found = linprog(-G[:, a], constraints, limits, bounds=(None, None), method="highs")
            if found.status != 0:
                # HiGHS may call an unbounded program infeasible: g_a must be outside span(G_S).
                assert rank(G[:, [*S, a]]) > rank(G[:, S]), found.message
                return np.inf
            best = max(best, -found.fun)
    return best


@pytest.mark.parametrize(
    ("n", "k", "m", "largest"),
    [(N, k, m, largest) for k, m in GROUPS for largest in (1, 3, 100)]
    + [(N, k, m, "real") for k, m in ((4, 2), (5, 3), (6, 3))]
    + [(2, 1, 1, 9), (5, 2, 2, 9), (10, 4, 2, 9), (10, 7, 3, 9), (12, 1, 11, 9), (12, 10, 1, 9)],
)
def test_heights_are_those_of_the_lp_definition(n, k, m, largest):
    rng = np.random.default_rng([n, k, m])
    shape = (1, k, n - k)
    P = rng.normal(size=shape) if largest == "real" else rng.integers(-largest, largest + 1, shape)
    assert m_heights(P, [m])[0, 0] == pytest.approx(height_by_lp(P[0], m), rel=1e-9)


def test_heights_are_the_published_ones():
    """The smallest known, of n = 9 and 10, and closed forms and tables of the theory."""
    table = pd.read_csv(ROOT / "data" / "known_heights.csv")
    assert len(table) == 74
    for source, n, k, m, height, P in table.itertuples(index=False):
        P = np.array(json.loads(P), dtype=float)
        assert P.shape == (k, n - k)
        assert m_heights(P[None], m)[0, 0] == pytest.approx(height, rel=1e-7), source


def test_every_m_at_once_is_each_m_alone_in_any_order():
    P = np.random.default_rng(0).integers(-8, 9, (300, 4, 5))
    together = m_heights(P, [5, 2, 4, 3, 2])
    assert_array_equal(m_heights(P, 4), together[:, [2]])
    for column, m in enumerate([5, 2, 4, 3, 2]):
        assert_array_equal(together[:, column], m_heights(P, [m])[:, 0])
    assert m_heights(P[:0], [2]).shape == (0, 1)


def by_expansion(P, sign):
    """Determinants (sign -1) or permanents (1), exact, of the bases of [I | P] in their order."""

    def expand(rows):
        if not rows:
            return Fraction(1)
        smaller = [[row[:j] + row[j + 1 :] for row in rows[1:]] for j in range(len(rows))]
        return sum(sign**j * x * expand(smaller[j]) for j, x in enumerate(rows[0]) if x)

    G = [[Fraction(float(x)) for x in row] for row in generator_matrix(P)]
    bases = combinations(range(len(G[0])), len(G))
    return np.array([float(expand([[row[i] for i in B] for row in G])) for B in bases])


@pytest.mark.parametrize("k", [4, 5, 6])
@pytest.mark.parametrize("scale", [1, 0.1, 1e7])
@pytest.mark.parametrize("change", [0, 1e-14, 1e-11])
def test_minors_of_integers_are_exact_and_real_ones_0_where_rounding_can_have_made_them(
    k, scale, change
):
    P = np.random.default_rng(k).integers(-100, 101, (2, k, N - k)) * scale
    if scale != 1:  # A column that is twice another, but for a change of one entry.
        P[:, :, 1] = 2 * P[:, :, 0]
        P[1, 0, 1] *= 1 + change
    real = (np.rint(P) != P).any(axis=(1, 2))
    for matrix, is_real, found in zip(P, real, minors(P), strict=True):
        exact = np.abs(by_expansion(matrix, -1))
        zero = exact <= is_real * 1e-13 * by_expansion(np.abs(matrix), 1)
        assert_array_equal(found == 0, zero)
        expected = np.where(zero, 0, exact)
        assert_allclose(found, expected, rtol=0 if scale == 1 else 1e-10)


def test_minors_do_not_depend_on_the_other_matrices_of_a_batch():
    P = np.random.default_rng(0).integers(-9, 10, (4, 4, 5))
    P[:, 3] = P[:, 0] + P[:, 1]  # So that some minors are 0, but for rounding.
    P = P * np.array([1, 0.1, 0.1e-20, 0.1e20])[:, None, None]
    assert_array_equal(minors(P), [minors(matrix[None])[0] for matrix in P])


def test_integers_of_any_size_have_their_exact_minors():
    rng = np.random.default_rng(0)
    P = rng.integers(8_000, 9_700, (30_000, 4, 5)) * rng.choice([-1, 1], (30_000, 4, 5))
    P[:, 3] = P[:, 0] + P[:, 1] - P[:, 2]  # So that the minors of all four rows, the last, are 0.
    P = P[np.abs(P).max(axis=(1, 2)) < 9_700]  # To the power of 4 that is below 2^53.
    assert (minors(P[:20])[:, -5:] == 0).all()
    for largest in (20_000, 10**6):
        P = np.random.default_rng(0).integers(-largest, largest + 1, (2, 4, 5))
        P[1, 3] = P[1, 0] + P[1, 1] - P[1, 2]
        P[1, 3, 0] += 1  # So that some minors are small beside the products in them.
        for matrix, found in zip(P, minors(P), strict=True):
            assert_allclose(found, np.abs(by_expansion(matrix, -1)), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("P", "m", "message"),
    [
        (np.zeros((4, 5)), 2, r"found \(4, 5\)"),
        (np.full((1, 4, 5), np.nan), 2, "NaN"),
        (np.full((1, 4, 5), 1e80), 2, "P: expected"),
        (np.full((1, 4, 5), 1e-80), 2, "P: expected"),
        (np.ones((1, 4, 5)), 6, "found 6, expected 1 to n - k = 5"),
        (np.ones((1, 4, 5)), 0, "found 0"),
    ],
)
def test_what_has_no_height_is_refused(P, m, message):
    with pytest.raises(ValueError, match=message):
        m_heights(P, [m])
