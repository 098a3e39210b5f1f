"""Exact m-heights of codes over the reals, and the dataset data/augmented.npz of random codes labelled with them.

    python data/prepare.py                                    makes the dataset
    python data/prepare.py --label INPUTS --output HEIGHTS    labels the codes of a file

A code is given by its generator matrix in systematic form, G = [I_k | P]. This file holds

  minors       the maximal minors of G, which are the square minors of P,
  m_heights    the exact labeller,
  code_keys    what tells whether two matrices are one code up to row and column permutations and signs,
  read_codes   codes from a file of the course's format or npz, refused by row if malformed,
  draw_codes   the distribution that the matrices are drawn from,
  make_dataset the dataset, nine (k, m) groups of equal size in which no code occurs twice.

Heights follow Roth, Zhu, Yuan, Siegel, Jiang, "On the Height Profile of Analog Error-Correcting Codes"
(arXiv 2602.20366). For a basis B (k columns of G that are independent) let M[B, a] = || G_B^-1 g_a ||_1, the largest
value that |c_a| takes over the codewords c with |c_b| <= 1 for all b in B. By the duality of linear programs

    h_m = max over sets S of n - m coordinates, a outside S, of  min over bases B inside S of  M[B, a].
"""

import argparse
import csv
import hashlib
import io
import os
import pickle
import re
import reprlib
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from math import factorial
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

import numpy as np

N = 9
GROUPS = ((4, 2), (4, 3), (4, 4), (4, 5), (5, 2), (5, 3), (5, 4), (6, 2), (6, 3))
P_WIDTH = 20
ROWS_PER_GROUP = 12_000
SEED = 5

# Entries are uniform on [-R, R]. The share of each R is that of the course's DS-1 data.
UNIFORM_RANGES = {4: 0.11, 8: 0.21, 16: 0.11, 32: 0.04, 50: 0.17, 64: 0.09, 80: 0.05, 100: 0.22}
MAX_ENTRY = max(UNIFORM_RANGES)
STRUCTURED_SHARE = 0.04

# Matrices labelled in one go: few enough that the tables of one chunk stay in a core's own cache.
CHUNK = 128
# Rows that one process labels in one go when a file is labelled.
LABEL_BLOCK = 20_000

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


def _expand(entries: np.ndarray, tables: list[tuple[np.ndarray, np.ndarray]], sign: int) -> list[np.ndarray]:
    """Minors of every order from `entries`, shape (k * r, batch); sign -1 for determinants, +1 for permanents."""
    orders = [entries]
    for entry, sub in tables:
        total = entries[entry[:, 0]] * orders[-1][sub[:, 0]]
        for j in range(1, entry.shape[1]):
            term = entries[entry[:, j]] * orders[-1][sub[:, j]]
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
    minors = np.abs(np.concatenate([one, *_expand(entries, tables, -1)])[order])
    largest = np.abs(entries).max(initial=1.0)
    size = min(k, r)
    if factorial(size) * largest**size < EXACT_INTEGER_LIMIT and (entries == np.rint(entries)).all():
        return minors

    # Rounding errors are bounded by the permanents of |P|. What they could have touched is computed exactly.
    permanents = np.concatenate([one, *_expand(np.abs(entries), tables, +1)])[order]
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
    columns: dict[int, list[int]] = {}
    for column, m in enumerate(ms):
        columns.setdefault(n - m, []).append(column)

    base, swap = cramer_table(n, k)
    heights = np.empty((len(P), len(ms)))
    for part, entries in _chunks(P):
        D = _abs_minors(entries, k, r)
        least = D[swap[0]]
        for row in swap[1:]:
            least += D[row]
        with np.errstate(divide="ignore", invalid="ignore"):
            least /= D[base]
        if not D.all():
            least[D[base] == 0] = np.inf
        for size in range(k, max(columns, default=k) + 1):
            if size > k:
                table = _min_table(n, k, size)
                smaller, least = least, least[table[0]]
                for row in table[1:]:
                    np.minimum(least, smaller[row], out=least)
            for column in columns.get(size, ()):
                heights[part, column] = least.max(axis=0)
    return heights


