"""The dataset data/augmented.npz, codes with exact m-heights; also labels the codes of a file.

    python data/prepare.py                                    makes the dataset
    python data/prepare.py --label INPUTS --output HEIGHTS    labels the codes of a file

Reading a dataset, with a check of its heights, is here, too.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.command_line import OneLineParser, status_of_main, whole
from data.files import InputError, read_codes, read_heights, write_heights
from data.heights import GROUPS, Codes, Dataset, N, code_keys, flatten, m_heights, minors, unflatten
from data.matrices import low_matrices, random_matrices

ROWS_PER_GROUP = 12_000
SEED = 5

# The share of each group that low_matrices makes; random_matrices makes the rest.
LOW_SHARE = 0.1

# Heights that agree to this much in log2 are the same: files may have been labelled by a numerical solver.
LABEL_TOLERANCE = 1e-4

# Rows of each group that are labelled to check the heights in a file.
CHECKED_ROWS = 100

# What one process labels in one go, as `label` counts work: a fraction of a second.
LABEL_BLOCK = 3 * 10**7


# --- reading --------------------------------------------------------------------------------------------------------


def load_dataset(*paths: Path | str, labels: str = "check") -> Dataset:
    """Read a dataset: one npz file, codes and heights in the course's format, or the folder that holds these two.

    labels: see true_heights. Rows of infinite height are left out and counted. Raises InputError, with the row (from 0)
    where there is one, when a file is missing or malformed, codes and heights are not equally many, (k, m) is none of
    the nine groups, P is not finite, or a height is below 1 or found to be wrong, and when all are infinite.
    """
    files = [Path(path) for path in paths]
    if len(files) not in (1, 2):
        raise InputError(f"found {len(files)} paths to a dataset, expected 1 or 2")
    if files[0].is_dir():
        files = find_course_files(files[0])
    codes = read_codes(files[0])
    height, remark = true_heights(codes, files[-1], labels)
    finite = np.isfinite(height)
    if not finite.any():
        raise InputError(f"{files[-1]}: found infinite heights alone, expected finite ones")
    k, m, P, height = (column[finite] for column in (*codes[1:], height))
    key = np.empty(len(height), dtype="S32")
    for dimension in np.unique(k):
        key[k == dimension] = code_keys(unflatten(P[k == dimension], dimension))
    sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    about = {"source": " + ".join(file.name for file in files), "infinite": int((~finite).sum()), "labels": remark}
    about["sha256"] = sha256 + (" relabelled" if labels == "relabel" else "")
    return Dataset(k, m, P, height, key, np.zeros(len(height), dtype=bool), **about)


def true_heights(codes: Codes, path: Path, labels: str = "check") -> tuple[np.ndarray, str]:
    """The heights of the codes, float64 (rows,), by a file, and in words where they are from.

    labels: "check" compares some rows of each group with exact heights, "trust" does not, and "relabel" takes exact
    heights for all rows in place of the file's. Raises InputError unless the file has a height for each code, and for a
    checked row that has another height.
    """
    heights = read_heights(path)
    if len(heights) != len(codes.k):
        raise InputError(f"{path}: found {len(heights)} heights, expected one for each of {len(codes.k)} codes")
    if labels == "trust":
        return heights, "as in the file, not checked (--trust-labels)"
    rows = np.arange(len(heights))
    if labels == "check":
        rng = np.random.default_rng(0)
        order = pd.DataFrame({"k": codes.k, "m": codes.m}).loc[rng.permutation(rows)]
        rows = np.sort(order.groupby(["k", "m"]).head(CHECKED_ROWS).index)
    exact = label(Codes(*(column[rows] for column in codes)))
    with np.errstate(invalid="ignore"):  # Two infinite heights are equal; their difference is NaN.
        same = (exact == heights[rows]) | (np.abs(np.log2(exact) - np.log2(heights[rows])) <= LABEL_TOLERANCE)
    wrong = f"{(~same).sum():,} of {len(rows):,}"
    if labels == "relabel":
        print(f"{path}: {wrong} heights were not the exact ones, which are taken instead", flush=True)
        return exact, f"exact ones in place of the file's (--relabel), where {wrong} differed"
    if not same.all():
        first = np.argmin(same)
        found = f"found height {heights[rows[first]]:.10g}, expected {exact[first]:.8g} ({wrong} rows checked differ)"
        way_on = "--relabel takes exact heights instead, --trust-labels goes on with these"
        raise InputError(f"{path}: row {rows[first]}: {found}; {way_on}")
    return heights, f"as in the file, {len(rows):,} of them checked"


def find_course_files(folder: Path) -> tuple[Path, Path]:
    """The two files of a course dataset in a folder, by their usual names."""
    found = []
    for pattern in ("*n_k_m_P*.pkl", "*mHeights*.pkl"):
        names = sorted(folder.glob(pattern))
        if len(names) != 1:
            raise InputError(f"{folder}: found {len(names)} files {pattern}, expected 1; name the two files instead")
        found += names
    return found[0], found[1]


# --- labels of a file -----------------------------------------------------------------------------------------------


def _label_block(n: int, k: int, m: int, flat: np.ndarray) -> np.ndarray:
    return m_heights(unflatten(flat, k, n), [m])[:, 0]


def label(codes: Codes, progress: Callable[[int, float], None] | None = None) -> np.ndarray:
    """The exact height of each row, float64 (rows,), inf where it is infinite.

    Works on all cores that this process may use if there is work for seconds. progress is called now and then with the
    number of rows that are labelled and their share of the work.
    """
    table = pd.DataFrame({"n": codes.n, "k": codes.k, "m": codes.m})
    blocks, work = [], []
    for (n, k, m), rows in table.groupby(["n", "k", "m"]).indices.items():
        # The entries of all tables that m_heights makes for one code.
        entries = sum(math.comb(n, size) * (n - size) for size in range(k, n - m + 1))
        for part in np.array_split(rows, math.ceil(len(rows) * entries / LABEL_BLOCK)):
            blocks.append((n, k, m, part))
            work.append(entries * len(part))
    workers = joblib.cpu_count() if sum(work) > 3 * LABEL_BLOCK else 1
    parallel = joblib.Parallel(workers, return_as="generator", max_nbytes=None)
    found = parallel(joblib.delayed(_label_block)(n, k, m, codes.P[rows]) for n, k, m, rows in blocks)
    heights, done = np.empty(len(codes.k)), np.cumsum(work)
    rows_done = np.cumsum([len(rows) for *_, rows in blocks])
    for i, (block, (*_, rows)) in enumerate(zip(found, blocks, strict=True)):
        heights[rows] = block
        if progress:
            progress(rows_done[i], done[i] / done[-1])
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
    codes = read_codes(inputs, trained=False)
    start = time.perf_counter()

    def progress(done: int, share: float) -> None:
        seconds = time.perf_counter() - start
        left = timedelta(seconds=round(seconds / share - seconds))
        print(f"{done:,} of {len(codes.k):,} codes, {seconds:.1f} s, about {left} left", flush=True)

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
    codes = Codes(np.full(len(dataset), N), dataset.k, dataset.m, dataset.P)
    write_heights(output, codes, dataset.height)
    print(f"\n{describe(dataset).to_string()}\n\n{output}: {len(dataset):,} rows, {output.stat().st_size / 1e6:.1f} MB")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; `output` is filled in."""
    parser = OneLineParser(
        description="Make the dataset of random codes, or label the codes of a file with their exact m-heights.",
        epilog="example: python data/prepare.py --label codes.pkl --output heights.pkl",
    )
    parser.add_argument("--label", type=Path, metavar="INPUTS", help="npz, or a pickle of [n, k, m, P], n up to 12")
    about = "dataset, by default augmented.npz beside this file; with --label the heights: .csv, .npz, else a pickle"
    parser.add_argument("--output", type=Path, help=about)
    about = "of each (k, m) group (default: %(default)s)"
    parser.add_argument("--rows", type=whole(1, 10**7), default=ROWS_PER_GROUP, help=about)
    about = "seed of the dataset (default: %(default)s)"
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=SEED, help=about)
    asked = parser.parse_args(argv)
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
