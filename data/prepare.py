"""The dataset data/augmented.npz, codes with exact m-heights; also labels the codes of a file.

python data/prepare.py                                    makes the dataset
python data/prepare.py --label INPUTS --output HEIGHTS    labels the codes of a file
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.dataset import (
    Codes,
    Dataset,
    InputError,
    are_equal,
    exact_heights,
    flatten,
    load_dataset,
    read_codes,
    read_heights,
    start_as_command,
    write_heights,
)
from data.heights import GROUPS, OPEN_GROUPS, N, code_keys, m_heights
from data.matrices import low_matrices, random_matrices, very_low_matrices

ROWS_PER_GROUP = 12_000
SEED = 5
LOW_SHARE = 0.1  # The share of each group that low_matrices makes; random_matrices makes the rest.
# Of the extra codes of a group: the share of codes of very small height, how often each is there.
VERY_LOW_SHARE, VERY_LOW_TIMES = 0.08, 3
DATASET, VERY_LOW = (Path(__file__).with_name(x) for x in ("augmented.npz", "very_low.npz"))


# --- dataset --------------------------------------------------------------------------------------


def make_group(
    rng: np.random.Generator, k: int, m: int, rows: int, known: set[bytes], very_low: int = 0
) -> Dataset:
    """New codes of one (k, m) group with exact heights, so many rows.

    The last rows are low codes: a share LOW_SHARE by low_matrices, then `very_low` codes by
    very_low_matrices, each VERY_LOW_TIMES. Codes of infinite height and codes whose key (of
    code_keys) is in `known` are left out, and others are made in their place; the keys of the new
    codes are added to `known`.
    """
    low_count = round(LOW_SHARE * rows)
    random = rows - low_count - VERY_LOW_TIMES * very_low
    ways = (
        (random, 1, lambda n: random_matrices(rng, np.clip(2 * n, 1000, 20_000), k, N - k)),
        (low_count, 1, lambda n: low_matrices(rng, max(n * 5 // 4, 100), k, m)),
        (very_low, VERY_LOW_TIMES, lambda n: very_low_matrices(rng, max(n * 5 // 4, 100), k, m)),
    )
    parts = []
    for count, times, matrices in ways:
        made = []
        while count > 0:
            P = matrices(count)
            height = m_heights(P, [m])[:, 0]
            P, height = P[np.isfinite(height)], height[np.isfinite(height)]
            key = code_keys(P)
            first = np.sort(np.unique(key, return_index=True)[1])
            new = [i for i in first if key[i] not in known][:count]
            known.update(key[new].tolist())
            made.append({"P": flatten(P[new]), "height": height[new], "key": key[new]})
            count -= len(new)
        parts += times * made
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    low = np.arange(rows) >= random
    return Dataset(k=np.full(rows, k), m=np.full(rows, m), low=low, **columns)


def make_dataset(
    rows_per_group: int = ROWS_PER_GROUP,
    seed: int | Sequence[int] = SEED,
    known: Iterable[bytes] = (),
) -> Dataset:
    """Codes with exact heights, `rows_per_group` for each (k, m) group, no code twice.

    P is int64. In each group a share LOW_SHARE, its last rows, are low codes. known: keys of codes
    that are left out.
    """
    rng, known = np.random.default_rng(seed), set(known)
    first, *others = (make_group(rng, k, m, rows_per_group, known) for k, m in GROUPS)
    return first.extended(*others)


def make_extra_codes(rows_per_group: int, seed: int, known: Iterable[bytes]) -> Iterator[Dataset]:
    """Codes to add to a training set: as make_dataset makes them, and some of very small height.

    Yields a dataset for each of the OPEN_GROUPS, in order. Codes of very small height are a share
    VERY_LOW_SHARE, each VERY_LOW_TIMES. The codes of known and of the file VERY_LOW are left out.
    Groups are made in parallel, from seeds of their own, so that the codes do not depend on the
    number of cores. Raises InputError when a process is killed.
    """
    known = {*known, *load_dataset(VERY_LOW).key.tolist()}
    very_low = round(VERY_LOW_SHARE * rows_per_group)
    arguments = []
    for k, m in OPEN_GROUPS:
        rng = np.random.default_rng([seed, 1, GROUPS.index((k, m))])
        arguments.append((rng, k, m, rows_per_group, set(known), very_low))
    workers = joblib.cpu_count() if rows_per_group > 1000 else 1
    parallel = joblib.Parallel(workers, return_as="generator", max_nbytes=None)
    try:
        yield from parallel(joblib.delayed(make_group)(*x) for x in arguments)
    except BrokenProcessPool:
        raise InputError("a process was killed, expected enough memory for all of them") from None


def make_file(output: Path) -> None:
    """Write the dataset and print a line on each of its groups."""
    data = make_dataset()
    write_heights(output, Codes(np.full(len(data), N), data.k, data.m, data.P), data.height)
    table = pd.DataFrame({"k": data.k, "m": data.m, "log2 height": data.log2_height})
    print(table.groupby(["k", "m"])["log2 height"].describe().round(2).to_string())
    print(f"{output}: {len(data):,} rows")


# --- labels of a file -----------------------------------------------------------------------------


def label_file(inputs: Path, heights_file: Path | None, output: Path) -> None:
    """Write the exact heights of the codes in a file, in their order.

    heights_file: heights to compare with them, or None. Raises InputError for a file that cannot be
    used.
    """
    codes = read_codes(inputs, trained=False)
    for path in (inputs, heights_file):
        if path and output.exists() and output.samefile(path):
            raise InputError(f"{output}: is an input, expected another name")
    if heights_file:
        claimed = read_heights(heights_file, codes)
    print(f"labelling {len(codes.k):,} codes", flush=True)
    heights = exact_heights(codes)
    write_heights(output, codes, heights)
    print(f"{output}: {len(heights):,} heights, {np.isinf(heights).sum():,} of them infinite")
    if heights_file:
        wrong = np.flatnonzero(~are_equal(claimed, heights)).tolist()
        print(f"{heights_file}: {len(wrong):,} of {len(heights):,} heights are wrong")
        for i in wrong[:10]:
            print(f"row {i}: found {claimed[i]:.10g}, expected {heights[i]:.10g}")


# --- main -----------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; `output` is filled in."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Make the dataset of random codes, or label the codes of a file exactly.",
        epilog="example: python data/prepare.py --label codes.pkl --output heights.pkl",
    )
    add = parser.add_argument
    add("--label", type=Path, metavar="INPUTS", help="codes: npz or pickle")
    add("--heights", type=Path, metavar="FILE", help="with --label: heights to compare")
    about = "dataset (default: data/augmented.npz), or heights: .csv, .npz, else a pickle"
    add("--output", type=Path, help=about)
    given = parser.parse_args(argv)
    if (given.label and not given.output) or (given.heights and not given.label):
        parser.error("--label, --heights: expected --label INPUTS and --output HEIGHTS beside it")
    output = given.output = given.output or DATASET
    if output.is_dir() or not output.parent.is_dir():
        parser.error(f"--output: {output} is not a file name in an existing folder")
    if not given.label and output.suffix != ".npz":
        parser.error(f"--output: found {output}, expected a name that ends in .npz")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    given = parse_arguments(argv)
    try:
        if given.label:
            label_file(given.label, given.heights, given.output)
        else:
            make_file(given.output)
    except (InputError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    start_as_command()
    sys.exit(main())
