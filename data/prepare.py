"""The dataset data/augmented.npz, codes with exact m-heights; also labels the codes of a file.

    python data/prepare.py                                    makes the dataset
    python data/prepare.py --label INPUTS --output HEIGHTS    labels the codes of a file

Reading a dataset and the command line of the three scripts are here, too.
"""

import argparse
import hashlib
import inspect
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import wraps
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.files import InputError, one_line, read_codes, read_heights, write_heights
from data.heights import GROUPS, Codes, Dataset, N, code_keys, flatten, m_heights, minors, unflatten
from data.matrices import low_matrices, random_matrices

ROWS_PER_GROUP = 12_000
SEED = 5

# The share of each group that low_matrices makes; random_matrices makes the rest.
LOW_SHARE = 0.1

BASELINES = Path(__file__).with_name("baselines.csv")

# Heights that agree to this much in log2 are the same: files may have been labelled by a numerical solver.
LABEL_TOLERANCE = 1e-4

# Rows that one process labels in one go when a file is labelled.
LABEL_BLOCK = 20_000


# --- command lines --------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def status_of_main(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a script's main. What it cannot use or write ends it with one line on stderr and exit status 2, Ctrl-C
    with 130, as shells have it."""
    script = Path(inspect.getfile(main)).name

    @wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        status = 2
        try:
            return main(argv)
        except InputError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except MemoryError as error:
            problem = f"too little memory ({error})"
        except KeyboardInterrupt:
            status, problem = 130, "interrupted; an unfinished training run is resumed by the same command"
        print(f"{script}: {' '.join(problem.split())}", file=sys.stderr)
        return status

    return guarded


def processor() -> list[str]:
    """Its name and what it has for matrix products, as Linux tells them; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    name, has = re.findall(r"^model name\s*: (.+)", text, re.M), r"\b(?:avx2|avx512f|avx512_bf16|amx_bf16)\b"
    return name[:1] + sorted(set(re.findall(has, text)))


def environment() -> dict:
    """Versions and machine, for a report."""
    packages = ("keras", "tensorflow", "numpy", "scikit-learn", "pandas")
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    machine = [platform.system(), platform.machine(), f"{os.cpu_count()} cores", *processor()]
    return {"versions": versions, "machine": ", ".join(machine)}


# --- reading --------------------------------------------------------------------------------------------------------


def load_dataset(path: Path | str, heights: Path | str | None = None) -> Dataset:
    """Read a dataset: one npz file, codes and heights in the course's format, or the folder that holds these two.

    Rows of infinite height are left out and counted. Raises InputError, with the row (from 0) where there is one, when
    a file is missing or malformed, codes and heights are not equally many, (k, m) is none of the nine groups, P is not
    finite, or a height is below 1, and when all are infinite.
    """
    path = Path(path)
    if path.is_dir():
        path, heights = find_course_files(path)
    codes = read_codes(path)
    files = [path] if heights is None else [path, Path(heights)]
    height = heights_of(codes, files[-1])
    finite = np.isfinite(height)
    if not finite.any():
        raise InputError(f"{files[-1]}: found infinite heights alone, expected finite ones")
    codes, height = Codes(*(column[finite] for column in codes)), height[finite]
    key = np.empty(len(height), dtype="S32")
    for k in np.unique(codes.k):
        key[codes.k == k] = code_keys(unflatten(codes.P[codes.k == k], k))
    sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    source, low = " + ".join(file.name for file in files), np.zeros(len(height), dtype=bool)
    return Dataset(*codes, height, key, low, source=source, sha256=sha256, infinite=int((~finite).sum()))


def heights_of(codes: Codes, path: Path) -> np.ndarray:
    """The heights in a file, float64 (rows,). Raises InputError unless there is one for each code."""
    heights = read_heights(path)
    if len(heights) != len(codes.k):
        raise InputError(f"{path}: found {len(heights)} heights, expected one for each of {len(codes.k)} codes")
    return heights


def find_course_files(folder: Path) -> tuple[Path, Path]:
    """The two files of a course dataset in a folder, by their usual names."""
    found = []
    for pattern in ("*n_k_m_P*.pkl", "*mHeights*.pkl"):
        names = sorted(folder.glob(pattern))
        if len(names) != 1:
            raise InputError(f"{folder}: found {len(names)} files {pattern}, expected 1; name the two files instead")
        found += names
    return found[0], found[1]


