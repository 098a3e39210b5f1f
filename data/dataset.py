"""Codes with their heights, and the files that hold them: course pickles and npz.

Nothing in a file is executed, every row is checked, and what cannot be used is refused in one line
that names the file and the row (from 0).
"""

import gzip
import hashlib
import io
import os
import pickle
import pickletools
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.heights import GROUPS, REAL_ENTRY_MAX, REAL_ENTRY_MIN, N, code_keys, m_heights

P_WIDTH = 20  # Entries of the largest P of the trained groups.
LONGEST = 12  # Codes in files can be labelled up to this length.
LABEL_TOLERANCE = 1e-4  # In log2: files may have been labelled by a numerical solver.
COLUMNS = ("k", "m", "P", "height", "key", "low")  # The arrays that every dataset has.
CONVERT = "columns, saved by np.savez(file, k=k, m=m, P=P, height=height): see data/README.md"
# What a file is that cannot be read as npz or pickle, by its first bytes.
OTHER_FORMATS = {
    b"SQLite format 3": "an SQLite database",
    b"\x93NUMPY": "a single array of NumPy",
    b"\x89HDF": "an HDF5 file",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"{": "a text, perhaps JSON",
    b"[": "a text, perhaps JSON",
}
TEMPORARY = ".m-height-"  # Names of what is being written begin so.
ROW_OF_P = "k * (n - k) entries, then zeros; from a larger array take P[:k, :n - k].ravel()"
ROW = (
    "[n, k, m, P], P of k by n - k numbers: of G = [I | P] take G[:, k:], of another G see "
    "data/README.md, of P padded with zeros take P[:k, :n - k]; a list of one matrix is [P]"
)


class InputError(ValueError):
    """What the user gave cannot be used. One line: what is wrong, where, what was expected."""


# --- codes ----------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """Codes, row by row. n, k, m: int64 (rows,). P: float64 (rows, width), the entries of each P
    row by row, padded with zeros. The width is P_WIDTH unless a P has more entries."""

    n: np.ndarray
    k: np.ndarray
    m: np.ndarray
    P: np.ndarray

    def take(self, rows: np.ndarray) -> "Codes":
        """The codes of these rows alone. rows: positions, or bool (rows,)."""
        return Codes(*(column[rows] for column in self))

    def are_trained(self) -> np.ndarray:
        """Whether n and (k, m) are those of the trained groups, bool (rows,)."""
        return (self.n == N) & (group_numbers(self.k, self.m) >= 0)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled codes of length N, row by row.

    k, m: int64 (rows,); P: (rows, P_WIDTH), as in Codes; height: float64 (rows,); key: (rows,), of
    code_keys; low: bool (rows,), made to have a small height, False for
    all rows of a file; features: input of the network in place of P, float32 (rows, width), or
    None; about: file, sha256, rows, duplicates, rows of infinite height left out, origin of the
    labels.
    """

    k: np.ndarray
    m: np.ndarray
    P: np.ndarray
    height: np.ndarray
    key: np.ndarray
    low: np.ndarray
    features: np.ndarray | None = None
    about: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.height)

    @cached_property
    def group(self) -> np.ndarray:
        """Each row's (k, m) group as its position in GROUPS, int64 (rows,)."""
        return group_numbers(self.k, self.m)

    @cached_property
    def log2_height(self) -> np.ndarray:
        """float64 (rows,)"""
        return np.log2(self.height)

    def take(self, rows: np.ndarray) -> "Dataset":
        """The dataset of these rows alone, without features. rows: positions, or bool (rows,)."""
        return replace(self, features=None, **{x: getattr(self, x)[rows] for x in COLUMNS})

    def extended(self, *others: "Dataset") -> "Dataset":
        """The dataset with the rows of others after its own, without features."""
        parts = (self, *others)
        columns = {x: np.concatenate([getattr(part, x) for part in parts]) for x in COLUMNS}
        return replace(self, features=None, **columns)