# --- codes ----------------------------------------------------------------------------------------------------------


def flatten(P: np.ndarray) -> np.ndarray:
    """P of shape (batch, k, n - k) as rows of P_WIDTH numbers: row-major, padded with zeros."""
    flat = P.reshape(len(P), -1)
    return np.pad(flat, ((0, 0), (0, P_WIDTH - flat.shape[1])))


def unflatten(flat: np.ndarray, k: int) -> np.ndarray:
    """The matrices P, shape (batch, k, N - k), from rows of P_WIDTH numbers."""
    return flat[:, : k * (N - k)].reshape(len(flat), k, N - k)


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
    orders = _expand(P.reshape(len(P), k * r).T, minor_tables(k, r)[:1], -1)
    return np.abs(np.concatenate(orders)).T


def draw_codes(rng: np.random.Generator, count: int, k: int, r: int) -> np.ndarray:
    """Random integer matrices P, shape (count, k, r), entries in [-MAX_ENTRY, MAX_ENTRY].

    Nearly all have entries uniform on [-R, R], R drawn from UNIFORM_RANGES. A share STRUCTURED_SHARE is structured,
    a third each: entries in {-1, 0, 1}; one column equal to another but for a step of -1, 0 or 1 in each row; rank one
    less than full.
    """
    ranges = rng.choice(list(UNIFORM_RANGES), size=(count, 1, 1), p=list(UNIFORM_RANGES.values()))
    P = rng.integers(-ranges, ranges + 1, size=(count, k, r))

    family = rng.choice(4, size=count, p=[1 - STRUCTURED_SHARE, *[STRUCTURED_SHARE / 3] * 3])
    ternary, near, low = (np.flatnonzero(family == i) for i in (1, 2, 3))
    P[ternary] = rng.integers(-1, 2, size=(len(ternary), k, r))
    step = rng.integers(-1, 2, size=(len(near), k))
    P[near, :, 1] = np.clip(P[near, :, 0] + step, -MAX_ENTRY, MAX_ENTRY)
    rank = min(k, r) - 1
    left, right = rng.integers(-3, 4, size=(len(low), k, rank)), rng.integers(-8, 9, size=(len(low), rank, r))
    P[low] = left @ right
    return P


# --- files ----------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one line that says what, where and what was expected."""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


class Codes(NamedTuple):
    """Codes of length N, row by row. k, m: int64 (rows,); P: float64 (rows, P_WIDTH) as `flatten` lays it out."""

    k: np.ndarray
    m: np.ndarray
    P: np.ndarray


# Pickles come from strangers, and a malformed one can crash even NumPy's own unpickling. So a pickle calls nothing but
# the stand-ins below, which check what they are given; opcodes that course files have no use for are left out.


class _Admitted:
    """A function that a pickle may call and not change."""

    def __init__(self, call) -> None:
        self._call = call

    def __call__(self, *arguments):
        return self._call(*arguments)

    def __setstate__(self, state) -> NoReturn:
        raise pickle.UnpicklingError("it would change what it calls")


class _Dtype:
    """Stands in for numpy.dtype: plain numbers of at most eight bytes."""

    def __init__(self, code: str, *_) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def read(self, raw: bytes) -> np.ndarray:
        if not re.fullmatch("[biuf][1248]", self.code):
            raise pickle.UnpicklingError(f"it holds an array of dtype {self.code!r}, expected numbers")
        return np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.order))


class _Array:
    """Stands in for numpy.ndarray."""

    def __init__(self, values: np.ndarray) -> None:
        self.array = values

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = dtype.read(raw).reshape(shape, order="F" if fortran else "C")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _empty_array(kind, shape: tuple, code: bytes) -> _Array:
    return _Array(np.empty(0))


