"""Exact m-heights of linear codes over the reals, from the maximal minors of their generator matrices.

A code is given by its generator matrix in systematic form, G = [I_k | P]. This file holds

  minors      the maximal minors of G, which are the square minors of P,
  m_heights   the exact m-heights,
  code_keys   digests that are equal for equivalent codes: equal up to row and column permutations and signs.

Heights follow Roth, Zhu, Yuan, Siegel, Jiang, "On the Height Profile of Analog Error-Correcting Codes"
(arXiv 2602.20366). For a basis B (k columns of G that are independent) let M[B, a] = || G_B^-1 g_a ||_1, the largest
value that |c_a| takes over the codewords c with |c_b| <= 1 for all b in B. By the duality of linear programs

    h_m = max over sets S of n - m coordinates, a outside S, of  min over bases B inside S of  M[B, a].
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import combinations
from math import factorial
from operator import getitem
from typing import NamedTuple

import numpy as np
import pandas as pd

# The codes that networks are trained on: their length n, their (k, m) groups, and the entries of the largest P.
N = 9
GROUPS = ((4, 2), (4, 3), (4, 4), (4, 5), (5, 2), (5, 3), (5, 4), (6, 2), (6, 3))
P_WIDTH = 20
# Codes in files can be labelled up to this length.
LONGEST = 12

# Matrices handled in one go: few enough that the tables of one chunk stay in a core's own cache.
CHUNK = 128

# Float64 holds every integer up to here; all of the arithmetic on smaller ones is exact.
EXACT_INTEGER_LIMIT = 2.0**53
# A real minor whose possible rounding error is larger than this part of it is computed again as a fraction.
MINOR_RELATIVE_ERROR = 1e-11
# Outside these magnitudes products of four real entries can leave the range of float64.
REAL_ENTRY_MIN, REAL_ENTRY_MAX = 1e-50, 1e50


# --- minors ---------------------------------------------------------------------------------------------------------


@lru_cache
def minor_tables(k: int, r: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Laplace expansion of all square minors of a (k, r) matrix, one order after the other.

    For each order from 2 on: (entry, sub), integer arrays of shape (minors of this order, order). The minor is the
    alternating sum over j of P.flat[entry[:, j]] * minors_of_the_order_before[sub[:, j]].
    """
    tables = []
    before = {((row,), (col,)): row * r + col for row in range(k) for col in range(r)}
    for order in range(2, min(k, r) + 1):
        names = [(rows, cols) for rows in combinations(range(k), order) for cols in combinations(range(r), order)]
        entry = [[rows[0] * r + col for col in cols] for rows, cols in names]
        sub = [[before[rows[1:], cols[:j] + cols[j + 1 :]] for j in range(order)] for rows, cols in names]
        tables.append((np.array(entry), np.array(sub)))
        before = {name: i for i, name in enumerate(names)}
    return tables


@lru_cache
def minor_order(k: int, r: int) -> np.ndarray:
    """Where each maximal minor of G stands among 1 and the minors of P sorted by order, then rows, then columns.

    Shape (C(k + r, k),), for the sets of k columns of G in the order of itertools.combinations. With the columns A of
    the unit matrix and the columns J of P chosen, |det G_B| is the minor of P in the rows outside A and the columns J.
    """
    names = [((), ())]
    for order in range(1, min(k, r) + 1):
        names += [(rows, cols) for rows in combinations(range(k), order) for cols in combinations(range(r), order)]
    place = {name: i for i, name in enumerate(names)}
    wanted = []
    for basis in combinations(range(k + r), k):
        rows = tuple(i for i in range(k) if i not in basis)
        cols = tuple(i - k for i in basis if i >= k)
        wanted.append(place[rows, cols])
    return np.array(wanted)