def read_baselines(sha256: str, seed: int, path: Path = BASELINES) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Two tables of log2-MSE by k and m (index) and run (columns), published and measured; then the latter's runs.

    The first has Run 2 and Run 4; the second what data/rerun_baselines.py measured with the dataset of this hash and
    this seed; the third a row for each run of the second. Raises InputError if a published figure is not there.
    """
    try:
        rows = pd.read_csv(path)
        both = rows[rows["source"] == "published"], rows[(rows["dataset"] == sha256) & (rows["seed"] == seed)]
        published, measured = (part.pivot(index=["k", "m"], columns="run", values="log2_mse") for part in both)
        published = published.loc[list(GROUPS), ["Run 2", "Run 4"]].astype(float)
        return published, measured.reindex(published.index), both[1].drop_duplicates("run").set_index("run")
    except (OSError, ValueError, KeyError) as error:
        expected = "expected published Run 2 and Run 4 figures of the nine groups"
        raise InputError(f"{path}: {expected} ({one_line(error)})") from None


def check_labels(dataset: Dataset, rows_per_group: int = 100) -> None:
    """Label a sample of each group exactly. Raises InputError for a row whose height is another one."""
    rng = np.random.default_rng(0)
    for i in range(len(GROUPS)):
        rows = np.flatnonzero(dataset.group == i)
        rows = np.sort(rng.choice(rows, min(rows_per_group, len(rows)), replace=False))
        exact = label(Codes(dataset.k[rows], dataset.m[rows], dataset.P[rows]), workers=1)
        wrong = ~(np.abs(np.log2(exact) - dataset.log2_height[rows]) <= LABEL_TOLERANCE)
        if wrong.any():
            j, of = np.argmax(wrong), " of finite height" if dataset.infinite else ""
            raise InputError(
                f"{dataset.source}: row {rows[j]}{of}: found height {dataset.height[rows[j]]:.10g}, expected "
                f"{exact[j]:.8g} ({wrong.sum()} of {len(rows)} rows checked there differ); --trust-labels goes on"
            )


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


def make_dataset(
    rows_per_group: int = ROWS_PER_GROUP, seed: int | Sequence[int] = SEED, known: Sequence[bytes] = (), progress=None
) -> Dataset:
    """Codes with exact heights, `rows_per_group` for each (k, m) group, no code twice in the whole dataset.

    P is int64. In each group a share LOW_SHARE, its last rows, are low codes. Codes of infinite height, duplicates and
    codes whose key is among `known` are left out and others drawn in their place. progress(group, rows so far,
    matrices tried) is called now and then.
    """
    rng = np.random.default_rng(seed)
    parts: list[dict[str, np.ndarray]] = []
    known = set(known)
    for k, m in GROUPS:
        rows, tried = 0, 0
        for low, wanted in ((False, rows_per_group - round(LOW_SHARE * rows_per_group)), (True, rows_per_group)):
            while rows < wanted:
                if low:
                    P = low_matrices(rng, max((wanted - rows) * 5 // 4, 100), k, m)
                else:
                    P = random_matrices(rng, min(max(2 * (wanted - rows), 1_000), 20_000), k, N - k)
                tried += len(P)
                height = m_heights(P, [m])[:, 0]
                P, height = P[np.isfinite(height)], height[np.isfinite(height)]
                keys, new = code_keys(P), []
                for i, key in enumerate(keys.tolist()):
                    if key not in known and rows < wanted:
                        known.add(key)
                        new.append(i)
                        rows += 1
                group = {"k": np.full(len(new), k), "m": np.full(len(new), m), "P": flatten(P[new])}
                parts.append(group | {"height": height[new], "key": keys[new], "low": np.full(len(new), low)})
                if progress:
                    progress((k, m), rows, tried)
    return Dataset(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def describe(dataset: Dataset) -> pd.DataFrame:
    """The dataset's groups: rows, log2 heights, and what part of the matrices has small entries or a zero minor."""
    table = {}
    for k, m in GROUPS:
        group = dataset.take((dataset.k == k) & (dataset.m == m))
        log2, P = group.log2_height, unflatten(group.P, k)
        about = {"rows": len(group), "mean": log2.mean(), "variance": log2.var(), "least": log2.min()}
        about |= {"median": np.median(log2), "median of low codes": np.median(log2[group.low]), "largest": log2.max()}
        about["entries within 8"] = (np.abs(P) <= 8).all(axis=(1, 2)).mean()
        table[k, m] = about | {"with a zero minor": (minors(P) == 0).any(axis=1).mean()}
    return pd.DataFrame(table).T.rename_axis(["k", "m"]).astype({"rows": int}).round(2)


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

    def progress(group: tuple[int, int], rows: int, tried: int) -> None:
        done = GROUPS.index(group) * rows_per_group + rows
        print(
            f"k={group[0]},m={group[1]}: {rows:,} of {rows_per_group:,} rows from {tried:,} random matrices; "
            f"{done / len(GROUPS) / rows_per_group:.0%} of all, {time.perf_counter() - start:.1f} s",
            flush=True,
        )

    dataset = make_dataset(rows_per_group, seed, progress=progress)
    write_heights(output, Codes(dataset.k, dataset.m, dataset.P), dataset.height)
    print(f"\n{describe(dataset).to_string()}\n\n{output}: {len(dataset):,} rows, {output.stat().st_size / 1e6:.1f} MB")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; `output` is filled in."""
    parser = OneLineParser(
        description="Make the dataset of random codes, or label the codes of a file with their exact m-heights.",
        epilog="example: python data/prepare.py --label codes.pkl --output heights.pkl",
    )
    parser.add_argument("--label", type=Path, metavar="INPUTS", help="codes: npz, or a pickle of [n, k, m, P]")
    about = "dataset, by default augmented.npz beside this file; with --label the heights: .csv, .npz, else a pickle"
    parser.add_argument("--output", type=Path, help=about)
    parser.add_argument("--rows", type=int, default=ROWS_PER_GROUP, help="of each (k, m) group (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the dataset (default: %(default)s)")
    asked = parser.parse_args(argv)
    if asked.rows < 1:
        parser.error(f"--rows: found {asked.rows}, expected 1 or more")
    if asked.seed < 0:
        parser.error(f"--seed: found {asked.seed}, expected 0 or more")
    if asked.label and not asked.output:
        parser.error("--label: expected --output HEIGHTS beside it")
    asked.output = asked.output or Path(__file__).with_name("augmented.npz")
    if asked.output.is_dir() or not asked.output.parent.is_dir():
        parser.error(f"--output: {asked.output} is not a file name in an existing folder")
    if asked.label and asked.output.exists() and asked.output.samefile(asked.label):
        parser.error(f"--output: {asked.output} is the file to be labelled, expected another name")
    if not asked.label and asked.output.suffix != ".npz":
        parser.error(f"--output: found {asked.output}, expected a name that ends in .npz")
    return asked


@status_of_main
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    asked = parse_arguments(argv)
    if asked.label:
        label_file(asked.label, asked.output)
    else:
        make_file(asked.rows, asked.seed, asked.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