def _scalar(dtype: _Dtype, raw: bytes) -> int | float | bool:
    return dtype.read(raw).item()


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    return _Array(dtype.read(raw).reshape(shape, order=order))


_PICKLE_MAY_CALL = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Admitted(_latin1),
}
for _core in ("numpy.core", "numpy._core"):
    _PICKLE_MAY_CALL[f"{_core}.multiarray", "_reconstruct"] = _Admitted(_empty_array)
    _PICKLE_MAY_CALL[f"{_core}.multiarray", "scalar"] = _Admitted(_scalar)
    _PICKLE_MAY_CALL[f"{_core}.numeric", "_frombuffer"] = _Admitted(_from_buffer)


class _PlainUnpickler(pickle._Unpickler):
    """Admits numbers, strings, plain containers and arrays and scalars of numbers; refuses all else by its name."""

    dispatch: ClassVar = {
        opcode: load
        for opcode, load in pickle._Unpickler.dispatch.items()
        if load.__name__.removeprefix("load_")
        not in ("persid", "binpersid", "ext1", "ext2", "ext4", "inst", "obj", "newobj", "newobj_ex")
    }

    def load_bytearray8(self) -> None:
        # The original makes room for what the length says before it finds that the file is shorter.
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str):
        if (module, name) not in _PICKLE_MAY_CALL:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain numbers and arrays are admitted")
        return _PICKLE_MAY_CALL[module, name]


def _read_pickle(path: Path, content: bytes):
    """The object in a pickle, arrays in it as _Array. Raises InputError where it is torn or not plain."""
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        # A malformed pickle can raise anything, and every case means the same to the user.
        problem = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path}: cannot be read as npz or pickle: {problem}")


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not content:
        raise InputError(f"{path}: is empty")
    return content


def _read_npz(path: Path, content: bytes, names: Sequence[str]) -> list[np.ndarray]:
    """The named arrays, all of numbers, all of the first one's length."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            held = file.files
            arrays = [file[name] for name in names if name in held]
    except Exception as error:
        # NumPy and zipfile raise many kinds for a torn file.
        raise InputError(f"{path}: cannot be read as npz: {' '.join(str(error).split())}") from None
    missing = [name for name in names if name not in held]
    if missing:
        raise InputError(f"{path}: has no array {missing[0]}, expected arrays k, m, P, height")
    rows = len(arrays[0]) if arrays[0].ndim else 0
    for name, array in zip(names, arrays, strict=True):
        shape = (rows, P_WIDTH) if name == "P" else (rows,)
        if array.shape != shape:
            raise InputError(f"{path}: array {name} has shape {array.shape}, expected {shape}")
        if array.dtype.kind not in "iuf":
            raise InputError(f"{path}: array {name} has dtype {array.dtype}, expected numbers")
    return arrays


def _is_zip(content: bytes) -> bool:
    return content.startswith(b"PK")


def _codes_from_course(path: Path, rows) -> Codes:
    """Codes from the course's list of [n, k, m, P], P of shape (k, n - k)."""
    if not isinstance(rows, list | tuple):
        raise InputError(f"{path}: holds {_name(rows)}, expected a list of [n, k, m, P]")
    parts = []
    for i, row in enumerate(rows):
        where = f"{path}: row {i}"
        if not isinstance(row, list | tuple) or len(row) != 4:
            raise InputError(f"{where}: found {_name(row)}, expected [n, k, m, P]")
        for name, value in zip("nkm", row, strict=False):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{where}: found {name} = {_name(value)}, expected an integer")
        n, k, m, P = row
        if n != N:
            raise InputError(f"{where}: found n = {_name(n)}, expected {N}")
        if (k, m) not in GROUPS:
            raise InputError(f"{where}: found (k, m) = ({_name(k)}, {_name(m)}), expected one of the nine groups")
        P = P.array if isinstance(P, _Array) else P
        if not isinstance(P, np.ndarray) or P.dtype.kind not in "iuf" or P.shape != (k, N - k):
            raise InputError(f"{where}: found P = {_name(P)}, expected an array of numbers of shape {(k, N - k)}")
        parts.append((k, m, flatten(P[None].astype(np.float64))[0]))
    k, m, P = zip(*parts, strict=True) if parts else ((), (), ())
    return Codes(np.array(k, dtype=np.int64), np.array(m, dtype=np.int64), np.array(P).reshape(-1, P_WIDTH))


