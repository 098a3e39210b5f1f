"""Run 5: predict the m-height of a linear code G = [I_k | P], n = 9, from (n, k, m, P), in log2 space.

    python train_model_v5.py

trains a simple residual network on data/augmented.npz and writes to run_5/: best_model_run5.h5, training_history.png,
predictions_scatter.png, comparison.png, detailed_comparison.txt and metrics.json. A run that was killed goes on when
the same command is given again. One run of the defaults (seed 42, early stop after 101 epochs, best epoch 86) reached
a mean log2-MSE of 0.041 over the nine groups, no code shared between training and validation, in 20 min on two cores
(AMD EPYC with avx512_bf16, no GPU; 12 s an epoch in bfloat16).

The file reads from top to bottom in the order the data flows:

    settings, dataset, split, input, model, training, report, plots, prediction, main
"""

import ctypes
import hashlib
import io
import itertools
import json
import logging
import math
import os
import platform
import shutil
import signal
import sqlite3
import sys
import time
import timeit
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

# TensorFlow reports a missing GPU as an error. What is an error to us is raised as an exception.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow leaves oneDNN's matrix products off where a processor has no AVX-512, though they halve a step there too.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# Where XLA is to leave the products alone (see compiled_between_products) it has all else to compile, and at once, so
# that a resumed run computes every step as one that was not stopped.
os.environ.setdefault(
    "TF_XLA_FLAGS", "--tf_xla_cpu_global_jit --tf_xla_ops_to_cluster=FUSIBLE --tf_xla_enable_lazy_compilation=false"
)

import keras
import numpy as np
import pandas as pd
from keras import layers, ops
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.preprocessing import StandardScaler

from data.prepare import (
    GROUPS,
    P_WIDTH,
    Codes,
    InputError,
    N,
    OneLineParser,
    code_keys,
    cramer_table,
    label,
    make_dataset,
    minor_order,
    minor_tables,
    npz_bytes,
    read_codes,
    read_heights,
    unflatten,
    write_heights,
    write_whole,
)

HERE = Path(__file__).resolve().parent


# --- settings -------------------------------------------------------------------------------------------------------

TIERS = {
    "easy": ((4, 2), (4, 3), (5, 2)),
    "medium": ((4, 4), (5, 3), (6, 2)),
    "hard": ((4, 5), (5, 4), (6, 3)),
}

# The design's expectations: the mean log2-MSE over a tier's groups, and over all nine, is to stay below these.
TARGETS = {"easy": 0.15, "medium": 0.30, "hard": 1.20, "overall": 0.35}
OVERALL_TO_BEAT = 0.374

# The runs of data/rerun_baselines.py that are validated on the same rows as Run 5, and their short names.
MEASURED = {"Run 2": "R2", "Run 4": "R4", "Run 4, curriculum in force": "R4 curr.", "Run 5, raw P": "R5 raw"}

# Their contrast: Run 2 where most codes are on both sides of the split.
SHARED = "Run 2, codes shared"

# Heights that agree to this much in log2 are the same: files may have been labelled by a numerical solver.
LABEL_TOLERANCE = 1e-4

# Keras' names for what the network may be trained in.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}

# Exit status after Ctrl-C, as shells have it.
INTERRUPTED = 130

# Rows in one step where nothing is learned; it changes no result.
PREDICTION_BATCH = 2048

# Rows that what the network sees is scaled by, about: its means are then within a hundredth of a standard deviation.
SCALED_BY = 16_384

# Batches whose rows are seen together, since codes of one k are seen in half the time.
SEEN_AHEAD = 32

GROUP_WEIGHTS = {
    (4, 2): 1.0,
    (4, 3): 1.0,
    (4, 4): 1.0,
    (4, 5): 2.0,
    (5, 2): 1.0,
    (5, 3): 1.0,
    (5, 4): 1.5,
    (6, 2): 1.2,
    (6, 3): 1.5,
}

# The epochs of a pool larger than an epoch take more rows of the groups with the largest error, and fewer of those with
# m = n - k, where there is least to learn.
GROUP_SHARES = {
    (4, 2): 1.0,
    (4, 3): 1.5,
    (4, 4): 2.0,
    (4, 5): 0.5,
    (5, 2): 1.25,
    (5, 3): 1.5,
    (5, 4): 0.5,
    (6, 2): 1.0,
    (6, 3): 0.5,
}


def setting(default, meaning: str):
    """A dataclass field that carries its meaning, for the reader and for --help."""
    return field(default_factory=lambda: default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. The defaults are the experiment."""

    data: tuple[Path, ...] = setting(
        (HERE / "data" / "augmented.npz",),
        "dataset: npz with k, m, P, height, or two files in the course's format (codes, heights), or their folder",
    )
    output: Path = setting(HERE / "run_5", "folder for the results")
    features: str = setting(
        "basis", "what the network sees of P: basis, norms of its code's bases; raw, its 20 numbers"
    )
    drawn: int = setting(4, "codes drawn for training beside each training row of the dataset; an epoch stays as long")
    precision: str = setting(
        "auto", "of the network's products: float32, bfloat16 (weights stay float32), or auto, which takes the faster"
    )
    epochs: int = setting(250, "passes over the training rows, at most")
    batch_size: int = setting(256, "rows in one optimizer step")
    seed: int = setting(42, "seed of the split, the drawn codes, the initial weights, the order of the rows, dropout")
    val_fraction: float = setting(0.15, "share of each (k, m) group that is held out")
    learning_rate: float = setting(1e-3, "AdamW's rate at the start")
    weight_decay: float = setting(1e-4, "AdamW's decoupled weight decay")
    clipnorm: float = setting(1.0, "each gradient tensor is scaled down to this norm at most")
    constant_epochs: int = setting(10, "epochs before the rate begins to fall")
    decay: float = setting(0.95, "factor on the rate at the start of every later epoch")
    plateau_factor: float = setting(0.7, "factor on the rate when val_loss has not fallen for plateau_patience epochs")
    plateau_patience: int = setting(15, "epochs without a lower val_loss before the rate is cut")
    stop_patience: int = setting(40, "epochs without a lower val_loss before the run ends")
    stop_min_delta: float = setting(0.002, "how much lower val_loss must be for the stop to count it as lower")
    group_weights: dict[tuple[int, int], float] = setting(
        GROUP_WEIGHTS, "weight of a row of each (k, m) group in the training loss"
    )
    group_shares: dict[tuple[int, int], float] = setting(
        GROUP_SHARES, "how readily an epoch takes a row of each (k, m) group, where there are more than it takes"
    )

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("drawn", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected {least} or more")
        if self.features not in FEATURES:
            raise InputError(f"--features: found {self.features}, expected {' or '.join(FEATURES)}")
        if self.precision not in ("auto", *PRECISIONS):
            raise InputError(f"--precision: found {self.precision}, expected auto or {' or '.join(PRECISIONS)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed: found {self.seed}, expected 0 to 2^32 - 1")


# --- dataset --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled codes. k, m: int64 (rows,); P: float64 (rows, 20), row-major, zero-padded; height: float64 (rows,)."""

    k: np.ndarray
    m: np.ndarray
    P: np.ndarray
    height: np.ndarray
    source: str = ""
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.height)

    @cached_property
    def key(self) -> np.ndarray:
        """The code_keys of the rows, (rows,): equal where the codes are, up to permutations and signs."""
        keys = np.empty(len(self), dtype="S32")
        for k in np.unique(self.k):
            rows = self.k == k
            keys[rows] = code_keys(unflatten(self.P[rows], k))
        return keys

    @cached_property
    def code(self) -> np.ndarray:
        """A number for each row's code, int64 (rows,): equal where the keys are."""
        return np.unique(self.key, return_inverse=True)[1]

    @cached_property
    def group(self) -> np.ndarray:
        """Each row's (k, m) group as its position in GROUPS, int64 (rows,)."""
        return pd.MultiIndex.from_tuples(GROUPS).get_indexer(pd.MultiIndex.from_arrays([self.k, self.m]))

    @cached_property
    def log2_height(self) -> np.ndarray:
        """float64 (rows,)"""
        return np.log2(self.height)

    @property
    def repeats(self) -> int:
        """Rows whose code and m an earlier row has too."""
        return len(self) - len(np.unique(self.code * N + self.m))


def load_dataset(path: Path | str, heights: Path | str | None = None) -> Dataset:
    """Read a dataset: one npz file, codes and heights in the course's format, or the folder that holds these two.

    Raises InputError, with the row (from 0) where there is one, when a file is missing or malformed, codes and heights
    are not equally many, (k, m) is none of the nine groups, P is not finite, or a height is not finite or below 1.
    """
    path = Path(path)
    if path.is_dir():
        path, heights = find_course_files(path)
    codes = read_codes(path)
    files = [path] if heights is None else [path, Path(heights)]
    height = heights_of(codes, files[-1])
    sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return Dataset(*codes, height, source=" + ".join(file.name for file in files), sha256=sha256)


def heights_of(codes: Codes, path: Path) -> np.ndarray:
    """The heights in a file, float64 (rows,). Raises InputError unless there is a finite one for each code."""
    heights = read_heights(path)
    if len(heights) != len(codes.k):
        raise InputError(f"{path}: found {len(heights)} heights, expected one for each of {len(codes.k)} codes")
    return heights