def group_numbers(k: np.ndarray, m: np.ndarray) -> np.ndarray:
    """The position of each (k, m) in GROUPS, int64 (rows,), -1 where it is none of them."""
    return pd.MultiIndex.from_tuples(GROUPS).get_indexer(pd.MultiIndex.from_arrays([k, m]))


def flatten(P: np.ndarray) -> np.ndarray:
    """P of shape (batch, k, n - k) as rows of P_WIDTH numbers: row by row, padded with zeros."""
    flat = P.reshape(len(P), -1)
    return np.pad(flat, ((0, 0), (0, P_WIDTH - flat.shape[1])))


def unflatten(flat: np.ndarray, k: int, n: int = N) -> np.ndarray:
    """The matrices P, shape (batch, k, n - k), from rows of numbers padded with zeros."""
    return flat[:, : k * (n - k)].reshape(len(flat), k, n - k)


def exact_heights(codes: Codes) -> np.ndarray:
    """The exact height of each row, float64 (rows,), inf where it is infinite."""
    heights = np.empty(len(codes.k))
    table = pd.DataFrame({"n": codes.n, "k": codes.k, "m": codes.m})
    for (n, k, m), rows in table.groupby(["n", "k", "m"]).indices.items():
        heights[rows] = m_heights(unflatten(codes.P[rows], k, n), [m])[:, 0]
    return heights


# --- pickles --------------------------------------------------------------------------------------


class _Dtype:
    """Stands in for numpy.dtype, which a damaged pickle can crash: numbers of at most 8 bytes."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def read(self, raw: bytes) -> np.ndarray:
        if not re.fullmatch("[biuf][1248]", self.code):
            raise pickle.UnpicklingError(f"an array of dtype {self.code!r}, expected numbers")
        return np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.order))


class _Array:
    """Stands in for numpy.ndarray. np.asarray makes it one."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.values = dtype.read(raw).reshape(shape, order="F" if fortran else "C")

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.values if dtype is None else self.values.astype(dtype)

    def __repr__(self) -> str:
        return f"<array of shape {np.shape(self.values)}>"


class PlainUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers, strings and NumPy's arrays. All other names are refused."""

    def find_class(self, module: str, name: str):
        # Functions of its own for each file, since a pickle can set attributes of what it gets.
        admitted = {
            "numpy.ndarray": None,  # It is only handed to _reconstruct.
            "numpy.dtype": lambda code, *_: _Dtype(code),
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),
            "numpy._core.multiarray._reconstruct": lambda *_: _Array(np.empty(0)),
            "numpy._core.multiarray.scalar": lambda dtype, raw: dtype.read(raw).item(),
            "numpy._core.numeric._frombuffer": lambda raw, dtype, shape, order: _Array(
                dtype.read(raw).reshape(shape, order=order)
            ),
        }
        full_name = f"{module.replace('numpy.core', 'numpy._core')}.{name}"
        if full_name not in admitted:
            raise pickle.UnpicklingError(f"it names {full_name}, expected numbers and arrays")
        return admitted[full_name]


def _read_pickle(path: Path, content: bytes):
    """The object in a pickle, which may be gzipped, arrays in it as _Array; or one list of all the
    lists that were appended to the file. Raises InputError where it is not plain."""
    found = next((x for start, x in OTHER_FORMATS.items() if content.startswith(start)), "")
    objects, end = [], 0
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        while end < len(content):
            piece = io.BytesIO(content[end:])
            for opcode, argument, _ in pickletools.genops(piece):
                # The unpickler makes room for as many objects as the number of the last one says.
                if "PUT" in opcode.name and argument > len(content):
                    raise pickle.UnpicklingError("it is damaged")
            end += piece.tell()
            piece.seek(0)
            objects.append(PlainUnpickler(piece).load())
        if len(objects) == 1:
            return objects[0]
        if objects and all(isinstance(x, list) for x in objects):
            return [row for rows in objects for row in rows]
        raise pickle.UnpicklingError(f"it holds {len(objects)} objects, not all of them lists")
    except Exception as error:  # A damaged pickle can raise anything.
        problem = f"cannot be read as npz or pickle: {found or one_line(error)}; take {CONVERT}"
        raise InputError(f"{path}: {problem}") from None


