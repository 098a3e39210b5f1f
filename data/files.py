"""The project's files: course pickles, npz and csv, read with care and written whole; the one error type."""

import io
import json
import os
import pickle
import reprlib
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from data.heights import GROUPS, LONGEST, P_WIDTH, REAL_ENTRY_MAX, REAL_ENTRY_MIN, Codes, N
from data.pickles import CONVERT, Array, PlainUnpickler

# How every npz file begins.
ZIP = b"PK"

# --- errors ---------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one line that says what, where and what was expected."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- pickles --------------------------------------------------------------------------------------------------------


def _read_pickle(path: Path, content: bytes):
    """The object in a pickle, arrays in it as pickles.Array. Raises InputError where it is torn or not plain."""
    if content.startswith(b"\x93NUMPY"):
        raise InputError(f"{path}: is a .npy file, expected npz or pickle; {CONVERT}")
    try:
        return PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        # A malformed pickle can raise anything, and every case means the same to the user.
        problem = one_line(error)
    raise InputError(f"{path}: cannot be read as npz or pickle: {problem}")


# --- reading --------------------------------------------------------------------------------------------------------


def _read_bytes(path: Path | str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not content:
        raise InputError(f"{path}: is empty")
    return content


def _read_npz(path: Path, content: bytes, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays, and n if the file has it, all of numbers, all of the first one's length."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*names, "n") if name in file.files}
    except Exception as error:
        # NumPy and zipfile raise many kinds for a torn file.
        raise InputError(f"{path}: cannot be read as npz: {one_line(error)}") from None
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f"{path}: has no array {missing[0]}, expected arrays {', '.join(names)}")
    rows = arrays[names[0]].size
    for name, array in arrays.items():
        width = array.shape[1] if "n" in arrays and array.ndim == 2 else P_WIDTH
        shape = (rows, width) if name == "P" else (rows,)
        if array.shape != shape:
            raise InputError(f"{path}: array {name} has shape {array.shape}, expected {shape}")
        if array.dtype.kind not in "iuf":
            raise InputError(f"{path}: array {name} has dtype {array.dtype}, expected numbers")
    return arrays


def _check_numbers(where: str, n, k, m, trained: bool) -> None:
    """Raise InputError unless these are integers that a code can have; trained: that are among the trained groups."""
    for name, value in zip("nkm", (n, k, m), strict=True):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InputError(f"{where}: found {name} = {_name(value)}, expected an integer")
    if trained and n != N:
        hint = f"expected {N}, the only length that is trained (data/prepare.py --label takes n up to {LONGEST})"
        raise InputError(f"{where}: found n = {_name(n)}, {hint}")
    if trained and (k, m) not in GROUPS:
        raise InputError(f"{where}: found (k, m) = ({_name(k)}, {_name(m)}), expected one of the nine groups")
    if not (n <= LONGEST and 1 <= k < n and 1 <= m <= n - k):
        numbers = ", ".join(map(_name, (n, k, m)))
        expected = f"expected n up to {LONGEST}, k from 1 to n - 1 and m from 1 to n - k"
        raise InputError(f"{where}: found (n, k, m) = ({numbers}), {expected}")


def codes_from_rows(source: Path | str, rows: Sequence, trained: bool = True) -> Codes:
    """Codes from the course's list of [n, k, m, P]; P an array or nested lists of shape (k, n - k), or flat.

    trained: whether n and (k, m) have to be those that networks are trained on. Raises InputError, with `source` and
    the row (from 0), for anything else, and for entries that are not finite or out of range.
    """
    flat, numbers = [], np.zeros((len(rows), 3), dtype=np.int64)
    for i, row in enumerate(rows):
        where = f"{source}: row {i}"
        if not isinstance(row, list | tuple) or len(row) != 4:
            raise InputError(f"{where}: found {_name(row)}, expected [n, k, m, P]")
        n, k, m, P = row
        _check_numbers(where, n, k, m, trained)
        numbers[i] = n, k, m
        matrix = _array(P)
        if matrix is None or matrix.shape not in ((k, n - k), (k * (n - k),)):
            raise InputError(f"{where}: found P = {_name(P)}, expected an array of numbers of shape {(k, n - k)}")
        flat.append(matrix.ravel())
    P = np.zeros((len(rows), max([P_WIDTH, *map(len, flat)])))
    for padded, entries in zip(P, flat, strict=True):
        padded[: len(entries)] = entries
    return _checked(source, Codes(*numbers.T, P))


def _checked(source: Path | str, codes: Codes) -> Codes:
    """The codes, P as wide as Codes has it, if its entries are finite, in range and zero where they are padded. Else
    raises InputError."""
    if not len(codes.P):
        raise InputError(f"{source}: found no rows, expected codes")
    size, entries = np.abs(codes.P), codes.k * (codes.n - codes.k)
    _refuse_first(source, np.isfinite(size).all(axis=1), lambda i: "NaN or inf in P, expected finite entries")
    sized = ((size == 0) | (size >= REAL_ENTRY_MIN) & (size <= REAL_ENTRY_MAX)).all(axis=1)
    limits = f"expected 0 or {REAL_ENTRY_MIN:g} to {REAL_ENTRY_MAX:g} in size"
    _refuse_first(source, sized, lambda i: f"an entry of P out of range, {limits}")
    padded = (size == 0).all(axis=1, where=np.arange(size.shape[1]) >= entries[:, None])
    _refuse_first(source, padded, lambda i: f"more than k * (n - k) = {entries[i]} entries in P")
    P = codes.P[:, : max(P_WIDTH, entries.max())]
    return codes._replace(P=np.pad(P, ((0, 0), (0, max(0, P_WIDTH - P.shape[1])))))


def _array(value, depth: int = 2) -> np.ndarray | None:
    """An array of numbers, or lists of them nested to this depth, as an array; None for anything else."""
    value = value.array if isinstance(value, Array) else value
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return array if array.dtype.kind in "iuf" else None
    if not isinstance(value, list | tuple) or depth == 0:
        return None
    rows = [row if isinstance(row, int | float | str) else _array(row, depth - 1) for row in value]
    if any(row is None or isinstance(row, bool | str) for row in rows):
        return None
    try:
        array = np.array(rows)
    except ValueError:  # Rows of different lengths.
        return None
    return array if array.dtype.kind in "iuf" else None


def _name(value) -> str:
    """What a value is, in a few words."""
    value = value.array if isinstance(value, Array) else value
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) < 10**20):
        return reprlib.repr(value)
    return f"a value of type {type(value).__name__.strip('_').lower()}"