def _name(value) -> str:
    """What a value is, in a few words."""
    value = value.array if isinstance(value, _Array) else value
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) < 10**20):
        return reprlib.repr(value)
    return f"a value of type {type(value).__name__.strip('_').lower()}"


def read_codes(path: Path | str) -> Codes:
    """Codes from an npz file with k, m, P or from a pickle in the course's format, a list of [n, k, m, P].

    Raises InputError, with the row (from 0) where there is one: the file cannot be read or holds something else, n is
    not N, (k, m) is none of GROUPS, P has another shape, is not finite, out of range or not zero where it is padded.
    """
    path = Path(path)
    content = _read_bytes(path)
    if _is_zip(content):
        k, m, P = (array.astype(np.float64) for array in _read_npz(path, content, ("k", "m", "P")))
    else:
        k, m, P = _codes_from_course(path, _read_pickle(path, content))
    if not len(k):
        raise InputError(f"{path}: found no rows, expected codes")

    known = np.any([(k == group[0]) & (m == group[1]) for group in GROUPS], axis=0)
    padding = np.arange(P_WIDTH) >= (k * (N - k))[:, None]
    size = np.abs(P)
    sized = ((size == 0) | (size >= REAL_ENTRY_MIN) & (size <= REAL_ENTRY_MAX)).all(axis=1)
    for good, what in (
        (known, lambda i: f"(k, m) = ({k[i]:g}, {m[i]:g}), expected one of the nine groups"),
        (np.isfinite(P).all(axis=1), lambda i: "NaN or inf in P, expected finite entries"),
        (
            sized,
            lambda i: f"an entry of P out of range, expected 0 or {REAL_ENTRY_MIN:g} to {REAL_ENTRY_MAX:g} in size",
        ),
        ((P == 0).all(axis=1, where=padding), lambda i: f"more than k * (n - k) = {k[i] * (N - k[i]):g} entries in P"),
    ):
        _refuse_first(path, good, what)
    return Codes(k.astype(np.int64), m.astype(np.int64), P)


def read_heights(path: Path | str, finite: bool = True) -> np.ndarray:
    """Heights, float64 (rows,), from npz (array height), csv (column height) or a pickled list as the course has it.

    Raises InputError, with the row (from 0) where there is one: the file cannot be read or holds something else, or a
    height is not a number, below 1, or, where `finite` is asked for, infinite.
    """
    path = Path(path)
    content = _read_bytes(path)
    if _is_zip(content):
        values = _read_npz(path, content, ("height",))[0].tolist()
    elif path.suffix == ".csv":
        values = _height_column(path, content)
    else:
        values = _read_pickle(path, content)
    if isinstance(values, _Array) and values.array.ndim == 1:
        values = values.array.tolist()
    if not isinstance(values, list | tuple):
        raise InputError(f"{path}: holds {_name(values)}, expected a list of heights")

    heights = np.empty(len(values))
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: row {i}: found height {_name(value)}, expected a number")
        try:
            heights[i] = value
        except OverflowError:
            heights[i] = np.inf if value > 0 else -np.inf
    _refuse_first(path, ~np.isnan(heights), lambda i: "height nan, expected a number")
    _refuse_first(path, heights >= 1, lambda i: f"height {_name(values[i])}, expected 1 or more")
    if finite:
        _refuse_first(path, np.isfinite(heights), lambda i: f"height {_name(values[i])}, expected a finite number")
    return heights


