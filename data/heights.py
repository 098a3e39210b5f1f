"""Exact m-heights of linear codes over the reals, from the maximal minors of G = [I_k | P].

G is the generator matrix in systematic form, and its maximal minors are the square minors of P.
Heights follow Roth, Zhu, Yuan, Siegel, Jiang, "On the Height Profile of Analog Error-Correcting
Codes" (arXiv 2602.20366). For a basis B (k independent columns of G) let M[B, a] = || G_B^-1 g_a
||_1, the largest value that |c_a| takes over the codewords c with |c_b| <= 1 for all b in B. By the
duality of linear programs

    h_m = max over sets S of n - m coordinates, a outside S, of  min over bases B in S of  M[B, a].
"""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, product
from math import factorial
from operator import getitem

import numpy as np

# The codes that networks are trained on: their length n and their (k, m) groups.
N = 9
GROUPS = ((4, 2), (4, 3), (4, 4), (4, 5), (5, 2), (5, 3), (5, 4), (6, 2), (6, 3))
# Those where the height is not just the largest bound of a basis, as it is for m = n - k.
OPEN_GROUPS = tuple((k, m) for k, m in GROUPS if m < N - k)
# Matrices handled in one go: few enough that the tables of one chunk stay in a core's own cache.
CHUNK = 128
# Float64 holds every integer up to here; all of the arithmetic on smaller ones is exact.
EXACT_INTEGER_LIMIT = 2.0**53
# A real minor with a larger possible rounding error, relative to it, is computed as a fraction.
MINOR_RELATIVE_ERROR = 1e-11
# A real entry is 0 where it is as small as this beside the largest one, and a minor of real entries
# beside the permanent of their sizes: what computed the entries may have lost a few digits of 16.
ROUNDING = 1e-13
# Outside these magnitudes products of four real entries can leave the range of float64.
REAL_ENTRY_MIN, REAL_ENTRY_MAX = 1e-50, 1e50


# --- minors ---------------------------------------------------------------------------------------


def _minor_names(k: int, r: int, order: int) -> list[tuple[tuple, tuple]]:
    """(rows, columns) of each minor of this order of a (k, r) matrix."""
    return list(product(combinations(range(k), order), combinations(range(r), order)))