# --- reading --------------------------------------------------------------------------------------


def one_line(value) -> str:
    """The text of an error, or what a value looks like, in one short line."""
    try:
        text = str(value) if isinstance(value, Exception) else reprlib.repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits.
        text = ""
    return " ".join(text.split()) or type(value).__name__


def _require(source, good: np.ndarray, found: Callable[[int], object], expected: str) -> None:
    """Raise InputError for the first row that is not good. found: says what a row has."""
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(f"{source}: row {row}: found {found(row)}, expected {expected}")


def _checked(source: Path | str, n, k, m, P: np.ndarray, trained: bool) -> Codes:
    """The codes in these columns, if all of them can be used. Else raises InputError."""
    if not len(k):
        raise InputError(f"{source}: found no rows, expected codes")
    n, k, m, P = (np.asarray(x, dtype=np.float64) for x in (n, k, m, P))
    if trained:
        good = Codes(n, k, m, P).are_trained()
        expected = f"n = {N} and (k, m) one of {', '.join(map(str, GROUPS))}"
    else:
        good = (n <= LONGEST) & (k >= 1) & (k < n) & (m >= 1) & (m <= n - k)
        good &= np.all([x == np.rint(x) for x in (n, k, m)], axis=0)
        expected = f"integers, n up to {LONGEST}, k from 1 to n - 1 and m from 1 to n - k"
    _require(source, good, lambda i: f"(n, k, m) = ({n[i]:g}, {k[i]:g}, {m[i]:g})", expected)
    n, k, m = (x.astype(np.int64) for x in (n, k, m))
    size, entries = np.abs(P), k * (n - k)
    after = np.arange(P.shape[1]) >= entries[:, None]
    good = (entries <= P.shape[1]) & (size == 0).all(axis=1, where=after)
    _require(source, good, lambda i: "P of another size", ROW_OF_P)
    good = ((size == 0) | (size >= REAL_ENTRY_MIN) & (size <= REAL_ENTRY_MAX)).all(axis=1)
    expected = f"finite ones, 0 or {REAL_ENTRY_MIN:g} to {REAL_ENTRY_MAX:g} in size"
    _require(source, good, lambda i: f"entries {one_line(P[i])}", expected)
    P = P[:, : max(P_WIDTH, entries.max())]
    return Codes(n, k, m, np.pad(P, ((0, 0), (0, max(0, P_WIDTH - P.shape[1])))))


def _rows_of_dictionary(source: Path | str, dictionary: dict) -> list:
    """Rows [n, k, m, item] from keys (n, k, m) or "[n, k, m]", in the order of the file.

    A value is one item, P or a height, or a list of them. Raises InputError for anything else.
    """
    rows = []
    for key, value in dictionary.items():
        try:
            n, k, m = map(int, re.findall(r"\d+", key) if isinstance(key, str) else key)
            np.array([n, k, m], dtype=np.int64)  # Raises OverflowError for what is no size.
            value = np.asarray(value) if isinstance(value, _Array) else value
            items = [value] if np.shape(value) in ((), (k, n - k)) else value
        except (TypeError, ValueError, OverflowError):
            expected = "keys (n, k, m), each with one P or height or a list (data/README.md)"
            found = f"found the key {one_line(key)} with {one_line(value)}"
            raise InputError(f"{source}: {found}, expected {expected}") from None
        rows += [[n, k, m, item] for item in items]
    return rows