def model_inputs(codes: Dataset | Codes, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the model takes for these rows, by input name: n, k, m of shape (rows, 1), P_matrix (rows, 20)."""
    n = np.full((len(rows), 1), N)
    return {"n": n, "k": codes.k[rows, None], "m": codes.m[rows, None], "P_matrix": codes.P[rows]}


def find_course_files(folder: Path) -> tuple[Path, Path]:
    """The two files of a course dataset in a folder, by their usual names."""
    found = []
    for pattern in ("*n_k_m_P*.pkl", "*mHeights*.pkl"):
        names = sorted(folder.glob(pattern))
        if len(names) != 1:
            raise InputError(f"{folder}: found {len(names)} files {pattern}, expected 1; name the two files instead")
        found += names
    return found[0], found[1]


def check_labels(dataset: Dataset, rows_per_group: int = 100) -> None:
    """Label a sample of each group exactly. Raises InputError for a row whose height is another one."""
    rng = np.random.default_rng(0)
    for i in range(len(GROUPS)):
        rows = np.flatnonzero(dataset.group == i)
        rows = np.sort(rng.choice(rows, min(rows_per_group, len(rows)), replace=False))
        exact = label(Codes(dataset.k[rows], dataset.m[rows], dataset.P[rows]), workers=1)
        wrong = ~(np.abs(np.log2(exact) - dataset.log2_height[rows]) <= LABEL_TOLERANCE)
        if wrong.any():
            j = np.argmax(wrong)
            raise InputError(
                f"{dataset.source}: row {rows[j]}: found height {dataset.height[rows[j]]:.10g}, expected "
                f"{exact[j]:.8g} ({wrong.sum()} of {len(rows)} rows checked there differ); --trust-labels goes on"
            )


# --- split ----------------------------------------------------------------------------------------------------------


def split_dataset(dataset: Dataset, val_fraction: float = 0.15, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, validation), sorted: stratified by (k, m), and no code on both sides.

    Codes are split, not rows: all rows of a code, whatever their m and duplicates too, go with it. A code's stratum is
    how many rows it has in each group. Codes of a stratum too small to be split count by the first of their groups,
    and where that is still too small, with the largest stratum. Raises InputError when a (k, m) group would have no
    row on one of the sides.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction: found {val_fraction}, expected more than 0 and less than 1")
    counts = np.zeros((dataset.code.max() + 1, len(GROUPS)), dtype=np.int64)
    np.add.at(counts, (dataset.code, dataset.group), 1)
    for (k, m), codes in zip(GROUPS, (counts > 0).sum(axis=0), strict=True):
        if codes < 2:
            raise InputError(f"{dataset.source}: group k={k},m={m}: found {codes} distinct codes, expected 2 or more")

    least = np.ceil(1 / min(val_fraction, 1 - val_fraction))
    stratum, size = alike(counts)
    rare = size[stratum] < least
    counts[rare] = np.eye(len(GROUPS), dtype=np.int64)[(counts[rare] > 0).argmax(axis=1)]
    stratum, size = alike(counts)
    stratum[size[stratum] < least] = size.argmax()

    splitter = StratifiedShuffleSplit(1, test_size=max(1, round(val_fraction * len(counts))), random_state=seed)
    held_out = np.zeros(len(counts), dtype=bool)
    held_out[next(splitter.split(stratum, stratum))[1]] = True
    in_val = held_out[dataset.code]
    for i, (k, m) in enumerate(GROUPS):
        if in_val[dataset.group == i].all() or not in_val[dataset.group == i].any():
            rows = int((dataset.group == i).sum())
            raise InputError(
                f"{dataset.source}: group k={k},m={m}: found {rows} rows, too few to hold out {val_fraction:.0%}"
            )
    return np.flatnonzero(~in_val), np.flatnonzero(in_val)


def alike(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each row of a table, equal where the rows are and rising with them, and how often each occurs."""
    # np.unique does the same in ten times the time.
    columns = pd.DataFrame(table)
    number = columns.groupby(list(columns)).ngroup().to_numpy(copy=True)
    return number, np.bincount(number)


def add_drawn(dataset: Dataset, train_rows: np.ndarray, drawn: int, seed: int) -> tuple[Dataset, np.ndarray]:
    """The dataset with further codes after its rows, and the training rows with theirs.

    For each training row `drawn` codes come from the distribution of data/prepare.py, equally many for each group, with
    exact heights. Those that the dataset has already, on either side and with whatever m, are left out.
    """
    rows_per_group = drawn * len(train_rows) // len(GROUPS)
    if not rows_per_group:
        return dataset, train_rows
    more = make_dataset(rows_per_group, seed)
    new = ~np.isin(more["key"], dataset.key)
    both = {name: np.concatenate([getattr(dataset, name), column[new]]) for name, column in more.items()}
    # Known already; to make the digests again takes seconds.
    key = both.pop("key")
    pool = Dataset(**both, source=dataset.source, sha256=dataset.sha256)
    vars(pool)["key"] = key
    return pool, np.concatenate([train_rows, np.arange(len(dataset), len(pool))])


def describe_split(dataset: Dataset, train_rows: np.ndarray, val_rows: np.ndarray) -> list[dict]:
    """Rows and distinct codes of each group on either side. Raises RuntimeError when a code is on both."""
    shared = np.intersect1d(dataset.code[train_rows], dataset.code[val_rows])
    if len(shared):
        raise RuntimeError(f"{len(shared)} codes are in training and validation at once")
    table = []
    for i, (k, m) in enumerate(GROUPS):
        row = {"k": k, "m": m}
        for side, rows in (("train", train_rows), ("val", val_rows)):
            inside = rows[dataset.group[rows] == i]
            row |= {f"{side}_rows": len(inside), f"{side}_codes": len(np.unique(dataset.code[inside]))}
        table.append(row)
    return table


# --- input ----------------------------------------------------------------------------------------------------------


@lru_cache
def coordinate_tables(k: int) -> tuple[np.ndarray, np.ndarray]:
    """What belongs to each of the N coordinates a, a row for each, for codes of dimension k.

    First where the pairs (B, a) stand in cramer_table, shape (N, C(N - 1, k)); then the numbers of the bases that
    contain a, in the order of itertools.combinations, shape (N, C(N - 1, k - 1)).
    """
    bases = list(itertools.combinations(range(N), k))
    outside = np.array([a for basis in bases for a in range(N) if a not in basis])
    without = [np.flatnonzero(outside == a) for a in range(N)]
    within = [[i for i, basis in enumerate(bases) if a in basis] for a in range(N)]
    return np.array(without), np.array(within)


def by_rows(sort, x):
    """ops.sort or ops.argsort along the last axis. On a CPU NumPy does it, in a tenth of TensorFlow's time."""
    if keras.backend.backend() != "tensorflow" or has_gpu():
        return sort(x)
    import tensorflow as tf

    stably = partial(np.argsort, kind="stable")
    done, dtype = (np.sort, x.dtype) if sort is ops.sort else (stably, "int64")
    return tf.ensure_shape(tf.numpy_function(done, [x], dtype, stateful=False), x.shape)


def left_by_xla():
    """A context whose operations XLA leaves alone wherever it compiles, since it rounds in another way."""
    if keras.backend.backend() != "tensorflow":
        return nullcontext()
    import tensorflow as tf

    return nullcontext() if tf.executing_eagerly() else tf.xla.experimental.jit_scope(compile_ops=False)


@keras.saving.register_keras_serializable("m_height")
class BasisNorms(layers.Layer):
    """The code seen from each of its bases (information sets) at a time. A layer without weights.

    For a basis B and a coordinate a outside it let M[B, a] = || G_B^-1 g_a ||_1, the largest |c_a| over codewords c
    within 1 on B, from the maximal minors of G by Cramer's rule (see data/prepare.py). Of the row M[B, .] it takes

      rho_B   the largest: how far codewords within 1 on B reach,
      s_B     the (d - 1)-th least, d = n - k - m + 1, or 1 where that is larger: codewords within 1 / s_B on B are
              within 1 on d - 1 coordinates more, which makes the n - m coordinates that an m-height keeps within 1.

    Permuting rows or columns of P or changing their signs only changes which B and a a number belongs to, and what is
    returned forgets that:

      126      log2 rho_B, the largest first; 0 for singular bases and where there are fewer than 126,
      126      log2 s_B of the same bases in the same order; 0 for m = n - k, where d = 1,
      9 x 24   for each coordinate a, quantiles of log2 M[B, a] over the bases without a,
      9 x 16   for each coordinate a, quantiles of log2 rho_B over the bases with a,

    the coordinates of the third and fourth ordered by their mean. Logs lie within LOG2_RANGE; in the quantiles singular
    bases have its upper end. How bases combine to a height, a max-min over sets of them, is not done here.

    Called with k and m, integers of shape (batch, 1), and P_matrix, float64 of shape (batch, 20). Returns float32 of
    shape (batch, 612). Minors are float64 whatever the precision policy: they reach 2.4e9 while one of 1 can decide.
    """

    LOG2_RANGE = (-10.0, 32.0)
    BASES, WITHOUT, WITHIN = 126, 24, 16
    WIDTH = 2 * BASES + N * (WITHOUT + WITHIN)

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs | {"dtype": "float64"})

    def call(self, k, m, P_matrix):
        P_matrix = ops.cast(P_matrix, "float64")
        view = ops.zeros((ops.shape(P_matrix)[0], self.WIDTH), "float32")
        for value in sorted({k for k, _ in GROUPS}):
            view = self.with_dimension(value, k, m, P_matrix, view)
        return view

    def with_dimension(self, value: int, k, m, P, view):
        """`view` with the rows of codes of this k filled in; a batch without such codes is spared their minors."""
        chosen = ops.equal(k, value)

        def filled():
            with left_by_xla():
                return ops.where(chosen, self.of_dimension(P, m, value), view)

        return ops.cond(ops.any(chosen), filled, lambda: view)

    def compute_output_spec(self, k, m, P_matrix):
        return keras.KerasTensor((P_matrix.shape[0], self.WIDTH), "float32")

    def of_dimension(self, P, m, k: int):
        """The whole view, float32 (batch, 612), as if every row had this k."""
        bases, r = math.comb(N, k), N - k
        minors = self.minors(P, k)
        base, swap = cramer_table(N, k)
        norms = self.log2_ratio(sum(ops.take(minors, row, axis=0) for row in swap), ops.take(minors, base, axis=0))
        # Sorted by exchanges: TensorFlow's own sort is slow where rows are short.
        rising = ops.unstack(ops.reshape(norms, (bases, r, -1)), axis=1)
        for i, j in itertools.combinations(range(r), 2):
            rising[i], rising[j] = ops.minimum(rising[i], rising[j]), ops.maximum(rising[i], rising[j])
        rho, s = rising[-1], ops.zeros_like(rising[-1])
        for d in range(2, r):
            s = ops.where(ops.equal(m[:, 0], r - d + 1), ops.maximum(rising[d - 2], 0.0), s)
        without, within = coordinate_tables(k)
        parts = [
            *self.by_norm(rho, s),
            self.by_coordinate(norms, without, self.WITHOUT),
            self.by_coordinate(rho, within, self.WITHIN),
        ]
        return ops.concatenate(parts, axis=1)

    def by_norm(self, rho, s):
        """rho and s, (bases, batch), as (batch, 126): by falling rho, then rising s; zeros for singular bases."""
        regular = rho < self.LOG2_RANGE[1]
        rho, s = (ops.where(regular, x, 0.0) for x in (rho, s))
        # One number that holds both: rho in steps of 2^-16, so that norms equal but for rounding tie, and s, below 64.
        both = ops.cast(s, "float64") - ops.cast(64 * ops.round(rho * 2**16), "float64")
        both = by_rows(ops.sort, ops.transpose(both))
        steps = ops.ceil(both / -64)
        padding = ((0, 0), (0, self.BASES - both.shape[1]))
        return [ops.pad(ops.cast(x, "float32"), padding) for x in (steps / 2**16, both + 64 * steps)]

    def minors(self, P, k: int):
        """Absolute maximal minors of G, float64 (bases, batch), by Laplace expansion as in data/prepare.py."""
        entries = ops.transpose(P[:, : k * (N - k)])
        orders = [ops.ones_like(entries[:1]), entries]
        for entry, sub in minor_tables(k, N - k):
            factors = zip(entry.T, sub.T, strict=True)
            terms = [ops.take(entries, e, axis=0) * ops.take(orders[-1], s, axis=0) for e, s in factors]
            orders.append(sum(terms[::2]) - sum(terms[1::2]))
        return ops.abs(ops.take(ops.concatenate(orders), minor_order(k, N - k), axis=0))

    def log2_ratio(self, above, below):
        """log2 of above / below, float32 of their shape, within LOG2_RANGE; its upper end where below is 0."""
        least, most = (2.0**end for end in self.LOG2_RANGE)
        ratio = ops.where(below > 0, above / ops.where(below > 0, below, 1.0), most)
        return ops.log2(ops.cast(ops.clip(ratio, least, most), "float32"))

    def by_coordinate(self, values, table: np.ndarray, quantiles: int):
        """Even order statistics of values, (rows, batch), for each row of the table: (batch, 9 x quantiles)."""
        rows = ops.reshape(ops.take(values, table.ravel(), axis=0), (*table.shape, -1))
        ranked = by_rows(ops.sort, ops.transpose(rows, (2, 0, 1)))
        picked = ops.take(ranked, np.rint(np.linspace(0, table.shape[1] - 1, quantiles)).astype(int), axis=2)
        # The mean is in float64, so that only coordinates that are alike tie, and the order they came in is forgotten.
        order = by_rows(ops.argsort, ops.mean(ops.cast(picked, "float64"), axis=2))
        return ops.reshape(ops.take_along_axis(picked, order[:, :, None], axis=1), (-1, N * quantiles))