def _height_column(path: Path, content: bytes) -> list[float]:
    try:
        table = list(csv.DictReader(content.decode().splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as csv: {error}") from None
    column = []
    for i, row in enumerate(table):
        try:
            column.append(float(row["height"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: row {i}: found height {row.get('height')!r}, expected a number") from None
    return column


def _refuse_first(path: Path, good: np.ndarray, what) -> None:
    """Raise InputError for the first row that is not good; `what` says from its number what was found and expected."""
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(f"{path}: row {row}: found {what(row)}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that `path` is always whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def npz_bytes(save, **arrays: np.ndarray) -> bytes:
    """What np.savez or np.savez_compressed, given as `save`, would write."""
    # On a full disk NumPy's writers leave tracebacks behind; in memory they don't fail.
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def write_heights(path: Path, codes: Codes, heights: np.ndarray) -> None:
    """Heights in the order of the codes, by the suffix of `path`.

    .csv: a table row, n, k, m, height; .npz: the dataset (k, m, P, height); anything else: a pickled list of floats.
    """
    if path.suffix == ".csv":
        lines = ["row,n,k,m,height"]
        for i, (k, m, height) in enumerate(zip(codes.k, codes.m, heights.tolist(), strict=True)):
            lines.append(f"{i},{N},{k},{m},{height!r}")
        content = ("\n".join(lines) + "\n").encode()
    elif path.suffix == ".npz":
        content = npz_bytes(np.savez_compressed, **codes._asdict(), height=heights)
    else:
        content = pickle.dumps(heights.tolist())
    write_whole(path, content)


# --- labels of a file -----------------------------------------------------------------------------------------------


def _label_block(k: int, m: int, flat: np.ndarray) -> np.ndarray:
    return m_heights(unflatten(flat, k), [m])[:, 0]


def label(codes: Codes, progress=None, workers: int | None = None) -> np.ndarray:
    """The exact height of each row, float64 (rows,), inf where it is infinite; on all cores where there is much to do.

    progress(done) is called with the number of rows done. workers: processes to use, by default one for each core.
    """
    blocks = []
    for k, m in GROUPS:
        rows = np.flatnonzero((codes.k == k) & (codes.m == m))
        blocks += [(k, m, rows[i : i + LABEL_BLOCK]) for i in range(0, len(rows), LABEL_BLOCK)]
    heights = np.empty(len(codes.k))
    workers = workers or os.cpu_count() or 1
    done = 0
    with ExitStack() as stack:
        apply = map
        if workers > 1 and len(codes.k) > 2 * LABEL_BLOCK:
            apply = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn"))).map
        ks, ms, rows_of = zip(*blocks, strict=True)
        for rows, block in zip(rows_of, apply(_label_block, ks, ms, [codes.P[rows] for rows in rows_of]), strict=True):
            heights[rows] = block
            done += len(rows)
            if progress:
                progress(done)
    return heights


# --- dataset --------------------------------------------------------------------------------------------------------


def make_dataset(rows_per_group: int = ROWS_PER_GROUP, seed: int = SEED, progress=None) -> dict[str, np.ndarray]:
    """Random codes with exact heights, `rows_per_group` for each (k, m) group, no code twice in the whole dataset.

    Returns k and m, int64 (rows,); P, int64 (rows, P_WIDTH) as `flatten` lays it out; height, float64 (rows,); key, as
    code_keys has it. Codes of infinite height and codes that were drawn before are passed over and others drawn in
    their place. progress(group, rows, drawn) is called now and then.
    """
    rng = np.random.default_rng(seed)
    parts = []
    seen: set[bytes] = set()
    for k, m in GROUPS:
        rows, drawn = 0, 0
        while rows < rows_per_group:
            P = draw_codes(rng, min(max(2 * (rows_per_group - rows), 1_000), 20_000), k, N - k)
            drawn += len(P)
            height = m_heights(P, [m])[:, 0]
            P, height = P[np.isfinite(height)], height[np.isfinite(height)]
            fresh, keys = [], code_keys(P)
            for i, key in enumerate(keys.tolist()):
                if key not in seen and rows < rows_per_group:
                    seen.add(key)
                    fresh.append(i)
                    rows += 1
            group = {"k": np.full(len(fresh), k), "m": np.full(len(fresh), m), "P": flatten(P[fresh])}
            parts.append(group | {"height": height[fresh], "key": keys[fresh]})
            if progress:
                progress((k, m), rows, drawn)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def describe(dataset: dict[str, np.ndarray]) -> str:
    """A Markdown table of the dataset's groups: rows, log2 heights, and what the matrices are like."""
    lines = [
        "| k, m | rows | log2 height: mean | variance | least | largest | entries within 8 | with a zero minor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k, m in GROUPS:
        rows = (dataset["k"] == k) & (dataset["m"] == m)
        log2, P = np.log2(dataset["height"][rows]), unflatten(dataset["P"][rows], k)
        small, zero = (np.abs(P) <= 8).all(axis=(1, 2)).mean(), (minors(P) == 0).any(axis=1).mean()
        figures = (
            f"{log2.mean():.2f} | {log2.var():.2f} | {log2.min():.2f} | {log2.max():.2f} | {small:.0%} | {zero:.0%}"
        )
        lines.append(f"| {k}, {m} | {rows.sum():,} | {figures} |")
    return "\n".join(lines)


# --- main -----------------------------------------------------------------------------------------------------------


def label_file(inputs: Path, output: Path) -> None:
    """Write the exact heights of the codes in a file, in their order."""
    codes = read_codes(inputs)
    start = time.perf_counter()

    def progress(done: int) -> None:
        seconds = time.perf_counter() - start
        print(f"{done:,} of {len(codes.k):,} codes, {seconds:.1f} s", flush=True)

    heights = label(codes, progress)
    write_heights(output, codes, heights)
    print(f"{output}: {len(heights):,} heights, {np.isinf(heights).sum():,} of them infinite")


def make_file(rows_per_group: int, seed: int, output: Path) -> None:
    """Make the dataset and write it."""
    start = time.perf_counter()

    def progress(group: tuple[int, int], rows: int, drawn: int) -> None:
        done = GROUPS.index(group) * rows_per_group + rows
        print(
            f"k={group[0]},m={group[1]}: {rows:,} of {rows_per_group:,} rows from {drawn:,} codes drawn; "
            f"{done / len(GROUPS) / rows_per_group:.0%} of all, {time.perf_counter() - start:.1f} s",
            flush=True,
        )

    dataset = make_dataset(rows_per_group, seed, progress)
    codes = Codes(dataset["k"], dataset["m"], dataset["P"])
    write_heights(output, codes, dataset["height"])
    print(f"\n{describe(dataset)}\n\n{output}: {len(codes.k):,} rows, {output.stat().st_size / 1e6:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description="Make the dataset of random codes, or label the codes of a file exactly.")
    parser.add_argument(
        "--label", type=Path, metavar="INPUTS", help="label this file: npz, or a pickle of [n, k, m, P]"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the dataset (default: augmented.npz beside this file), or with --label the heights: "
        ".csv a table, .npz a dataset, anything else a pickled list",
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS_PER_GROUP, help="rows of each (k, m) group (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the dataset (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows: found {args.rows}, expected 1 or more")
    if args.seed < 0:
        parser.error(f"--seed: found {args.seed}, expected 0 or more")
    if args.label and not args.output:
        parser.error("--label: expected --output HEIGHTS beside it")
    output = args.output or Path(__file__).with_name("augmented.npz")
    if output.is_dir() or not output.parent.is_dir():
        parser.error(f"--output: {output} is not a file name in an existing folder")
    if args.label and output.exists() and output.samefile(args.label):
        parser.error(f"--output: {output} is the file to be labelled, expected another name")
    if not args.label and output.suffix != ".npz":
        parser.error(f"--output: found {output}, expected a name that ends in .npz")

    try:
        if args.label:
            label_file(args.label, output)
        else:
            make_file(args.rows, args.seed, output)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output: {output} cannot be written: {error.strerror or error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