def codes_from_rows(source: Path | str, rows: Sequence, trained: bool = True) -> Codes:
    """Codes from the course's list of [n, k, m, P]; P an array or nested lists of shape (k, n - k),
    or flat, of whatever float() takes.

    trained: whether n and (k, m) have to be those of the trained groups. Raises InputError, with
    `source` and the row, for anything else, and for entries that are not finite or out of range.
    """
    sizes, matrices = np.zeros((len(rows), 3)), []
    for i, row in enumerate(rows):
        try:
            n, k, m, P = row
            sizes[i] = n, k, m
            if np.iscomplexobj(P):
                raise TypeError
            P = np.asarray(P, dtype=np.float64)
            if P.shape not in ((k, n - k), (k * (n - k),)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            expected = CONVERT if isinstance(row, dict) else ROW
            found = f"row {i}: found {one_line(row)}"
            raise InputError(f"{source}: {found}, expected {expected}") from None
        matrices.append(P.ravel())
    P = np.zeros((len(rows), max([P_WIDTH, *map(len, matrices)])))
    for padded, matrix in zip(P, matrices, strict=True):
        padded[: len(matrix)] = matrix
    return _checked(source, *sizes.T, P, trained)


def _read_npz(path: Path, content: bytes, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of numbers, and n if the file has it, all of the first one's length."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*names, "n") if name in file.files}
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged file.
        raise InputError(f"{path}: cannot be read as npz: {one_line(error)}") from None
    if missing := set(names) - set(arrays):
        raise InputError(f"{path}: has no array {min(missing)}, expected {', '.join(names)}")
    for name, array in arrays.items():
        if name != "P" and array.shape[1:] == (1,):
            array = arrays[name] = array[:, 0]
        shape = (arrays[names[0]].size, *(array.shape[-1:] if name == "P" else ()))
        if array.shape != shape or array.dtype.kind not in "iuf":
            found = f"array {name} of {array.dtype} and shape {array.shape}"
            row = f", a row with {ROW_OF_P}" if name == "P" else ""
            raise InputError(f"{path}: {found}, expected numbers of shape {shape}{row}")
    return arrays


def read_codes(path: Path | str, trained: bool = True) -> Codes:
    """Codes from an npz file with k, m, P, and n where it is not N; from a pickled list of
    [n, k, m, P] or dictionary with keys (n, k, m). Arguments and errors are those of
    codes_from_rows; OSError for a missing file."""
    content = Path(path).read_bytes()
    if content.startswith(b"PK"):
        arrays = _read_npz(path, content, ("k", "m", "P"))
        n = arrays.get("n", np.full(len(arrays["k"]), N))
        return _checked(path, n, arrays["k"], arrays["m"], arrays["P"], trained)
    rows = _read_pickle(path, content)
    if isinstance(rows, dict):
        rows = _rows_of_dictionary(path, rows)
    if not isinstance(rows, list | tuple):
        raise InputError(f"{path}: holds {one_line(rows)}, expected a list of [n, k, m, P]")
    return codes_from_rows(path, rows, trained)


def read_heights(path: Path | str, codes: Codes | None = None) -> np.ndarray:
    """Heights, float64 (rows,), from npz (array height), a pickled list, or a pickled dictionary
    with keys (n, k, m). NaN for what is no number.

    codes: where they are given, there must be a height for each, and those of a dictionary are
    brought to their order. Raises InputError for a file that holds something else; OSError for a
    missing file.
    """
    content, keys = Path(path).read_bytes(), None
    if content.startswith(b"PK"):
        values = _read_npz(path, content, ("height",))["height"]
    else:
        values = _read_pickle(path, content)
        values = np.asarray(values) if isinstance(values, _Array) else values
    try:
        if isinstance(values, dict):
            rows = _rows_of_dictionary(path, values)
            keys, values = [row[:3] for row in rows], [row[3] for row in rows]
        elif not isinstance(values, list | tuple | np.ndarray):
            raise TypeError(f"it holds {one_line(values)}")
        if np.shape(values)[1:] == (1,):
            values = np.ravel(values)
        values = pd.Series(values, dtype=object)
        heights = np.array(pd.to_numeric(values, errors="coerce"), dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected a list of heights: {one_line(error)}") from None
    if codes is None:
        return heights
    if len(heights) != len(codes.k):
        raise InputError(f"{path}: found {len(heights)} heights, expected {len(codes.k)}")
    if keys:
        of_codes = np.stack(codes[:3], axis=1)
        order, order_of_codes = np.lexsort(np.transpose(keys)), np.lexsort(codes[:3])
        if not np.array_equal(np.array(keys)[order], of_codes[order_of_codes]):
            raise InputError(f"{path}: found other keys or counts of them, expected the codes'")
        heights[order_of_codes] = heights[order]
    return heights


def are_equal(heights: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Whether heights are the exact ones, bool (rows,), to a small tolerance where finite."""
    with np.errstate(all="ignore"):  # A height may be NaN or below 0.
        near = np.abs(np.log2(exact) - np.log2(heights)) <= LABEL_TOLERANCE
    return near | (exact == heights)


def load_dataset(*paths: Path | str) -> Dataset:
    """Read a dataset: one npz file, or a file of codes and one of heights.

    Heights are computed exactly; how many in the file are others is counted. Rows of infinite
    height are left out and counted. Raises InputError as read_codes and read_heights do, and when
    all heights are infinite; OSError for a missing file.
    """
    if len(paths) not in (1, 2):
        raise InputError(f"found {len(paths)} paths to a dataset, expected 1 or 2")
    codes = read_codes(paths[0])
    given, height = read_heights(paths[-1], codes), exact_heights(codes)
    others = np.sum(~are_equal(given, height))
    finite = np.isfinite(height)
    if not finite.any():
        raise InputError(f"{paths[0]}: found infinite heights alone, expected finite ones")
    k, m, P, height = (column[finite] for column in (*codes[1:], height))
    key = np.empty(len(height), dtype="S32")
    for dimension in np.unique(k):
        key[k == dimension] = code_keys(unflatten(P[k == dimension], dimension))
    files = [*map(Path, dict.fromkeys(paths))]
    sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    about = {
        "file": " + ".join(file.name for file in files),
        "sha256": sha256,
        "rows": len(height),
        "duplicates": int(pd.DataFrame({"key": key, "m": m}).duplicated().sum()),
        "infinite": int((~finite).sum()),
        "labels": f"exact; {others:,} of {len(finite):,} in the file differ",
    }
    return Dataset(k, m, P, height, key, np.zeros(len(height), dtype=bool), about=about)


# --- writing --------------------------------------------------------------------------------------


def start_as_command() -> None:
    """For a process that is a command: SIGTERM, as by a batch system's time limit, interrupts it as
    Ctrl-C does, and file names of any bytes can be printed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; the file then replaces `path`.

    So a kill or a power cut leaves the old file or the new one, and never a part of it.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_heights(path: Path, codes: Codes, heights: np.ndarray) -> None:
    """Heights in the order of the codes, by the suffix of `path`.

    .csv: a table row, n, k, m, height; .npz: a dataset (k, m, P, height, and n unless all are N);
    anything else: a pickled list of floats.
    """
    content = io.BytesIO()  # On a full disk NumPy's writers leave tracebacks behind.
    if path.suffix == ".npz":
        n = {} if (codes.n == N).all() else {"n": codes.n}
        np.savez_compressed(content, **n, k=codes.k, m=codes.m, P=codes.P, height=heights)
    elif path.suffix == ".csv":
        table = pd.DataFrame({"n": codes.n, "k": codes.k, "m": codes.m, "height": heights})
        table.to_csv(content, index_label="row", lineterminator="\n")
    else:
        pickle.dump(heights.tolist(), content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