@keras.saving.register_keras_serializable("m_height")
class RawP(layers.Layer):
    """The 20 numbers of P as they are. Called as BasisNorms; returns float32 of shape (batch, 20)."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs | {"dtype": "float64"})

    def call(self, k, m, P_matrix):
        return ops.cast(P_matrix, "float32")

    def compute_output_spec(self, k, m, P_matrix):
        return keras.KerasTensor(P_matrix.shape, "float32")


FEATURES = {"basis": BasisNorms, "raw": RawP}


@keras.saving.register_keras_serializable("m_height")
def within_eight(x):
    """Scaled inputs, kept within 8 standard deviations, so that a singular basis does not outweigh the rest."""
    return ops.clip(x, -8.0, 8.0)


# --- model ----------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("m_height")
def power_of_two(x):
    """2^x: from log2 height to height."""
    return ops.power(2.0, x)


@keras.saving.register_keras_serializable("m_height")
class HashDropout(layers.Dropout):
    """Keras' Dropout for inputs of shape (batch, width), with random numbers that cost little.

    Drawn one after the other, those of a compiled step take a fifth of its time on a CPU. Here each is a hash of its
    place, the layer's seed and the step, so that they are computed where they are used.
    """

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        seed, step = ops.unstack(ops.cast(self.seed_generator.next(), "uint32"))
        rows, columns = (ops.arange(size, dtype="int32") for size in ops.shape(inputs))
        rows = rows + devices()[0] * ops.shape(inputs)[0]
        position = ops.cast(rows[:, None] * inputs.shape[1] + columns, "uint32")
        number = self.mix(position + self.mix(seed + self.mix(step)))
        kept = number >= np.uint32(self.rate * 2**32)
        return ops.where(kept, inputs / (1 - self.rate), 0.0)

    @staticmethod
    def mix(x):
        """A permutation of the 32-bit numbers that leaves no trace of their order: lowbias32 of C. Wellons."""
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ops.bitwise_xor(x, ops.right_shift(x, np.uint32(shift))) * np.uint32(factor)
        return ops.bitwise_xor(x, ops.right_shift(x, np.uint32(16)))


def dense_block(x, units: int, dropout: float = 0.0):
    """Dense with gelu, LayerNorm and, where the rate is not 0, Dropout. All but the product in float32, since to round
    after each operation takes longer."""
    x = layers.Dense(units)(x)
    x = layers.Activation("gelu", dtype="float32")(x)
    x = layers.LayerNormalization(dtype="float32")(x)
    return HashDropout(dropout, dtype="float32")(x) if dropout else x


def residual_block(x, units: int, dropout: float):
    """Two dense blocks and the skip connection around them."""
    inner = dense_block(x, units, dropout)
    return layers.Add(dtype="float32")([dense_block(inner, units), x])


class Seen:
    """What the network sees of P, float32 (rows, width), each row made when it is first asked for and then kept.

    Indexed by row numbers like an array. The first step needs few rows, and would wait for all of them.
    """

    def __init__(self, codes: Dataset | Codes, features: str) -> None:
        k, m = (layers.Input((1,), dtype="int32") for _ in "km")
        P_matrix = layers.Input((P_WIDTH,), dtype="float64")
        self.codes, self.view = codes, keras.Model([k, m, P_matrix], FEATURES[features]()(k, m, P_matrix))
        # Kept in the order in which they are made: memory is taken from the system where it is first written.
        self.values = np.empty((len(codes.k), self.view.output.shape[1]), dtype=np.float32)
        self.place = np.full(len(codes.k), -1)
        self.made = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        missing = np.unique(rows[self.place[rows] < 0])
        missing = missing[np.argsort(self.codes.k[missing], kind="stable")]
        for start in range(0, len(missing), PREDICTION_BATCH):
            self.make(missing[start : start + PREDICTION_BATCH])
        return self.values[self.place[rows]]

    def make(self, rows: np.ndarray) -> None:
        """Make at most PREDICTION_BATCH rows that are missing."""
        # Always that many, since another shape would be traced, which takes a second.
        k, m, P = (getattr(self.codes, name)[np.resize(rows, PREDICTION_BATCH)] for name in ("k", "m", "P"))
        self.place[rows] = self.made + np.arange(len(rows))
        self.values[self.place[rows]] = self.view.predict_on_batch([k[:, None], m[:, None], P])[: len(rows)]
        self.made += len(rows)


def see(codes: Dataset | Codes, features: str) -> np.ndarray:
    """What the network sees of P, float32 (rows, width)."""
    return Seen(codes, features)[np.arange(len(codes.k))]


def fit_scaler(seen: Seen | np.ndarray, rows: np.ndarray) -> layers.Layer:
    """The layer that brings each column of `seen`, shape (all rows, width), to mean 0 and variance 1 over `rows`, or
    over each second, third... of them where they are more than SCALED_BY."""
    rows = rows[:: max(1, len(rows) // SCALED_BY)]
    scaler = StandardScaler()
    for start in range(0, len(rows), PREDICTION_BATCH):
        scaler.partial_fit(seen[rows[start : start + PREDICTION_BATCH]])
    mean, variance = scaler.mean_.tolist(), (scaler.scale_**2).tolist()
    return layers.Normalization(mean=mean, variance=variance, dtype="float32", name="P_scaled")


def build_network(width: int, scaler: layers.Layer) -> keras.Model:
    """The Run 5 network, which is what is trained.

    Takes n, k, m, each of shape (batch, 1), and P_seen, what it sees of P, (batch, width). Gives log2 heights, (batch,
    1). Where Keras' policy is another precision, what comes in is still scaled and what goes out computed in float32.
    """
    n, k, m = (layers.Input((1,), name=name, dtype="int32") for name in ("n", "k", "m"))
    P_seen = layers.Input((width,), name="P_seen")
    P_scaled = layers.Activation(within_eight, dtype="float32")(scaler(P_seen))

    k_embedded = layers.Reshape((32,))(layers.Embedding(7, 32, name="k_embedding")(k))
    m_embedded = layers.Reshape((32,))(layers.Embedding(6, 32, name="m_embedding")(m))
    P_processed = dense_block(P_scaled, 256, dropout=0.3)
    P_processed = dense_block(P_processed, 512, dropout=0.2)

    x = layers.Concatenate()([n, k_embedded, m_embedded, P_processed])
    x = dense_block(x, 1024, dropout=0.3)
    x = residual_block(x, 1024, dropout=0.2)
    x = residual_block(x, 1024, dropout=0.2)
    x = dense_block(x, 512, dropout=0.2)
    x = dense_block(x, 256, dropout=0.1)
    x = dense_block(x, 128, dropout=0.1)
    x = layers.Dense(1, dtype="float32")(x)
    log2_height = layers.Activation("softplus", dtype="float32")(x)
    return keras.Model([n, k, m, P_seen], log2_height, name="log2_height")


def height_model(network: keras.Model, features: str) -> keras.Model:
    """The model that is saved: from raw n, k, m, (batch, 1), and P_matrix, (batch, 20), to heights, (batch, 1).

    P_matrix holds the rows of P one after the other, padded with zeros. The weights are those of the network.
    """
    n, k, m = (layers.Input((1,), name=name, dtype="int32") for name in ("n", "k", "m"))
    P_matrix = layers.Input((P_WIDTH,), name="P_matrix", dtype="float64")
    log2_height = network([n, k, m, FEATURES[features](name="P_seen")(k, m, P_matrix)])
    height = layers.Activation(power_of_two, dtype="float32", name="height")(log2_height)
    return keras.Model([n, k, m, P_matrix], height, name="run5")


# --- training -------------------------------------------------------------------------------------------------------


def lr_schedule(epoch: int, lr: float, constant_epochs: int = 10, decay: float = 0.95) -> float:
    """The rate for this epoch (from 0) from the one the optimizer has, so that a cut on a plateau stays."""
    return lr if epoch < constant_epochs else lr * decay


def network_inputs(dataset: Dataset | Codes, seen: Seen | np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the network takes for these rows, by input name: n, k, m of shape (rows, 1), P_seen (rows, width)."""
    inputs = model_inputs(dataset, rows)
    del inputs["P_matrix"]
    return inputs | {"P_seen": seen[rows]}