def expand(entries, tables: list[tuple[np.ndarray, np.ndarray]], sign: int, take=getitem) -> list:
    """Minors of every order, from order 1 on, by the tables of minor_tables.

    entries: those of P, shape (k * r, batch), an array, or a tensor of which take(x, rows) gives rows. sign: -1 for
    determinants, +1 for permanents.
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
    return sum(
        (
            (-1) ** j * x * _fraction_det([row[:j] + row[j + 1 :] for row in rows[1:]])
            for j, x in enumerate(rows[0])
            if x
        ),
        Fraction(0),
    )


def _abs_minors(entries: np.ndarray, k: int, r: int) -> np.ndarray:
    """|maximal minors of G|, shape (C(k + r, k), batch), from entries of P of shape (k * r, batch)."""
    tables, order = minor_tables(k, r), minor_order(k, r)
    one = np.ones((1, entries.shape[1]))
    minors = np.abs(np.concatenate([one, *expand(entries, tables, -1)])[order])
    largest = np.abs(entries).max(initial=1.0)
    size = min(k, r)
    if factorial(size) * largest**size < EXACT_INTEGER_LIMIT and (entries == np.rint(entries)).all():
        return minors

    # Rounding errors are bounded by the permanents of |P|. What they could have touched is computed exactly.
    permanents = np.concatenate([one, *expand(np.abs(entries), tables, +1)])[order]
    rounding = 2 * size * np.finfo(np.float64).eps * permanents
    bases = list(combinations(range(k + r), k))
    for b, i in np.argwhere((rounding > MINOR_RELATIVE_ERROR * minors) & (permanents > 0)):
        matrix = entries[:, i].reshape(k, r)
        rows = [row for row in range(k) if row not in bases[b]]
        cols = [col - k for col in bases[b] if col >= k]
        minors[b, i] = abs(float(_fraction_det([[Fraction(matrix[row, col]) for col in cols] for row in rows])))
    return minors


def _check_matrices(P: np.ndarray) -> np.ndarray:
    """P as float64 of shape (batch, k, r). Raises ValueError for another shape, NaN, inf, or what could overflow."""
    P = np.asarray(P, dtype=np.float64)
    if P.ndim != 3 or 0 in P.shape[1:]:
        raise ValueError(f"P: expected shape (batch, k, n - k), found {P.shape}")
    if not np.isfinite(P).all():
        raise ValueError("P: found NaN or inf, expected finite entries")
    size = np.abs(P)
    if size.max(initial=0) > REAL_ENTRY_MAX or size.min(where=size > 0, initial=1) < REAL_ENTRY_MIN:
        raise ValueError(f"P: expected entries that are 0 or of size {REAL_ENTRY_MIN:g} to {REAL_ENTRY_MAX:g}")
    return P


def _chunks(P: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of the batch, each with its matrices as a contiguous array of shape (k * r, chunk)."""
    for start in range(0, len(P), CHUNK):
        part = slice(start, min(start + CHUNK, len(P)))
        yield part, np.ascontiguousarray(P[part].reshape(part.stop - start, -1).T)


def minors(P: np.ndarray) -> np.ndarray:
    """Absolute maximal minors of G = [I_k | P].

    P: shape (batch, k, n - k), integer or real. Returns float64 of shape (batch, C(n, k)); column b belongs to the
    b-th set of k columns in the order of itertools.combinations(range(n), k). Exact for integers whose minors stay
    below 2^53 (|entries| <= 100 gives at most 2.4e9); otherwise right to 1e-11 relative, and 0 only where the minor of
    the given floating-point entries is 0. Raises ValueError when P has another shape or entries that are not finite.
    """
    P = _check_matrices(P)
    _, k, r = P.shape
    out = np.empty((len(P), len(minor_order(k, r))))
    for part, entries in _chunks(P):
        out[part] = _abs_minors(entries, k, r).T
    return out


# --- heights --------------------------------------------------------------------------------------------------------