def read_codes(path: Path | str, trained: bool = True) -> Codes:
    """Codes from an npz file with k, m, P, and n where it is not N, or from a pickled list of [n, k, m, P].

    trained: whether n and (k, m) have to be those that networks are trained on. Raises InputError, with the row (from
    0) where there is one: the file cannot be read or holds something else, n, k or m is not as asked, P has another
    shape, is not finite, out of range or not zero where it is padded.
    """
    path, content = Path(path), _read_bytes(path)
    if not content.startswith(ZIP):
        rows = _read_pickle(path, content)
        if not isinstance(rows, list | tuple):
            raise InputError(f"{path}: holds {_name(rows)}, expected a list of [n, k, m, P]")
        return codes_from_rows(path, rows, trained)
    arrays = {"n": None} | _read_npz(path, content, ("k", "m", "P"))
    k, m, P = (arrays[name] for name in ("k", "m", "P"))
    n = np.full(len(k), N) if arrays["n"] is None else arrays["n"]
    for i, row in enumerate(zip(n.tolist(), k.tolist(), m.tolist(), strict=True)):
        whole = [int(x) if isinstance(x, float) and x.is_integer() else x for x in row]
        _check_numbers(f"{path}: row {i}", *whole, trained)
    n, k, m = (x.astype(np.int64) for x in (n, k, m))
    enough = k * (n - k) <= P.shape[1]
    _refuse_first(path, enough, lambda i: f"{P.shape[1]} entries in P, expected k * (n - k) = {k[i] * (n[i] - k[i])}")
    return _checked(path, Codes(n, k, m, P.astype(np.float64)))