def batches(
    dataset: Dataset,
    seen: Seen | np.ndarray,
    rows: np.ndarray,
    rows_an_epoch: int,
    settings: Settings,
    first_epoch: int = 0,
) -> Iterator[tuple]:
    """Endless (inputs, log2 heights, weights), epoch after epoch, `rows_an_epoch` of the rows in each, none twice.

    Where that is not all of them, settings.group_shares tells how readily a row of each group is taken. The choice and
    the order follow from the seed and the epoch alone, so a resumed run sees what it would have seen.
    """
    weight = np.array([settings.group_weights[group] for group in GROUPS], dtype=np.float32)[dataset.group]
    share = np.array([settings.group_shares[group] for group in GROUPS])[dataset.group[rows]]
    chance = share / share.sum()
    for epoch in itertools.count(first_epoch):
        rng = np.random.default_rng([settings.seed, epoch])
        order = rng.permutation(rng.choice(rows, rows_an_epoch, replace=False, p=chance))
        for start in range(0, len(order), settings.batch_size * SEEN_AHEAD):
            ahead = order[start : start + settings.batch_size * SEEN_AHEAD]
            inputs = network_inputs(dataset, seen, ahead)
            for first in range(0, len(ahead), settings.batch_size):
                part = slice(first, first + settings.batch_size)
                x = {name: column[part] for name, column in inputs.items()}
                yield x, dataset.log2_height[ahead[part], None], weight[ahead[part]]


class BestModel(keras.callbacks.ModelCheckpoint):
    """Saves `model`, which has no optimizer, when the network it shares its weights with has its lowest val_loss."""

    def __init__(self, path: Path, model: keras.Model) -> None:
        self.path, self.partial = path, path.with_name(f"partial_{path.name}")
        self.saved_model = model
        super().__init__(str(self.partial), monitor="val_loss", mode="min", save_best_only=True)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(self.saved_model)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        try:
            # HDF5 crashes when the disk fills up under it, so an ordinary file tries first whether there is room.
            self.partial.write_bytes(bytes(4 * self.saved_model.count_params() + 1_000_000))
            self.partial.unlink()
            super().on_epoch_end(epoch, logs)
            if self.partial.exists():
                os.replace(self.partial, self.path)
        finally:
            self.partial.unlink(missing_ok=True)


def describe_run(dataset: Dataset, settings: Settings) -> dict:
    """What two runs must have in common to give the same result, as JSON has it."""
    by_group = {
        name: {f"k={k},m={m}": value for (k, m), value in getattr(settings, name).items()}
        for name in ("group_weights", "group_shares")
    }
    run = asdict(settings) | by_group | {"data": dataset.sha256, "keras": keras.__version__}
    del run["output"]
    return run


class Journal(keras.callbacks.Callback):
    """After every epoch, in one file, all that a killed run needs to go on as if it had not been killed.

    That is the weights, the optimizer's and dropout's state, what the other callbacks remember, the history and the
    seconds spent. It must be the last callback, so that it sees the others' state after the epoch.
    """

    MEMORY = ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter")

    def __init__(self, path: Path, run: dict, parameters: int, others: Sequence[keras.callbacks.Callback]) -> None:
        super().__init__()
        self.path, self.run, self.parameters, self.others = path, run, parameters, others
        self.history: list[dict[str, float]] = []
        self.earlier_seconds, self.start = 0.0, time.perf_counter()
        self.stop_asked = self.finished = self.diverged = False
        self.memory: list[dict] = []

    @property
    def seconds(self) -> float:
        """Wall time of the run, that of earlier starts included."""
        return self.earlier_seconds + time.perf_counter() - self.start

    @property
    def interrupted(self) -> bool:
        """Whether the run ended because it was asked to, with epochs left."""
        return self.stop_asked and not self.finished

    @property
    def best_epoch(self) -> int:
        """The epoch of the lowest val_loss, from 1."""
        return 1 + int(np.argmin([row["val_loss"] for row in self.history]))

    def variables(self) -> list:
        return [*self.model.variables, *self.model.optimizer.variables]

    @staticmethod
    def read(path: Path) -> tuple[dict, list[np.ndarray]]:
        """What was kept and the values of all variables. Raises InputError if the file is torn."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return json.loads(str(file["journal"])), [file[f"v{i}"] for i in range(len(file.files) - 1)]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise InputError(f"{path}: cannot be read ({error}); --fresh starts the run anew") from None

    def restore(self, model: keras.Model) -> None:
        """Bring `model` and this journal to where the file says the run was. Raises InputError if it is another run."""
        kept, values = self.read(self.path)
        differs = [
            f"{name} ({kept['run'].get(name)} there, {now} now)"
            for name, now in self.run.items()
            if kept["run"].get(name) != now
        ]
        if differs:
            raise InputError(
                f"{self.path.parent}: holds an unfinished run with other settings: {', '.join(differs)}; "
                "give its settings again to go on with it, or --fresh to start anew"
            )
        self.set_model(model)
        if [v.shape for v in self.variables()] != [value.shape for value in values]:
            raise InputError(f"{self.path}: is of another network; --fresh starts the run anew")
        for variable, value in zip(self.variables(), values, strict=True):
            variable.assign(value)
        self.history, self.memory = kept["history"], kept["memory"]
        self.earlier_seconds, self.finished = kept["seconds"], kept["finished"]

    def on_train_begin(self, logs: dict | None = None) -> None:
        for callback, memory in zip(self.others, self.memory, strict=False):
            vars(callback).update(memory)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = {name: float(value) for name, value in (logs or {}).items()}
        if not all(np.isfinite(value) for value in row.values()):
            self.diverged = self.model.stop_training = True
            return
        self.history.append(row)
        self.finished = self.model.stop_training or epoch + 1 == self.params["epochs"]
        memory = [{name: vars(c)[name] for name in self.MEMORY if name in vars(c)} for c in self.others]
        kept = {
            "run": self.run,
            "history": self.history,
            "memory": memory,
            "seconds": self.seconds,
            "finished": self.finished,
        }
        values = {f"v{i}": ops.convert_to_numpy(v) for i, v in enumerate(self.variables())}
        write_whole(self.path, npz_bytes(np.savez, journal=np.array(json.dumps(kept)), **values))
        if self.stop_asked:
            self.model.stop_training = True


class Progress(keras.callbacks.Callback):
    """One line an epoch, with the time that the rest of the run takes at most; on a terminal under Keras' own bar."""

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.start, self.first_epoch = time.perf_counter(), None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.first_epoch = epoch if self.first_epoch is None else self.first_epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        epochs, done = self.params["epochs"], epoch + 1 - self.first_epoch
        each = (time.perf_counter() - self.start) / done
        left = f"{each:.1f} s an epoch, at most {duration(each * (epochs - epoch - 1))} left"
        figures = "  ".join(f"{name} {logs[name]:.4g}" for name in ("loss", "val_loss", "learning_rate"))
        print(left if sys.stdout.isatty() else f"epoch {epoch + 1}/{epochs}  {figures}  {left}", flush=True)


