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
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from data.heights import GROUPS, P_WIDTH, REAL_ENTRY_MAX, REAL_ENTRY_MIN, Codes, N, flatten
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


def _read_npz(path: Path, content: bytes, names: Sequence[str]) -> list[np.ndarray]:
    """The named arrays, all of numbers, all of the first one's length."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            held = file.files
            arrays = [file[name] for name in names if name in held]
    except Exception as error:
        # NumPy and zipfile raise many kinds for a torn file.
        raise InputError(f"{path}: cannot be read as npz: {one_line(error)}") from None
    if missing := [name for name in names if name not in held]:
        raise InputError(f"{path}: has no array {missing[0]}, expected arrays {', '.join(names)}")
    rows = arrays[0].size
    for name, array in zip(names, arrays, strict=True):
        shape = (rows, P_WIDTH) if name == "P" else (rows,)
        if array.shape != shape:
            raise InputError(f"{path}: array {name} has shape {array.shape}, expected {shape}")
        if array.dtype.kind not in "iuf":
            raise InputError(f"{path}: array {name} has dtype {array.dtype}, expected numbers")
    return arrays


def _codes_from_course(path: Path, rows) -> Codes:
    """Codes from the course's list of [n, k, m, P]; P an array or nested lists of shape (k, n - k), or flat."""
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
        matrix = _array(P)
        if matrix is None or matrix.shape not in ((k, N - k), (k * (N - k),)):
            raise InputError(f"{where}: found P = {_name(P)}, expected an array of numbers of shape {(k, N - k)}")
        parts.append((k, m, flatten(matrix.reshape(1, -1).astype(np.float64))[0]))
    k, m, P = zip(*parts, strict=True) if parts else ((), (), ())
    return Codes(np.array(k, dtype=np.int64), np.array(m, dtype=np.int64), np.array(P).reshape(-1, P_WIDTH))


def _array(value, depth: int = 2) -> np.ndarray | None:
    """An array of numbers, or lists of them nested to this depth, as an array; None for anything else."""
    if isinstance(value, Array):
        return value.array
    if not isinstance(value, list | tuple) or depth == 0:
        return None
    rows = [_array(row, depth - 1) if isinstance(row, list | tuple | Array) else row for row in value]
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


def read_codes(path: Path | str) -> Codes:
    """Codes from an npz file with k, m, P or from a pickle in the course's format, a list of [n, k, m, P].

    Raises InputError, with the row (from 0) where there is one: the file cannot be read or holds something else, n is
    not N, (k, m) is none of GROUPS, P has another shape, is not finite, out of range or not zero where it is padded.
    """
    path, content = Path(path), _read_bytes(path)
    if content.startswith(ZIP):
        k, m, P = (array.astype(np.float64) for array in _read_npz(path, content, ("k", "m", "P")))
    else:
        k, m, P = _codes_from_course(path, _read_pickle(path, content))
    if not len(k):
        raise InputError(f"{path}: found no rows, expected codes")

    size = np.abs(P)
    known = np.any([(k == group[0]) & (m == group[1]) for group in GROUPS], axis=0)
    _refuse_first(path, known, lambda i: f"(k, m) = ({k[i]:g}, {m[i]:g}), expected one of the nine groups")
    _refuse_first(path, np.isfinite(P).all(axis=1), lambda i: "NaN or inf in P, expected finite entries")
    sized = ((size == 0) | (size >= REAL_ENTRY_MIN) & (size <= REAL_ENTRY_MAX)).all(axis=1)
    limits = f"expected 0 or {REAL_ENTRY_MIN:g} to {REAL_ENTRY_MAX:g} in size"
    _refuse_first(path, sized, lambda i: f"an entry of P out of range, {limits}")
    padded = (P == 0).all(axis=1, where=np.arange(P_WIDTH) >= (k * (N - k))[:, None])
    _refuse_first(path, padded, lambda i: f"more than k * (n - k) = {k[i] * (N - k[i]):g} entries in P")
    return Codes(k.astype(np.int64), m.astype(np.int64), P)


def read_heights(path: Path | str) -> np.ndarray:
    """Heights, float64 (rows,), from npz (array height), csv (column height) or a pickled list as the course has it.

    A height may be infinite. Raises InputError, with the row (from 0) where there is one: the file cannot be read or
    holds something else, or a height is not a number or below 1.
    """
    path, content = Path(path), _read_bytes(path)
    if content.startswith(ZIP):
        values = _read_npz(path, content, ("height",))[0].tolist()
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

    .csv: a table row, n, k, m, height; .npz: the dataset (k, m, P, height); anything else: a pickled list of floats.
    """
    if path.suffix == ".npz":
        write_npz(path, np.savez_compressed, **codes._asdict(), height=heights)
    elif path.suffix == ".csv":
        table = pd.DataFrame({"n": N, "k": codes.k, "m": codes.m, "height": heights})
        write_whole(path, table.to_csv(index_label="row", lineterminator="\n"))
    else:
        write_whole(path, pickle.dumps(heights.tolist()))