@lru_cache
def minor_tables(k: int, r: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Laplace expansion of all square minors of a (k, r) matrix, one order after the other.

    For each order from 2 on: (entry, sub), integer arrays of shape (minors of this order, order).
    The minor is the alternating sum over j of P.flat[entry[:, j]] * smaller_minors[sub[:, j]].
    """
    tables = []
    before = {name: i for i, name in enumerate(_minor_names(k, r, 1))}
    for order in range(2, min(k, r) + 1):
        names = _minor_names(k, r, order)
        entry = [[rows[0] * r + col for col in cols] for rows, cols in names]
        without = [
            [(rows[1:], cols[:j] + cols[j + 1 :]) for j in range(order)] for rows, cols in names
        ]
        sub = [[before[name] for name in smaller] for smaller in without]
        tables.append((np.array(entry), np.array(sub)))
        before = {name: i for i, name in enumerate(names)}
    return tables


def _minor_of_basis(basis: tuple, k: int) -> tuple[tuple, tuple]:
    """(rows, columns) of the minor of P that is, up to its sign, the determinant of G_B."""
    return tuple(i for i in range(k) if i not in basis), tuple(i - k for i in basis if i >= k)


@lru_cache
def minor_order(k: int, r: int) -> np.ndarray:
    """Where each maximal minor of G stands among 1 and the minors of P, by order, rows, columns.

    Shape (C(k + r, k),), for the sets of k columns of G in the order of itertools.combinations.
    """
    names = [name for order in range(min(k, r) + 1) for name in _minor_names(k, r, order)]
    place = {name: i for i, name in enumerate(names)}
    bases = combinations(range(k + r), k)
    return np.array([place[_minor_of_basis(basis, k)] for basis in bases])


def expand(entries, tables: list[tuple[np.ndarray, np.ndarray]], sign: int, take=getitem) -> list:
    """Minors of every order, from order 1 on, by the tables of minor_tables.

    entries: those of P, shape (k * r, batch), an array, or a tensor of which take(x, rows) gives
    rows. sign: -1 for determinants, +1 for permanents.
    """
    orders = [entries]
    for entry, sub in tables:
        total = take(entries, entry[:, 0]) * take(orders[-1], sub[:, 0])
        for j in range(1, entry.shape[1]):
            term = take(entries, entry[:, j]) * take(orders[-1], sub[:, j])
            total = total - term if sign < 0 and j % 2 else total + term
        orders.append(total)
    return orders


def _fraction_det(rows: list[list[Fraction]]) -> Fraction:
    if not rows:
        return Fraction(1)
    smaller = [[row[:j] + row[j + 1 :] for row in rows[1:]] for j in range(len(rows))]
    return sum(
        ((-1) ** j * x * _fraction_det(smaller[j]) for j, x in enumerate(rows[0]) if x), Fraction(0)
    )


def _are_exact(P: np.ndarray, size: int) -> np.ndarray:
    """For each matrix, its entries along axis 0: all of its minors up to this size are integers
    below 2^53."""
    largest = np.abs(P).max(axis=0, initial=1.0)
    return (factorial(size) * largest**size < EXACT_INTEGER_LIMIT) & (np.rint(P) == P).all(axis=0)


def _abs_minors(entries: np.ndarray, k: int, r: int) -> np.ndarray:
    """|maximal minors of G|, shape (C(k + r, k), batch), from P's entries, (k * r, batch)."""
    tables, order = minor_tables(k, r), minor_order(k, r)
    one, size = np.ones((1, entries.shape[1])), min(k, r)
    exact = _are_exact(entries, size).all()
    if not exact:
        real, sizes = (np.rint(entries) != entries).any(axis=0), np.abs(entries)
        entries = np.where(real & (sizes <= ROUNDING * sizes.max(axis=0)), 0.0, entries)
    minors = np.abs(np.concatenate([one, *expand(entries, tables, -1)])[order])
    if exact:
        return minors

    # The permanents of |P| bound the rounding errors. What these can have changed is made exact.
    permanents = np.concatenate([one, *expand(np.abs(entries), tables, +1)])[order]
    rounding = 2 * size * np.finfo(np.float64).eps * permanents
    bases = list(combinations(range(k + r), k))
    for b, i in np.argwhere((rounding > MINOR_RELATIVE_ERROR * minors) & (permanents > 0)):
        part = entries[:, i].reshape(k, r)[np.ix_(*_minor_of_basis(bases[b], k))]
        minors[b, i] = abs(float(_fraction_det([[*map(Fraction, row)] for row in part.tolist()])))
    minors[real & (minors <= ROUNDING * permanents)] = 0
    return minors


def _check_matrices(P: np.ndarray) -> np.ndarray:
    """P as float64 of shape (batch, k, r). Raises ValueError for another shape, NaN, inf,
    overflow."""
    P = np.asarray(P, dtype=np.float64)
    if P.ndim != 3 or 0 in P.shape[1:]:
        raise ValueError(f"P: expected shape (batch, k, n - k), found {P.shape}")
    if not np.isfinite(P).all():
        raise ValueError("P: found NaN or inf, expected finite entries")
    size = np.abs(P)
    if size.max(initial=0) > REAL_ENTRY_MAX or size.min(where=size > 0, initial=1) < REAL_ENTRY_MIN:
        raise ValueError(f"P: expected 0 or sizes from {REAL_ENTRY_MIN:g} to {REAL_ENTRY_MAX:g}")
    return P


def _chunks(P: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of the batch, each with its matrices as a contiguous array of shape (k * r, chunk)."""
    for start in range(0, len(P), CHUNK):
        part = slice(start, min(start + CHUNK, len(P)))
        yield part, np.ascontiguousarray(P[part].reshape(part.stop - start, -1).T)


def minors(P: np.ndarray) -> np.ndarray:
    """Absolute maximal minors of G = [I_k | P].

    P: shape (batch, k, n - k), integer or real. Returns float64 of shape (batch, C(n, k)); column b
    belongs to the b-th set of k columns in the order of itertools.combinations(range(n), k). Exact
    for integers whose minors stay below 2^53 (|entries| <= 100 gives at most 2.4e9); otherwise
    right to 1e-11 relative. Those of integers are 0 where the minor is; those of real entries also
    where rounding of the entries can have made it, by the rule at ROUNDING. Raises ValueError when
    P has another shape or entries that are not finite.
    """
    P = _check_matrices(P)
    _, k, r = P.shape
    out = np.empty((len(P), len(minor_order(k, r))))
    for part, entries in _chunks(P):
        out[part] = _abs_minors(entries, k, r).T
    return out


# --- heights --------------------------------------------------------------------------------------


def _pairs(n: int, size: int) -> list[tuple[tuple, int]]:
    """(S, a) for each set S of this size, in order, and each coordinate a outside it, in order."""
    return [(s, a) for s in combinations(range(n), size) for a in range(n) if a not in s]


@lru_cache
def cramer_table(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pair (B, a), a outside B: the row of minor B, and those of the k minors B - j + a.

    Shapes (pairs,) and (k, pairs), in the order of _pairs.
    """
    place = {basis: i for i, basis in enumerate(combinations(range(n), k))}
    pairs = _pairs(n, k)
    base = [place[basis] for basis, _ in pairs]
    swapped = [[tuple(sorted({*basis, a} - {basis[j]})) for basis, a in pairs] for j in range(k)]
    return np.array(base), np.array([[place[basis] for basis in row] for row in swapped])


@lru_cache
def _min_table(n: int, k: int, size: int) -> np.ndarray:
    """For each pair (S, a), |S| = size > k: the rows of k + 1 pairs (S - i, a), (k + 1, pairs).

    A basis has k elements, so of any k + 1 elements of S it misses one: these k + 1 sets cover
    every basis inside S.
    """
    place = {pair: i for i, pair in enumerate(_pairs(n, size - 1))}
    pairs = _pairs(n, size)
    return np.array([[place[s[:i] + s[i + 1 :], a] for s, a in pairs] for i in range(k + 1)])


def _basis_norms(D: np.ndarray, n: int, k: int) -> np.ndarray:
    """M[B, a] for the pairs of cramer_table, (pairs, batch), inf where B is singular.

    D: the absolute maximal minors, (C(n, k), batch).
    """
    base, swap = cramer_table(n, k)
    norms = D[swap[0]]
    for row in swap[1:]:
        norms += D[row]
    with np.errstate(divide="ignore", invalid="ignore"):
        norms /= D[base]
    if not D.all():
        norms[D[base] == 0] = np.inf
    return norms


def m_heights(P: np.ndarray, ms: int | Sequence[int]) -> np.ndarray:
    """Exact m-heights of the codes G = [I_k | P], by the max-min form at the head of this file.

    P: shape (batch, k, n - k), integer or real. ms: one or more m, each from 1 to n - k. Returns
    float64 of shape (batch, len(ms)): h_m >= 1, and inf where a non-zero codeword has at most m
    non-zero coordinates. By Cramer's rule M[B, a] = sum over j in B of |D(B - j + a)| / |D(B)|,
    with D the maximal minors. Raises ValueError for another shape of P, entries that are not
    finite, or an m out of range.
    """
    P = _check_matrices(P)
    _, k, r = P.shape
    n, ms = k + r, np.atleast_1d(ms).tolist()
    for m in ms:
        if not 1 <= m <= r:
            raise ValueError(f"m: found {m}, expected 1 to n - k = {r}")

    heights = np.empty((len(P), len(ms)))
    for part, entries in _chunks(P):
        # For each pair (S, a), S of a growing size, the least M[B, a] over the bases B inside S.
        least = _basis_norms(_abs_minors(entries, k, r), n, k)
        for size in range(k, n - min(ms, default=n) + 1):
            if size > k:
                table = _min_table(n, k, size)
                smaller, least = least, least[table[0]]
                for row in table[1:]:
                    np.minimum(least, smaller[row], out=least)
            for column, m in enumerate(ms):
                if n - m == size:
                    heights[part, column] = least.max(axis=0)
    return heights


# --- keys of codes --------------------------------------------------------------------------------


def code_keys(P: np.ndarray) -> np.ndarray:
    """One digest for each matrix, equal for codes that are equal up to the order and signs of rows
    and columns of P, and of integers in every systematic form whose P has integers.

    P: shape (batch, k, n - k). Returns bytes of dtype S32, shape (batch,). Integers with minors
    below 2^53: the digest of the sorted absolute maximal minors of G. Real entries: that of the
    sorted absolute minors of P of order 1 and 2, whose rounding does not depend on the order of
    rows and columns; in another systematic form a real code has another key. Different codes rarely
    share one. Raises ValueError as `minors` does.
    """
    P = _check_matrices(P)
    _, k, r = P.shape
    exact = _are_exact(P.reshape(len(P), k * r).T, min(k, r))
    keys = np.empty(len(P), dtype="S32")
    for rows, invariants in ((exact, minors), (~exact, _small_minors)):
        values = np.sort(invariants(P[rows]), axis=1)
        texts = (f"{k} {r} {invariants.__name__} ".encode() + row.tobytes() for row in values)
        keys[rows] = [hashlib.blake2b(text, digest_size=16).hexdigest() for text in texts]
    return keys


def _small_minors(P: np.ndarray) -> np.ndarray:
    """Absolute minors of P of order 1 and 2, shape (batch, number of them)."""
    _, k, r = P.shape
    orders = expand(P.reshape(len(P), k * r).T, minor_tables(k, r)[:1], -1)
    return np.abs(np.concatenate(orders)).T