@contextmanager
def ends_after_the_epoch(journal: Journal) -> Iterator[None]:
    """Inside, the first Ctrl-C asks the run to end after this epoch; a second one is Python's own."""
    before = signal.getsignal(signal.SIGINT)

    def ask(*_) -> None:
        journal.stop_asked = True
        signal.signal(signal.SIGINT, before)
        print("\ninterrupted: the run ends after this epoch; Ctrl-C again ends it at once", flush=True)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def duration(seconds: float) -> str:
    """Such as 1 h 05 min, 12 min 30 s or 8 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def has_gpu() -> bool:
    """Whether TensorFlow is to train on a GPU."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def all_gpus():
    """What to build and train in: tf.distribute's MirroredStrategy on two or more GPUs, its one-device default else."""
    import tensorflow as tf

    several = len(tf.config.list_physical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def devices() -> tuple:
    """Where several devices have a share of each batch: the number of this one, from 0, and how many they are."""
    if keras.backend.backend() != "tensorflow":
        return 0, 1
    import tensorflow as tf

    count = tf.distribute.get_strategy().num_replicas_in_sync
    here = tf.distribute.get_replica_context()
    return (here.replica_id_in_sync_group if here and count > 1 else 0), count


class AdamW(keras.optimizers.AdamW):
    """Keras' AdamW, on TensorFlow by that library's own kernels: one pass over each weight and its moments. Of Keras'
    dozen operations for each XLA would make a program for each weight, slower ones and after seconds of compiling.

    Where several devices have a share of a batch each, Keras clips the gradient of each share; this clips that of the
    whole batch, as on one device.
    """

    def apply(self, grads, trainable_variables=None):
        with left_by_xla():
            super().apply(grads, trainable_variables)

    def _clip_gradients(self, grads):
        if keras.backend.backend() != "tensorflow":
            return super()._clip_gradients(grads)
        import tensorflow as tf

        grads, count = [tf.convert_to_tensor(g) for g in grads], devices()[1]
        if count > 1:
            grads = tf.distribute.get_replica_context().all_reduce("sum", grads)
        norms = tf.sqrt(2 * tf.stack([tf.nn.l2_loss(g) for g in grads]))
        # Keras goes on to sum over the devices.
        factors = tf.unstack(self.clipnorm / tf.maximum(norms, self.clipnorm) / count)
        return [g * factor for g, factor in zip(grads, factors, strict=True)]

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow":
            super().update_step(gradient, variable, learning_rate)
            return
        import tensorflow as tf

        i, steps = self._get_variable_index(variable), tf.cast(self.iterations + 1, "float32")
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[i].value.handle,
            v=self._velocities[i].value.handle,
            beta1_power=self.beta_1**steps,
            beta2_power=self.beta_2**steps,
            lr=tf.cast(learning_rate, "float32"),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


def faster_precision() -> str:
    """bfloat16 where the processor has it and a product in it takes three quarters of the time or less, else float32.

    Three quarters, because less is lost again around the products, and so that noise does not decide. Each is
    multiplied as in training: float32 by XLA, bfloat16 by oneDNN.
    """
    if keras.backend.backend() != "tensorflow" or has_gpu() or not {"avx512_bf16", "amx_bf16"} & set(processor()[1]):
        return "float32"
    import tensorflow as tf

    seconds = {"float32": [], "bfloat16": []}
    products = {dtype: tf.function(tf.matmul, jit_compile=dtype == "float32") for dtype in seconds}
    for _ in range(10):
        for dtype, product in products.items():
            x, weight = (tf.ones(shape, dtype) for shape in ((1024, 1024), (1024, 1024)))
            seconds[dtype].append(timeit.timeit(partial(product, x, weight), number=1))
    return "bfloat16" if min(seconds["bfloat16"]) <= min(seconds["float32"]) * 3 / 4 else "float32"


def precision_of_run(asked: str, journal: Path) -> str:
    """What was asked for. For auto it is what the unfinished run of this journal began with, if there is one, since a
    second trial could decide otherwise, else the faster. Raises InputError if the journal is torn."""
    if asked != "auto":
        return asked
    begun = Journal.read(journal)[0]["run"].get("precision") if journal.exists() else None
    return begun if begun in PRECISIONS else faster_precision()


def make_repeatable(seed: int) -> None:
    """Seed initial weights and dropout, and have every operation give the same result each time."""
    keras.utils.set_random_seed(seed)
    if has_gpu():
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def compiled_by_xla() -> str:
    """What XLA compiles of a step: "all", what lies "between" the products, or "nothing".

    Nothing on GPUs, where Keras does not compile what is made deterministic, and on several devices. On CPUs XLA
    multiplies bfloat16 as float32, so that the products are better left to oneDNN.
    """
    if has_gpu() or devices()[1] > 1:
        return "nothing"
    in_bfloat16 = keras.config.dtype_policy().compute_dtype == "bfloat16"
    return "between" if in_bfloat16 and keras.backend.backend() == "tensorflow" else "all"


@contextmanager
def compiled_between_products() -> Iterator[None]:
    """Where compiled_by_xla says so, have what runs inside compiled as TF_XLA_FLAGS has it."""
    if compiled_by_xla() != "between":
        yield
        return
    import tensorflow as tf

    tf.config.optimizer.set_jit(True)
    try:
        yield
    finally:
        tf.config.optimizer.set_jit(False)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, where it is glibc. A step frees and asks for tens of MB again, and to get
    them from the system each time, page by page, takes a tenth of it or more in float32."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_MAX, 0)


def compile_network(network: keras.Model, settings: Settings) -> None:
    """Give the network its optimizer and its loss, the MSE of log2 heights."""
    network.compile(
        optimizer=AdamW(settings.learning_rate, weight_decay=settings.weight_decay, clipnorm=settings.clipnorm),
        loss="mean_squared_error",
        metrics=[keras.metrics.MeanSquaredError(name="log2_mse")],
        jit_compile=compiled_by_xla() == "all",
    )


def train(model, dataset, seen, train_rows, rows_an_epoch: int, val_rows, settings: Settings, work: Path) -> Journal:
    """Train to the early stop or the last epoch; the best model so far is work/best_model.h5.

    model: as from height_model; seen: what its network sees of the dataset's P. Goes on with the run that
    work/journal.npz holds, if there is one. Ctrl-C ends the run after the epoch, a second one at once. Returns the
    journal.
    """
    network = model.get_layer("log2_height")
    compile_network(network, settings)
    remembering = [
        keras.callbacks.ReduceLROnPlateau("val_loss", settings.plateau_factor, settings.plateau_patience),
        keras.callbacks.EarlyStopping("val_loss", settings.stop_min_delta, settings.stop_patience),
        BestModel(work / "best_model.h5", model),
    ]
    journal = Journal(work / "journal.npz", describe_run(dataset, settings), model.count_params(), remembering)
    schedule = partial(lr_schedule, constant_epochs=settings.constant_epochs, decay=settings.decay)
    fit_resumably(
        network,
        journal,
        partial(batches, dataset, seen, train_rows, rows_an_epoch, settings),
        math.ceil(rows_an_epoch / settings.batch_size),
        (network_inputs(dataset, seen, val_rows), dataset.log2_height[val_rows, None]),
        settings.epochs,
        keras.callbacks.LearningRateScheduler(schedule),
    )
    return journal


def fit_resumably(network, journal: Journal, stream, steps: int, validation, epochs: int, schedule) -> None:
    """Fit the compiled network from where the journal's file says it was to its end or to `epochs`.

    stream: from the number of the first epoch, from 0, to endless batches, `steps` an epoch; validation: inputs and
    log2 heights; schedule: the callback that sets the rate, which goes before the journal's others.
    """
    # Left to its first step the optimizer makes its variables while that is traced, and TensorFlow traces it again.
    network.optimizer.build(network.trainable_variables)
    if journal.path.exists():
        journal.restore(network)
        print(
            f"going on with the unfinished run in {journal.path.parent}: {len(journal.history)} epochs are done",
            flush=True,
        )
    if journal.finished:
        return
    keep_freed_memory()
    first_epoch = len(journal.history)
    batches_to_come = stream(first_epoch)
    if devices()[1] > 1:
        batches_to_come = from_the_start_again(partial(stream, first_epoch))
    with ends_after_the_epoch(journal), compiled_between_products():
        network.fit(
            batches_to_come,
            steps_per_epoch=steps,
            initial_epoch=first_epoch,
            epochs=epochs,
            validation_data=validation,
            validation_batch_size=PREDICTION_BATCH,
            callbacks=[schedule, *journal.others, Progress(), journal],
            shuffle=False,
            verbose=1 if sys.stdout.isatty() else 0,
        )


def from_the_start_again(stream):
    """The batches of `stream`, a function without arguments, as a tf.data.Dataset.

    For several devices Keras takes a batch to build the model and begins anew, which a generator cannot.
    """
    import tensorflow as tf

    signature = tf.nest.map_structure(lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype), next(stream()))
    return tf.data.Dataset.from_generator(stream, output_signature=signature)


