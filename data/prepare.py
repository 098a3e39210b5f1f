"""The dataset data/augmented.npz, codes with exact m-heights; also labels the codes of a file.

python data/prepare.py                                    makes the dataset
python data/prepare.py --label INPUTS --output HEIGHTS    labels the codes of a file
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.dataset import (
    Codes,
    Dataset,
    InputError,
    exact_heights,
    flatten,
    read_codes,
    write_heights,
)
from data.heights import GROUPS, N, code_keys, m_heights
from data.matrices import low_matrices, random_matrices

ROWS_PER_GROUP = 12_000
SEED = 5
LOW_SHARE = 0.1  # The share of each group that low_matrices makes; random_matrices makes the rest.
LABEL_BLOCK = 3 * 10**7  # What one process labels in one go: a fraction of a second of work.


# --- dataset --------------------------------------------------------------------------------------


def make_dataset(
    rows_per_group: int = ROWS_PER_GROUP,
    seed: int | Sequence[int] = SEED,
    known: Iterable[bytes] = (),
    progress: bool = False,
) -> Dataset:
    """Codes with exact heights, `rows_per_group` for each (k, m) group, no code twice.

    P is int64. In each group a share LOW_SHARE, its last rows, are low codes. Codes of infinite
    height, duplicates and codes whose key (of code_keys) is in `known` are left out, and others are
    made in their place. progress: whether to print a line for each group.
    """
    rng, known, start = np.random.default_rng(seed), set(known), time.perf_counter()
    parts: list[dict[str, np.ndarray]] = []
    random_rows = rows_per_group - round(LOW_SHARE * rows_per_group)
    for k, m in GROUPS:
        rows, tried = 0, 0
        for low, wanted in ((False, random_rows), (True, rows_per_group)):
            while rows < wanted:
                if low:
                    P = low_matrices(rng, max((wanted - rows) * 5 // 4, 100), k, m)
                else:
                    count = min(max(2 * (wanted - rows), 1_000), 20_000)
                    P = random_matrices(rng, count, k, N - k)
                tried += len(P)
                height = m_heights(P, [m])[:, 0]
                P, height = P[np.isfinite(height)], height[np.isfinite(height)]
                keys, new = code_keys(P), []
                for i, key in enumerate(keys.tolist()):
                    if key not in known and rows < wanted:
                        known.add(key)
                        new.append(i)
                        rows += 1
                columns = {"P": flatten(P[new]), "height": height[new], "key": keys[new]}
                same = {"k": k, "m": m, "low": low}
                parts.append(columns | {x: np.full(len(new), v) for x, v in same.items()})
        if progress:
            seconds = time.perf_counter() - start
            print(f"k={k},m={m}: {rows:,} rows of {tried:,} matrices, {seconds:.1f} s", flush=True)
    return Dataset(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def make_file(rows_per_group: int, seed: int, output: Path) -> None:
    """Make the dataset and write it."""
    dataset = make_dataset(rows_per_group, seed, progress=True)
    codes = Codes(np.full(len(dataset), N), dataset.k, dataset.m, dataset.P)
    write_heights(output, codes, dataset.height)
    print(f"{output}: {len(dataset):,} rows")


# --- labels of a file -----------------------------------------------------------------------------


def label_file(inputs: Path, output: Path) -> None:
    """Write the exact heights of the codes in a file, in their order, by all cores.

    Raises InputError for a file that cannot be used, and when a process is killed.
    """
    codes = read_codes(inputs, trained=False)
    blocks, work = [], []
    table = pd.DataFrame({"n": codes.n, "k": codes.k, "m": codes.m})
    for (n, k, m), rows in table.groupby(["n", "k", "m"]).indices.items():
        # The entries of all tables that m_heights makes for one code.
        entries = sum(math.comb(n, size) * (n - size) for size in range(k, n - m + 1))
        parts = np.array_split(rows, math.ceil(len(rows) * entries / LABEL_BLOCK))
        blocks += parts
        work += [entries * len(part) for part in parts]
    workers = joblib.cpu_count() if sum(work) > 3 * LABEL_BLOCK else 1
    parallel = joblib.Parallel(workers, return_as="generator", max_nbytes=None)
    parts = (Codes(*(column[rows] for column in codes)) for rows in blocks)
    heights, done, rows_done, start = np.empty(len(codes.k)), 0, 0, time.perf_counter()
    try:
        results = parallel(joblib.delayed(exact_heights)(part) for part in parts)
        for rows, amount, block in zip(blocks, work, results, strict=True):
            heights[rows] = block
            done, rows_done = done + amount, rows_done + len(rows)
            seconds = time.perf_counter() - start
            left = timedelta(seconds=round(seconds * (sum(work) / done - 1)))
            print(f"{rows_done:,} of {len(heights):,} codes, about {left} left", flush=True)
    except BrokenProcessPool:
        problem = "a process was killed, expected enough memory for all; label the codes in parts"
        raise InputError(f"{inputs}: {problem}") from None
    write_heights(output, codes, heights)
    print(f"{output}: {len(heights):,} heights, {np.isinf(heights).sum():,} of them infinite")


# --- main -----------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; `output` is filled in."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Make the dataset of random codes, or label the codes of a file exactly.",
        epilog="example: python data/prepare.py --label codes.pkl --output heights.pkl",
    )
    add = parser.add_argument
    add("--label", type=Path, metavar="INPUTS", help="codes: npz or a pickle of [n, k, m, P]")
    about = "dataset (default: data/augmented.npz), or heights: .csv, .npz, else a pickle"
    add("--output", type=Path, help=about)
    about = "of each (k, m) group of the dataset (default: %(default)s)"
    add("--rows", type=int, default=ROWS_PER_GROUP, help=about)
    add("--seed", type=int, default=SEED, help="(default: %(default)s)")
    given = parser.parse_args(argv)
    if given.rows < 1 or given.seed < 0:
        parser.error("--rows, --seed: expected 1 or more rows, and a seed of 0 or more")
    if given.label and not given.output:
        parser.error("--label: expected --output HEIGHTS beside it")
    output = given.output = given.output or Path(__file__).with_name("augmented.npz")
    if output.is_dir() or not output.parent.is_dir():
        parser.error(f"--output: {output} is not a file name in an existing folder")
    if given.label and output.exists() and given.label.exists() and output.samefile(given.label):
        parser.error(f"--output: {output} is the file to be labelled, expected another name")
    if not given.label and output.suffix != ".npz":
        parser.error(f"--output: found {output}, expected a name that ends in .npz")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    given = parse_arguments(argv)
    try:
        if given.label:
            label_file(given.label, given.output)
        else:
            make_file(given.rows, given.seed, given.output)
    except (InputError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