def read_heights(path: Path | str) -> np.ndarray:
    """Heights, float64 (rows,), from npz (array height), csv (column height) or a pickled list as the course has it.

    A height may be infinite. Raises InputError, with the row (from 0) where there is one: the file cannot be read or
    holds something else, or a height is not a number or below 1.
    """
    path, content = Path(path), _read_bytes(path)
    if content.startswith(ZIP):
        values = _read_npz(path, content, ("height",))["height"].tolist()
    elif path.suffix == ".csv":
        values = _height_column(path, content)
    else:
        values = _read_pickle(path, content)
    if isinstance(values, Array) and values.array.ndim == 1:
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
    return heights


def _height_column(path: Path, content: bytes) -> list[float]:
    """The column height of a csv; NaN where an entry is no number."""
    try:
        column = pd.read_csv(io.BytesIO(content), usecols=["height"])["height"]
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as csv with a column height: {one_line(error)}") from None
    return pd.to_numeric(column, errors="coerce").tolist()


def _refuse_first(path: Path, good: np.ndarray, what) -> None:
    """Raise InputError for the first row that is not good; `what` says from its number what was found and expected."""
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(f"{path}: row {row}: found {what(row)}")


def read_checkpoint(path: Path, run: dict, arrays: int = 0) -> tuple[dict, list[np.ndarray]]:
    """What write_checkpoint was given, so many of the arrays. Raises InputError if the file is torn, or if kept["run"]
    differs from `run`, which is what two runs must have in common to compute the same, as JSON has it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            kept, values = json.loads(str(file["kept"])), [file[f"v{i}"] for i in range(arrays)]
            pairs = {name: (kept["run"].get(name), now) for name, now in run.items()}
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); --fresh starts the run anew") from None
    if differs := [f"{name} ({there} there, {now} now)" for name, (there, now) in pairs.items() if there != now]:
        problem = f"holds an unfinished run with other settings: {', '.join(differs)}"
        raise InputError(f"{path.parent}: {problem}; give its settings to go on with it, or --fresh to start anew")
    return kept, values


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path, room: int = 0) -> Iterator[Path]:
    """A new name beside `path` to write to. The file is renamed to `path` at the end and removed after an error, so
    that `path` is whole at any time, also where several processes write to it. room: bytes there must be space for."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        if room:  # HDF5 crashes when the disk fills up under it, so an ordinary file tries first.
            temporary.write_bytes(bytes(room))
            temporary.unlink()
        yield temporary
        if temporary.exists():
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or one_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it is whole at any time."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def staged(parent: Path, output: Path) -> Iterator[Path]:
    """A temporary folder inside `parent`, whose files are moved to `output` one by one at the end."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=parent) as folder:
        yield Path(folder)
        for file in Path(folder).iterdir():
            os.replace(file, output / file.name)


def write_npz(path: Path, save: Callable = np.savez, **arrays: np.ndarray) -> None:
    """np.savez or np.savez_compressed, given as `save`, so that the file is whole at any time."""
    buffer = io.BytesIO()  # On a full disk NumPy's writers leave tracebacks behind; in memory they do not fail.
    save(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def write_checkpoint(path: Path, kept: dict, arrays: Sequence[np.ndarray]) -> None:
    """What JSON can hold, and arrays, in one npz."""
    write_npz(path, kept=np.array(json.dumps(kept)), **{f"v{i}": array for i, array in enumerate(arrays)})


def write_heights(path: Path, codes: Codes, heights: np.ndarray) -> None:
    """Heights in the order of the codes, by the suffix of `path`.

    .csv: a table row, n, k, m, height; .npz: a dataset (k, m, P, height, and n unless all are N); anything else: a
    pickled list of floats.
    """
    if path.suffix == ".npz":
        n = {} if (codes.n == N).all() else {"n": codes.n}
        write_npz(path, np.savez_compressed, **n, k=codes.k, m=codes.m, P=codes.P, height=heights)
    elif path.suffix == ".csv":
        table = pd.DataFrame({"n": codes.n, "k": codes.k, "m": codes.m, "height": heights})
        write_whole(path, table.to_csv(index_label="row", lineterminator="\n"))
    else:
        write_whole(path, pickle.dumps(heights.tolist()))