# --- report ---------------------------------------------------------------------------------------------------------


def predict_heights(model: keras.Model, codes: Dataset | Codes, rows: np.ndarray) -> np.ndarray:
    """The heights that the model gives for these rows, float64 (rows,)."""
    # A batch of one k is seen in half the time of a mixed one. Model.predict can take seconds to end.
    by_k = rows[np.argsort(codes.k[rows], kind="stable")]
    height = np.empty(len(codes.k))
    for start in range(0, len(by_k), PREDICTION_BATCH):
        batch = by_k[start : start + PREDICTION_BATCH]
        height[batch] = model.predict_on_batch(model_inputs(codes, batch))[:, 0]
    return height[rows]


def read_baselines(sha256: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Two tables of log2-MSE by k and m (index) and run (columns), published and measured here; then the latter's runs.

    The first has Run 2 and Run 4; the second what data/rerun_baselines.py measured with the dataset of this hash and
    this seed, of MEASURED and SHARED, no columns if nothing. The third has parameters, epochs, best_epoch and ended for
    each column of the second. Raises InputError if the file or a published figure is not there.
    """
    path = HERE / "data" / "baselines.csv"
    try:
        rows = pd.read_csv(path)
        published = rows.query("source == 'published'").pivot(index=["k", "m"], columns="run", values="log2_mse")
        published = published.loc[list(GROUPS), ["Run 2", "Run 4"]].astype(float)
        here = rows[(rows["source"] == "measured") & (rows["dataset"] == sha256) & (rows["seed"] == seed)]
        measured = here.pivot(index=["k", "m"], columns="run", values="log2_mse").reindex(list(GROUPS)).astype(float)
        runs = here.drop_duplicates("run").set_index("run")[["parameters", "epochs", "best_epoch", "ended"]]
    except (OSError, ValueError, KeyError, pd.errors.UndefinedVariableError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{path}: expected published Run 2 and Run 4 figures of the nine groups ({problem})") from None
    names = [run for run in (*MEASURED, SHARED) if run in measured]
    return published, measured[names], runs.loc[names].astype({"parameters": int, "epochs": int, "best_epoch": int})


def group_errors(k, m, true: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """log2_mse and n (columns) of each (k, m) group (index) from log2 heights; all arguments of shape (rows,)."""
    errors = pd.DataFrame({"k": k, "m": m, "square": (true - predicted) ** 2})
    return errors.groupby(["k", "m"])["square"].agg(log2_mse="mean", n="size")


def compare(dataset: Dataset, rows, predicted: np.ndarray, published: pd.DataFrame) -> tuple[list[dict], list[dict]]:
    """The figures of the report: a row for each group, then a row for each tier and one for all nine groups.

    predicted: log2 heights, (rows,); published: the first table of read_baselines. Every figure is a log2-MSE; that of
    a tier is the mean of its groups. vs_run2 and vs_run4 are relative changes, Run 5 / other - 1.
    """
    table = group_errors(dataset.k[rows], dataset.m[rows], dataset.log2_height[rows], predicted)
    table = table.join(published).rename(columns={"log2_mse": "run5", "Run 2": "run2", "Run 4": "run4"})
    for other in ("run2", "run4"):
        table[f"vs_{other}"] = table["run5"] / table[other] - 1
    groups = table.loc[list(GROUPS)].reset_index().to_dict("records")

    tiers = []
    for tier, members in {**TIERS, "overall": GROUPS}.items():
        mean = table.loc[list(members), ["run2", "run4", "run5"]].mean().to_dict()
        target = TARGETS[tier]
        tiers.append({"tier": tier, **mean, "target": target, "met": bool(mean["run5"] < target)})
    return groups, tiers


def describe_results(
    dataset, pool, train_rows, val_rows, predicted: np.ndarray, baselines, journal: Journal, settings: Settings
) -> dict:
    """All figures of the run, as they go to metrics.json; what differs between equal runs is under "times".

    pool: the dataset with the drawn codes after its rows. predicted: log2 heights of the validation rows. baselines: as
    from read_baselines.
    """
    published, measured, runs = baselines
    groups, tiers = compare(dataset, val_rows, predicted, published)
    return {
        "dataset": {"file": dataset.source, "sha256": dataset.sha256, "rows": len(dataset), "repeats": dataset.repeats},
        "drawn_rows": len(pool) - len(dataset),
        "rows_an_epoch": len(dataset) - len(val_rows),
        "split": describe_split(pool, train_rows, val_rows),
        "distinct_codes": {
            "all": len(np.unique(pool.code)),
            "train": len(np.unique(pool.code[train_rows])),
            "val": len(np.unique(pool.code[val_rows])),
            "on_both_sides": len(np.intersect1d(pool.code[train_rows], pool.code[val_rows])),
        },
        "settings": describe_run(dataset, settings),
        "epochs_run": len(journal.history),
        "best_epoch": journal.best_epoch,
        "best_val_loss": journal.history[journal.best_epoch - 1]["val_loss"],
        "interrupted": journal.interrupted,
        "parameters": journal.parameters,
        "groups": groups,
        "tiers": tiers,
        "same_split": compare_measured(groups, measured),
        "same_split_runs": runs.to_dict("index"),
        "overall_to_beat": {"target": OVERALL_TO_BEAT, "met": bool(tiers[-1]["run5"] < OVERALL_TO_BEAT)},
        "history": journal.history,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("keras", keras.backend.backend(), "numpy", "scikit-learn", "pandas")},
        "machine": machine(),
        "times": {"wall_seconds": round(journal.seconds, 1), "finished": time.strftime("%Y-%m-%d %H:%M:%S")},
    }


def processor() -> tuple[list[str], list[str]]:
    """Its name, if known, and what it has for matrix products, as Linux tells them; nothing elsewhere."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    except OSError:
        return [], []
    about = {key.strip(): value.strip() for key, value in lines}
    flags = about.get("flags", "").split()
    name = [about["model name"]] if "model name" in about else []
    return name, [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]


def machine() -> str:
    """System, cores and processor."""
    name, has = processor()
    return ", ".join([f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", *name, *has])


def compare_measured(groups: list[dict], measured: pd.DataFrame) -> list[dict]:
    """Run 5 beside what was measured on the same split: a row for each group, tier and all nine; none if nothing was.

    groups: as from compare; measured: as from read_baselines. Each row has the log2-MSE of every run by its name, and
    under "change" the relative change from each of MEASURED to Run 5, Run 5 / other - 1.
    """
    if measured.empty:
        return []
    compared = [run for run in measured if run in MEASURED]
    table = measured.assign(**{"Run 5": [row["run5"] for row in groups]})
    means = {tier: table.loc[list(members)].mean() for tier, members in {**TIERS, "overall": GROUPS}.items()}
    rows = [(f"k={k},m={m}", table.loc[(k, m)]) for k, m in GROUPS] + list(means.items())
    return [
        {"name": name, **row.to_dict(), "change": {run: row["Run 5"] / row[run] - 1 for run in compared}}
        for name, row in rows
    ]


def measured_text(rows: list[dict], runs: dict[str, dict]) -> str:
    """The second table of the report, and what its columns are, or why it is left out; then what sharing codes does."""
    title = "Same data, same split: log2-MSE of runs measured on these very validation rows"
    compared = [run for run in runs if run in MEASURED]
    if not compared:
        return f"{title}\n\nLeft out: data/baselines.csv has no figures measured on this dataset and seed."
    head = "".join(f"{MEASURED[run]:<11}" for run in compared) + f"{'Run 5':<11}"
    head += "".join(f"{'vs ' + MEASURED[run]:<13}" for run in compared)
    lines = [title, "", f"{'k,m':<9}{head}".rstrip(), "-" * (9 + len(head))]
    for row in rows:
        if row["name"] == "easy":
            lines.append("mean of")
        figures = "".join(f"{row[run]:<11.6f}" for run in (*compared, "Run 5"))
        changes = "".join(f"{row['change'][run]:<+13.1%}" for run in compared)
        lines.append(f"{row['name']:<9}{figures}{changes}".rstrip())
    lines += ["", "Trained by data/rerun_baselines.py on the dataset's own training rows, without drawn codes:"]
    described = {}
    for run, about in runs.items():
        ended = "" if about["ended"] == "complete" else f"; {about['ended']}, it could have gone on"
        epochs = f"{about['epochs']} epochs, best epoch {about['best_epoch']}{ended}"
        described[run] = f"{run}: {about['parameters']:,} parameters, {epochs}"
    lines += [f"{MEASURED[run]:<11}{described[run]}" for run in compared]
    if SHARED in runs:
        means = ", ".join(f"{row['name']} {row[SHARED]:.6f}" for row in rows[len(GROUPS) :])
        lines += ["", SHARED_NOTE, f"{described[SHARED]}:", means]
    return "\n".join(lines)


def split_text(split: list[dict]) -> str:
    """The split as a table: rows and distinct codes of each group on either side."""
    lines = [f"{'k,m':<9}{'training rows':>14}{'codes':>9}{'validation rows':>18}{'codes':>9}"]
    for row in split:
        name = f"k={row['k']},m={row['m']}"
        lines.append(
            f"{name:<9}{row['train_rows']:>14,}{row['train_codes']:>9,}{row['val_rows']:>18,}{row['val_codes']:>9,}"
        )
    return "\n".join([*lines, "No code is on both sides."])


def report_text(results: dict) -> str:
    """detailed_comparison.txt: what was run, the groups, the tiers beside their targets, what the columns are."""
    codes, run = results["distinct_codes"], results["settings"]
    ended = "interrupted, the same command goes on with it" if results["interrupted"] else "complete"
    epochs = f"{results['epochs_run']} of at most {run['epochs']} epochs, best epoch {results['best_epoch']}"
    about = {
        "run": f"{ended}; {epochs}",
        "dataset": f"{results['dataset']['file']}, sha256 {results['dataset']['sha256']}",
        "rows": f"{results['dataset']['rows']:,}, {results['dataset']['repeats']:,} of them repeat a code and m",
        "distinct codes": f"{codes['all']:,}: {codes['train']:,} training, {codes['val']:,} validation, "
        f"{codes['on_both_sides']} on both sides",
        "drawn codes": f"{results['drawn_rows']:,} more for training; an epoch takes {results['rows_an_epoch']:,} rows"
        + (", more of some groups (group_shares in metrics.json)" if results["drawn_rows"] else ""),
        "input": f"{INPUT_NOTE[run['features']]}, scaled on training rows",
        "parameters": f"{results['parameters']:,}, trained in {run['precision']}",
        "seed, batch": f"{run['seed']}, {run['batch_size']}",
        "versions": ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "machine": results["machine"],
        "wall time": f"{duration(results['times']['wall_seconds'])}, ended {results['times']['finished']}",
    }
    lines = ["Run 5 beside Run 2 and Run 4: log2-MSE on the validation rows, by (k, m) group", ""]
    lines += [f"{name:<16}{value}" for name, value in about.items()]

    lines += ["", f"{'k,m':<9}{'Run 2':<11}{'Run 4':<11}{'Run 5':<11}{'vs R2':<12}{'vs R4':<12}n", "-" * 70]
    for row in results["groups"]:
        name = f"k={row['k']},m={row['m']}"
        figures = "".join(f"{row[run]:<11.6f}" for run in ("run2", "run4", "run5"))
        changes = "".join(f"{row[vs]:<+12.1%}" for vs in ("vs_run2", "vs_run4"))
        lines.append(f"{name:<9}{figures}{changes}n={row['n']}")
    lines.append('"vs" is (Run 5 / other - 1): negative means that Run 5 has the smaller error.')

    lines += ["", f"{'mean of':<9}{'Run 2':<11}{'Run 4':<11}{'Run 5':<11}{'target':<12}", "-" * 70]
    verdict = {True: "met", False: "missed"}
    for row in results["tiers"]:
        figures = "".join(f"{row[run]:<11.6f}" for run in ("run2", "run4", "run5"))
        lines.append(f"{row['tier']:<9}{figures}< {row['target']:<10.3f}{verdict[row['met']]}")
    beat = results["overall_to_beat"]
    lines.append(f"{'overall, to beat':<42}< {beat['target']:<10.3f}{verdict[beat['met']]}")

    lines += ["", COLUMNS_NOTE, "", measured_text(results["same_split"], results["same_split_runs"])]
    lines += ["", split_text(results["split"])]
    return "\n".join(lines) + "\n"


INPUT_NOTE = {"basis": "norms of the code's bases (--features basis)", "raw": "the 20 numbers of P (--features raw)"}

COLUMNS_NOTE = """\
The Run 2 and Run 4 columns are figures as published, not measured here. They come from another dataset and from a
split by rows in which most codes had copies on both sides: three nested files were joined, so that at most 48,000 of
132,851 rows were distinct, and rows were added by noise on P with the height kept. They are therefore lower than what
those networks reach on codes they have not seen. Run 5 is measured on codes none of which is in training. The Run 5
design quotes 0.538 as the overall figure of Run 4; its published groups have the mean given above."""

SHARED_NOTE = """\
What shared codes hide: Run 2 on a third of the codes, each three times, and rows split at random, so that nearly every
validation row has its code in training too. Mean of the groups on such rows, to be set beside R2:"""


def renew_report(output: Path) -> int:
    """Write the report of a finished run anew, with what data/baselines.csv has for its dataset and seed by now."""
    path = output / "metrics.json"
    with only_run_in(output):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            _, measured, runs = read_baselines(results["settings"]["data"], results["settings"]["seed"])
            results["same_split"] = compare_measured(results["groups"], measured)
            results["same_split_runs"] = runs.to_dict("index")
            report, picture = report_text(results), io.BytesIO()
            plot_comparison(results, picture)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = " ".join(repr(error).split())
            raise InputError(f"{path}: expected the figures of a finished run ({problem})") from None
        write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
        write_whole(output / "detailed_comparison.txt", report.encode())
        write_whole(output / "comparison.png", picture.getvalue())
    print(report)
    return 0


# --- plots ----------------------------------------------------------------------------------------------------------


class PlainTicks(LogFormatter):
    """0.06 where LogFormatter says 6e-02."""

    def __call__(self, x, pos=None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plot_history(history: list[dict], path: Path) -> None:
    """Loss and val_loss against the epoch, the best epoch marked; the learning rate below."""
    table = pd.DataFrame(history, index=range(1, len(history) + 1))
    best = table["val_loss"].idxmin()
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    marker = "o" if len(table) == 1 else None
    top.plot(table["loss"], label="loss (training rows: weighted, with dropout)", marker=marker)
    top.plot(table["val_loss"], label="val_loss (validation rows: log2-MSE)", marker=marker)
    top.axvline(best, color="grey", linestyle=":")
    top.plot(best, table["val_loss"][best], "kv", label=f"best epoch {best}: {table['val_loss'][best]:.4f}")
    top.set(ylabel="MSE of log2 height", yscale="log", title="Run 5: training history")
    top.yaxis.set_major_formatter(PlainTicks())
    top.yaxis.set_minor_formatter(PlainTicks(minor_thresholds=(2, 0.5)))
    top.grid(which="both", alpha=0.3)
    top.legend()
    below.plot(table["learning_rate"], color="tab:green", marker=marker)
    below.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_predictions(dataset: Dataset, rows: np.ndarray, predicted: np.ndarray, groups: list[dict], path: Path) -> None:
    """Predicted against true log2 height, (rows,): a panel for each group, a row of panels for each tier."""
    true = dataset.log2_height[rows]
    ends = np.array([min(true.min(), predicted.min()), max(true.max(), predicted.max())])
    figure = Figure(figsize=(11, 11), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True, sharey=True)
    figures = {(row["k"], row["m"]): row for row in groups}
    for line, (tier, members) in zip(axes, TIERS.items(), strict=True):
        for panel, (k, m) in zip(line, members, strict=True):
            inside = dataset.group[rows] == GROUPS.index((k, m))
            panel.plot(ends, ends, color="black", linewidth=0.8)
            panel.scatter(true[inside], predicted[inside], s=5, alpha=0.3, linewidths=0)
            row = figures[k, m]
            panel.set_title(f"k={k}, m={m} ({tier}): log2-MSE {row['run5']:.3f}, n={row['n']:,}", fontsize=9)
            panel.grid(alpha=0.3)
    figure.supxlabel("true log2 height")
    figure.supylabel("predicted log2 height")
    figure.suptitle("Run 5: validation rows; on the line the prediction is exact")
    figure.savefig(path, dpi=120)


def plot_comparison(results: dict, file) -> None:
    """log2-MSE of each run in the report by group; results: as from describe_results, file: a path or open file."""
    groups = results["groups"]
    runs = {f"{name}, published": [row[run] for row in groups] for name, run in (("Run 2", "run2"), ("Run 4", "run4"))}
    for run in results["same_split_runs"]:
        if run in MEASURED:
            runs[f"{run}, same split"] = [row[run] for row in results["same_split"][: len(groups)]]
    runs["Run 5"] = [row["run5"] for row in groups]
    figure = Figure(figsize=(11, 7), layout="constrained")
    panel = figure.subplots()
    shifts = np.linspace(-0.3, 0.3, len(runs))
    for shift, marker, (run, errors) in zip(shifts, itertools.cycle("osD^v<*"), runs.items()):
        # Figures of other data are hollow.
        inside = "none" if run.endswith("published") else None
        color = "black" if run == "Run 5" else None
        panel.plot(np.arange(len(groups)) + shift, errors, marker, label=run, color=color, markerfacecolor=inside)
    for between in np.arange(1, len(groups)) - 0.5:
        panel.axvline(between, color="grey", linewidth=0.5)
    panel.set_xticks(range(len(groups)), [f"k={row['k']}, m={row['m']}" for row in groups])
    panel.set(ylabel="MSE of log2 height", yscale="log", title="Run 5 beside Run 2 and Run 4, by (k, m) group")
    panel.yaxis.set_major_formatter(PlainTicks())
    panel.grid(axis="y", alpha=0.3)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)
    figure.savefig(file, dpi=120, format="png")


# --- prediction -----------------------------------------------------------------------------------------------------


def load_trained(path: Path) -> keras.Model:
    """The model in a file that this script made. Raises InputError where there is none or another kind of file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a trained model (python train_model_v5.py makes one)")
    try:
        model = keras.models.load_model(path)
        names = [x.name for x in model.inputs]
    except Exception as error:
        # Keras and h5py raise many kinds for a torn or foreign file.
        raise InputError(f"{path}: cannot be loaded as a model: {' '.join(str(error).split())}") from None
    if names != ["n", "k", "m", "P_matrix"]:
        raise InputError(f"{path}: takes {', '.join(names)}, expected a model that takes n, k, m, P_matrix")
    return model


def predict(inputs: Path, heights: Path | None, model: Path, output: Path) -> int:
    """Write the model's heights for the codes of a file, in their order; with true heights print each group's error."""
    codes = read_codes(inputs)
    true = None if heights is None else heights_of(codes, heights)
    predicted = predict_heights(load_trained(model), codes, np.arange(len(codes.k)))
    output.mkdir(parents=True, exist_ok=True)
    written = output / f"{inputs.stem}_predicted{'.csv' if inputs.suffix == '.npz' else '.pkl'}"
    write_heights(written, codes, predicted)
    print(f"{written}: {len(predicted):,} heights")
    if true is not None:
        table = group_errors(codes.k, codes.m, np.log2(true), np.log2(predicted))
        for (k, m), row in table.iterrows():
            print(f"k={k},m={m}  log2-MSE {row['log2_mse']:.6f}  n={row['n']:.0f}")
        print(f"mean of the groups  log2-MSE {table['log2_mse'].mean():.6f}  n={len(true)}")
    return 0


# --- main -----------------------------------------------------------------------------------------------------------


def write_results(dataset, pool, train_rows, val_rows, baselines, journal, settings: Settings, work: Path) -> str:
    """Make all results in `work`, then move them to the output folder one by one. Returns the report."""
    model = load_trained(work / "best_model.h5")
    predicted = np.log2(predict_heights(model, dataset, val_rows))
    results = describe_results(dataset, pool, train_rows, val_rows, predicted, baselines, journal, settings)
    report = report_text(results)
    staged = work / "results"
    staged.mkdir(exist_ok=True)
    (staged / "detailed_comparison.txt").write_text(report, encoding="utf-8")
    (staged / "metrics.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot_history(journal.history, staged / "training_history.png")
    plot_predictions(dataset, val_rows, predicted, results["groups"], staged / "predictions_scatter.png")
    plot_comparison(results, staged / "comparison.png")
    shutil.copy(work / "best_model.h5", staged / "best_model_run5.h5")
    for file in staged.iterdir():
        os.replace(file, settings.output / file.name)
    return report


def run(settings: Settings, fresh: bool = False, trust_labels: bool = False) -> int:
    """Load, split, train, report. Returns the exit status."""
    dataset = load_dataset(*settings.data)
    baselines = read_baselines(dataset.sha256, settings.seed)
    if not trust_labels:
        check_labels(dataset)
    own_rows, val_rows = split_dataset(dataset, settings.val_fraction, settings.seed)
    print(f"{dataset.source}: {len(dataset):,} rows, {dataset.repeats:,} of them repeat a code and m")
    pool, train_rows = add_drawn(dataset, own_rows, settings.drawn, settings.seed)
    print(split_text(describe_split(pool, train_rows, val_rows)), flush=True)

    settings.output.mkdir(parents=True, exist_ok=True)
    work = settings.output / "unfinished"
    with only_run_in(settings.output):
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        make_repeatable(settings.seed)
        settings = replace(settings, precision=precision_of_run(settings.precision, work / "journal.npz"))
        keras.config.set_dtype_policy(PRECISIONS[settings.precision])
        seen = Seen(pool, settings.features)
        with all_gpus().scope():
            network = build_network(seen.shape[1], fit_scaler(seen, own_rows))
            model = height_model(network, settings.features)
            print(
                f"{model.count_params():,} parameters, {settings.precision}, {len(own_rows):,} rows an epoch",
                flush=True,
            )
            journal = train(model, pool, seen, train_rows, len(own_rows), val_rows, settings, work)
        if journal.diverged:
            print(
                f"the loss became NaN or infinite in epoch {len(journal.history) + 1}: look for extreme heights in the "
                f"dataset, try another --seed (with --fresh) or a smaller rate; {work} keeps the best model so far",
                file=sys.stderr,
            )
            return 1
        report = write_results(dataset, pool, train_rows, val_rows, baselines, journal, settings, work)
        if not journal.interrupted:
            shutil.rmtree(work)
    print(f"\n{report}\nresults are in {settings.output}")
    return INTERRUPTED if journal.interrupted else 0


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder that ends with the process, however it ends. Raises InputError if another has it."""
    # SQLite's lock is the one in the standard library that works alike on every system.
    try:
        lock = sqlite3.connect(folder / ".lock", timeout=0, isolation_level=None)
        lock.execute("PRAGMA journal_mode = OFF")
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        problem = "another run is writing there" if "locked" in str(error) else f"cannot be written to: {error}"
        raise InputError(f"--output {folder}: {problem}") from None
    try:
        yield
    finally:
        lock.close()
        (folder / ".lock").unlink(missing_ok=True)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Settings, Namespace]:
    """The settings, and what is asked for beside them: fresh, trust_labels, report, predict, heights, model."""
    parser = OneLineParser(description="Train the Run 5 model and compare it with Run 2 and Run 4, or predict with it.")
    for option in fields(Settings):
        if option.name in ("data", "output", "features", "drawn", "precision", "epochs", "batch_size", "seed"):
            default, about = option.default_factory(), {"type": option.type}
            shown = default
            if option.name == "data":
                about = {"type": Path, "nargs": "+"}
                shown = default[0].relative_to(HERE)
            elif option.name == "output":
                shown = default.relative_to(HERE)
            name, text = f"--{option.name.replace('_', '-')}", f"{option.metadata['help']} (default: {shown})"
            parser.add_argument(name, default=default, metavar=option.name.upper(), help=text, **about)
    parser.add_argument("--fresh", action="store_true", help="start anew where an unfinished run lies")
    parser.add_argument("--trust-labels", action="store_true", help="do not compare heights with the exact ones")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the report in the output anew, with data/baselines.csv as it is now",
    )
    parser.add_argument("--predict", type=Path, metavar="INPUTS", help="write heights for these codes, do not train")
    parser.add_argument("--heights", type=Path, help="with --predict: the true heights, to print each group's error")
    parser.add_argument(
        "--model", type=Path, help="with --predict: the model (default: best_model_run5.h5 in the output)"
    )
    arguments = parser.parse_args(argv)
    if len(arguments.data) > 2:
        parser.error(f"--data: found {len(arguments.data)} paths, expected 1 or 2")
    if not arguments.predict and (arguments.heights or arguments.model):
        parser.error("--heights and --model: expected --predict INPUTS beside them")
    if arguments.predict and arguments.report:
        parser.error("--predict and --report: expected one of them")
    names = [option.name for option in fields(Settings) if hasattr(arguments, option.name)]
    chosen = {name: getattr(arguments, name) for name in names} | {"data": tuple(arguments.data)}
    return Settings(**chosen), arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a loss that is no number, 2 for input that cannot be used, 130 for Ctrl-C."""
    logging.getLogger("absl").setLevel("ERROR")  # Keras warns at each checkpoint that h5 is an old format.
    try:
        settings, asked = parse_arguments(argv)
        if asked.predict:
            model = asked.model or settings.output / "best_model_run5.h5"
            return predict(asked.predict, asked.heights, model, settings.output)
        if asked.report:
            return renew_report(settings.output)
        return run(settings, asked.fresh, asked.trust_labels)
    except InputError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or settings.output}: {error.strerror or error}"
    except MemoryError as error:
        problem = f"too little memory ({error}): fewer codes are drawn with a smaller --drawn"
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last whole epoch", file=sys.stderr)
        return INTERRUPTED
    print(f"{Path(__file__).name}: {' '.join(problem.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