@lru_cache
def cramer_table(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pair (B, a), a outside B: the row of minor B, and those of the k minors B - j + a.

    Shapes (pairs,) and (k, pairs). Pairs run over the sets B in order, then over a in order.
    """
    place = {basis: i for i, basis in enumerate(combinations(range(n), k))}
    pairs = [(basis, a) for basis in place for a in range(n) if a not in basis]
    base = np.array([place[basis] for basis, _ in pairs])
    swap = np.array([[place[tuple(sorted((*basis[:j], *basis[j + 1 :], a)))] for basis, a in pairs] for j in range(k)])
    return base, swap


@lru_cache
def _min_table(n: int, k: int, size: int) -> np.ndarray:
    """For each pair (S, a) with |S| = size > k: the rows of k + 1 pairs (S - i, a), shape (k + 1, pairs).

    A basis has k elements, so of any k + 1 elements of S it misses one: these k + 1 sets cover every basis inside S.
    """
    smaller = [(s, a) for s in combinations(range(n), size - 1) for a in range(n) if a not in s]
    place = {pair: i for i, pair in enumerate(smaller)}
    pairs = [(s, a) for s in combinations(range(n), size) for a in range(n) if a not in s]
    return np.array([[place[s[:i] + s[i + 1 :], a] for s, a in pairs] for i in range(k + 1)])


def _basis_norms(D: np.ndarray, n: int, k: int) -> np.ndarray:
    """M[B, a] for the pairs of cramer_table, inf where B is singular, (pairs, batch), from |maximal minors| D."""
    base, swap = cramer_table(n, k)
    norms = D[swap[0]]
    for row in swap[1:]:
        norms += D[row]
    with np.errstate(divide="ignore", invalid="ignore"):
        norms /= D[base]
    if not D.all():
        norms[D[base] == 0] = np.inf
    return norms


def m_heights(P: np.ndarray, ms: Sequence[int]) -> np.ndarray:
    """Exact m-heights of the codes G = [I_k | P], by the max-min form over maximal minors (head of this file).

    P: shape (batch, k, n - k), integer or real. ms: the values of m, each from 1 to n - k. Returns float64 of shape
    (batch, len(ms)): h_m >= 1, and inf where a non-zero codeword has at most m non-zero coordinates. By Cramer's rule
    M[B, a] = sum over j in B of |D(B - j + a)| / |D(B)|, with D the maximal minors. Raises ValueError for another
    shape of P, entries that are not finite, or an m out of range.
    """
    P = _check_matrices(P)
    _, k, r = P.shape
    n = k + r
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


# --- codes ----------------------------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """Codes, row by row. n, k, m: int64 (rows,); P: float64 (rows, width), the entries of each P row-major, padded with
    zeros. The width is P_WIDTH unless a P is larger."""

    n: np.ndarray
    k: np.ndarray
    m: np.ndarray
    P: np.ndarray


ROW_COLUMNS = ("k", "m", "P", "height", "key", "low")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled codes, row by row.

    k, m: int64 (rows,); P: numbers (rows, P_WIDTH) as `flatten` lays it out; height: float64 (rows,); key: (rows,), of
    code_keys, equal for equivalent codes; low: bool (rows,), made to have a small height, False where that is not
    known; features: what a network is fed for P, float32 (rows, width), or None; infinite: rows of the file that were
    left out, since their height is infinite; labels: in words, where the heights are from. All codes have length N.
    """

    k: np.ndarray
    m: np.ndarray
    P: np.ndarray
    height: np.ndarray
    key: np.ndarray
    low: np.ndarray
    features: np.ndarray | None = None
    source: str = ""
    sha256: str = ""
    infinite: int = 0
    labels: str = ""

    def __len__(self) -> int:
        return len(self.height)

    @cached_property
    def group(self) -> np.ndarray:
        """Each row's (k, m) group as its position in GROUPS, int64 (rows,)."""
        return pd.MultiIndex.from_tuples(GROUPS).get_indexer(pd.MultiIndex.from_arrays([self.k, self.m]))

    @cached_property
    def log2_height(self) -> np.ndarray:
        """float64 (rows,)"""
        return np.log2(self.height)

    def describe(self) -> dict:
        """File, hash and rows; duplicates are rows whose code and m an earlier row has too."""
        duplicates = int(pd.DataFrame({"key": self.key, "m": self.m}).duplicated().sum())
        counts = {"rows": len(self), "duplicates": duplicates, "infinite": self.infinite, "labels": self.labels}
        return {"file": self.source, "sha256": self.sha256, **counts}

    def take(self, rows: np.ndarray) -> "Dataset":
        """The dataset of these rows alone, without features."""
        columns = {name: getattr(self, name)[rows] for name in ROW_COLUMNS}
        return replace(self, **columns, features=None)

    def extended(self, other: "Dataset") -> "Dataset":
        """The dataset with the rows of another after its own, without features."""
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in ROW_COLUMNS}
        return replace(self, **columns, features=None)


def flatten(P: np.ndarray) -> np.ndarray:
    """P of shape (batch, k, n - k) as rows of P_WIDTH numbers: row-major, padded with zeros."""
    flat = P.reshape(len(P), -1)
    return np.pad(flat, ((0, 0), (0, P_WIDTH - flat.shape[1])))


def unflatten(flat: np.ndarray, k: int, n: int = N) -> np.ndarray:
    """The matrices P, shape (batch, k, n - k), from rows of numbers padded with zeros."""
    return flat[:, : k * (n - k)].reshape(len(flat), k, n - k)


def code_keys(P: np.ndarray) -> np.ndarray:
    """One 16-byte digest for each matrix, equal for codes that are equal up to row and column permutation and sign.

    P: shape (batch, k, n - k). Returns bytes, shape (batch,), dtype S32 (hexadecimal). Integers (minors below 2^53):
    the digest of the sorted absolute maximal minors of G. Real entries: that of the sorted absolute minors of P of
    order 1 and 2, since their rounding does not depend on the order of rows and columns. Codes that are not
    equivalent can share a key (that is rare); equivalent ones always do. Raises ValueError as `minors` does.
    """
    P = _check_matrices(P)
    _, k, r = P.shape
    size = min(k, r)
    largest = np.abs(P).max(axis=(1, 2), initial=1.0)
    exact = (factorial(size) * largest**size < EXACT_INTEGER_LIMIT) & (np.rint(P) == P).all(axis=(1, 2))
    keys = np.empty(len(P), dtype="S32")
    for rows, invariants in ((exact, minors), (~exact, _small_minors)):
        values = np.sort(invariants(P[rows]), axis=1)
        prefix = f"{k} {r} {invariants.__name__} ".encode()
        keys[rows] = [hashlib.blake2b(prefix + row.tobytes(), digest_size=16).hexdigest() for row in values]
    return keys


def _small_minors(P: np.ndarray) -> np.ndarray:
    """Absolute minors of P of order 1 and 2, shape (batch, number of them)."""
    _, k, r = P.shape
    orders = expand(P.reshape(len(P), k * r).T, minor_tables(k, r)[:1], -1)
    return np.abs(np.concatenate(orders)).T
