"""Run 5: predict the m-height of a linear code G = [I_k | P], n = 9, from (n, k, m, P), in log2.

    python train_model_v5.py

trains a residual network on data/augmented.npz and writes the model, its figures, a report and
pictures to run_5/. The same command resumes a run that was killed; --dropout 0 trains without
dropout; --predict FILE predicts the heights of the codes in a file. On new codes the log2-MSE, mean
of the six (k, m) groups with m < n - k (else a bound is exact), is 0.0096, 0.0096 and 0.0094 with
seeds 42, 1 and 2, one run each; ridge regression on the same features has 0.0200. A run took 32 to
41 minutes on two cores of an AMD EPYC, without a GPU. The file is in the order in which the data
flows, from settings to main().

"The design" is the specification of Run 5. Run 2 and Run 4 are earlier networks for the same task,
which comes from a course (CSCE 636). "Low codes" are made to have small heights (data/README.md).
"""

import argparse
import contextlib
import ctypes
import io
import json
import logging
import math
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Else a missing GPU is logged as an error.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # Else off without AVX-512; a third faster.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # Some network file systems have no locks.
if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"  # A notebook's backend may be inherited but not installed.

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from keras import callbacks, layers, ops
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data import dataset as files
from data.dataset import P_WIDTH, Codes, Dataset, InputError, load_dataset, one_line, replacing
from data.features import BasisFeatures, MinimumDistance
from data.heights import GROUPS, OPEN_GROUPS, N
from data.prepare import make_dataset, make_extra_codes

keras.config.set_floatx("float32")  # The user's keras.json may name another.
GPUS = tf.config.list_physical_devices("GPU")
HERE = Path(__file__).resolve().parent
DATA, BASELINES = HERE / "data" / "augmented.npz", HERE / "data" / "baselines.csv"
TRAINED = HERE / "run_5" / "best_model_run5.h5"  # The model that predicts where none is named.


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a run depends on. The defaults are the experiment, and every field is an option.

    An annotation has the type, the meaning and, for numbers, the least and the largest value.
    """

    data: Annotated[tuple[Path, ...], "npz; or codes and heights; or their folder"] = (DATA,)
    output: Annotated[Path, "folder for results (--predict: beside FILE)"] = HERE / "run_5"
    features: Annotated[Literal["basis", "raw"], "of the code's bases, or the entries of P"] = (
        "basis"
    )
    extra_codes: Annotated[int, "new rows per training row, in the six open groups", 0, 1000] = 4
    test_codes: Annotated[int, "codes of each (k, m) group in the test set", 10, 10**6] = 2000
    epochs: Annotated[int, "largest number; may change on resuming", 1, 10**6] = 250
    batch_size: Annotated[int, "rows in one step of the optimizer", 1, 10**6] = 256
    seed: Annotated[int, "random seed of split, extra codes and training", 0, 2**32 - 1] = 42
    val_fraction: Annotated[float, "share of the codes in the validation set", 0.01, 0.9] = 0.15
    width: Annotated[float, "factor on the units of every hidden layer", 0.01, 10] = 1.0
    dropout: Annotated[float, "factor on every dropout rate, 0 for none", 0, 3] = 1.0
    learning_rate: Annotated[float, "AdamW's rate at the start", 0, 1] = 1e-3
    weight_decay: Annotated[float, "AdamW's decoupled weight decay", 0, 1] = 1e-4
    clipnorm: Annotated[float, "norm to which each gradient tensor is clipped", 1e-9, 1e9] = 1.0
    constant_epochs: Annotated[int, "epochs before the rate begins to fall", 0, 10**6] = 10
    decay: Annotated[float, "factor on the rate at the start of each later epoch", 0.01, 1] = 0.95
    plateau_factor: Annotated[float, "factor on the rate at a plateau of val_loss", 0.01, 0.99] = (
        0.7
    )
    plateau_patience: Annotated[int, "epochs without a fall by 1e-4: a plateau", 1, 10**6] = 15
    stop_patience: Annotated[int, "epochs without improvement that end a run", 1, 10**6] = 40
    stop_min_delta: Annotated[float, "smallest fall of val_loss that counts", 0, 100] = 0.002
    group_weights: Annotated[
        tuple[float, ...], "nine weights in the loss, in the order of the report", 0, 100
    ] = (1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.5, 1.2, 1.5)


TEST_SEED = 2  # The test set is the same whatever the seed of the run.
PREDICTION_BATCH = 2048  # Rows in one step where nothing is learned; it affects speed alone.


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    Else glibc returns the memory of each training step to the kernel and asks for it again in the
    next one, which takes a third of the time of an epoch.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-2, 2**28)  # M_TOP_PAD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


# --- dataset and split ----------------------------------------------------------------------------


def split_dataset(dataset: Dataset, val_fraction: float = 0.15, seed: int = 42) -> tuple:
    """Row numbers (training, validation), sorted: stratified by (k, m), and no code in both.

    Codes are split, not rows: all rows of a code, whatever their m, go with it, and the (k, m) of
    its first row is what it is stratified by. Raises InputError when a (k, m) group would have no
    row in one of the two sets.
    """
    _, first, code = np.unique(dataset.key, return_index=True, return_inverse=True)
    # The sign only keeps the split on which the rows of baselines.csv stand.
    numbers, strata = np.arange(len(first)), -dataset.group[first]
    try:
        held_out = train_test_split(
            numbers, test_size=val_fraction, random_state=seed, stratify=strata
        )[1]
        in_val = np.isin(code, held_out)
        for i, (k, m) in enumerate(GROUPS):
            if len(np.unique(in_val[dataset.group == i])) < 2:
                raise ValueError(f"({k}, {m}) has too few")
    except ValueError as error:
        problem = f"cannot hold out {val_fraction:.0%} of the codes of each (k, m) group"
        raise InputError(f"{dataset.about['file']}: {problem}: {one_line(error)}") from None
    return np.flatnonzero(~in_val), np.flatnonzero(in_val)


def make_sets(dataset: Dataset, settings: Settings) -> dict[str, Dataset]:
    """The training, validation and test set. No code, whatever its m, is in two of them.

    The dataset is split into the first two. The training set is then extended by extra codes, the
    same number for each group. They and the test set are new codes, made as the dataset was, with
    exact heights. Codes are told apart by their keys (data/heights.py): equivalent codes have the
    same. Raises RuntimeError if a code is in two sets.
    """
    train_rows, val_rows = split_dataset(dataset, settings.val_fraction, settings.seed)
    train_set, val_set = dataset.take(train_rows), dataset.take(val_rows)
    test_set = make_dataset(settings.test_codes, TEST_SEED, known=dataset.key)
    if extra_per_group := settings.extra_codes * len(train_set) // len(OPEN_GROUPS):
        known = np.concatenate([dataset.key, test_set.key])
        train_set = train_set.extended(make_extra_codes(extra_per_group, settings.seed, known))
    sets = {"training": train_set, "validation": val_set, "test": test_set}
    for one, other in combinations(sets, 2):
        if shared := len(np.intersect1d(sets[one].key, sets[other].key)):
            raise RuntimeError(f"{shared} codes are in the {one} set and in the {other} set")
    return sets


# --- features -------------------------------------------------------------------------------------


def feature_model(features: str) -> keras.Model:
    """From n, k, m, (batch, 1), and P_matrix, (batch, 20), to the features, float32."""
    n, k, m = (layers.Input((1,), name=name, dtype="int32") for name in ("n", "k", "m"))
    P = layers.Input((P_WIDTH,), name="P_matrix", dtype="float64")
    basis = features == "basis"
    output = BasisFeatures()(k, m, P) if basis else layers.Rescaling(1.0, dtype="float32")(P)
    return keras.Model([n, k, m, P], output)


def predict_all(model: keras.Model, codes: Dataset | Codes) -> np.ndarray:
    """What feature_model or height_model give for these codes, float32 (rows, outputs).

    By batches, since Model.predict can wait for two seconds at its end.
    """
    inputs = [np.full((len(codes.k), 1), N), codes.k[:, None], codes.m[:, None], codes.P]
    steps = range(0, len(codes.k), PREDICTION_BATCH)
    parts = [[x[start : start + PREDICTION_BATCH] for x in inputs] for start in steps]
    return np.concatenate([model.predict_on_batch(part) for part in parts])


# --- without a network ----------------------------------------------------------------------------


def simple_predictions(train_set: Dataset, data: Dataset, features: str) -> pd.DataFrame:
    """log2 heights of the rows of `data` without a network, a column for each way, float64.

    mean: of the group's training rows, without low extra codes; bound: the largest bound, the first
    of the basis features; ridge: a regression for each group on all features. All are fitted to the
    training set alone.
    """
    table = pd.DataFrame({"mean": np.zeros(len(data))})
    if features == "basis":
        table["bound"] = data.features[:, 0].astype("float64")
    for i in range(len(GROUPS)):
        fitted, rows = train_set.group == i, data.group == i
        if not rows.any():
            continue
        x, y = train_set.features[fitted].astype("float64"), train_set.log2_height[fitted]
        ridge = make_pipeline(StandardScaler(), Ridge()).fit(x, y)
        table.loc[rows, "mean"] = y[~train_set.low[fitted]].mean()
        table.loc[rows, "ridge"] = ridge.predict(data.features[rows])
    return table


def group_errors(codes: Dataset | Codes, log2_height: np.ndarray, predicted: pd.DataFrame):
    """By k and m (index): the log2-MSE of each column of `predicted`, log2 heights, and n."""
    squares = predicted.sub(log2_height, axis=0) ** 2
    groups = squares.groupby([pd.Index(codes.k, name="k"), pd.Index(codes.m, name="m")])
    return groups.mean().assign(n=groups.size())


# --- network --------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("m_height")
class HashDropout(layers.Dropout):
    """Keras' Dropout for inputs of shape (batch, width), made for XLA.

    Each random number is a hash of its place, the layer's seed and the step, which XLA computes
    where it is needed. A step takes a quarter less time than with the stock layer.
    """

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        seed, step = ops.unstack(ops.cast(self.seed_generator.next(), "uint32"))
        rows, columns = (ops.arange(size, dtype="int32") for size in ops.shape(inputs))
        position = ops.cast(rows[:, None] * inputs.shape[1] + columns, "uint32")
        number = self.mix(position + self.mix(seed + self.mix(step)))
        return ops.where(number >= np.uint32(self.rate * 2**32), inputs / (1 - self.rate), 0.0)

    @staticmethod
    def mix(x):
        """A bijective hash of 32-bit integers: lowbias32 of C. Wellons."""
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ops.bitwise_xor(x, ops.right_shift(x, np.uint32(shift))) * np.uint32(factor)
        return ops.bitwise_xor(x, ops.right_shift(x, np.uint32(16)))


@keras.saving.register_keras_serializable("m_height")
class ClippedNormalization(layers.Normalization):
    """Scales to mean 0 and variance 1, and clips at 8 standard deviations."""

    def call(self, inputs):
        return ops.clip(super().call(inputs), -8.0, 8.0)


@keras.saving.register_keras_serializable("m_height")
class FirstFeature(layers.Layer):
    """The first column, (batch, 1), of the features, (batch, width)."""

    def call(self, inputs):
        return inputs[:, :1]


@keras.saving.register_keras_serializable("m_height")
class InfiniteFrom(layers.Layer):
    """Heights, (batch, 1), but inf where m, (batch, 1), is the minimum distance or more."""

    def call(self, height, m, distance):
        return ops.where(ops.cast(m, distance.dtype) >= distance, np.inf, height)


def dense_block(x, units: float, dropout: float = 0.0):
    """Dense with gelu, LayerNorm, Dropout."""
    x = layers.Dense(max(4, round(units)), activation="gelu")(x)
    x = layers.LayerNormalization()(x)
    return HashDropout(dropout)(x) if dropout else x


def residual_block(x, units: float, dropout: float):
    """Two dense blocks and the skip connection around them."""
    return layers.Add()([dense_block(dense_block(x, units, dropout), units), x])


def build_network(features: np.ndarray, settings: Settings) -> keras.Model:
    """The Run 5 network: from n, k, m, (batch, 1), and features to log2 heights, (batch, 1).

    features: those of the training set, (rows, width), by whose mean and variance they are scaled.
    The first basis feature, a lower bound of the log2 height, is added to the softplus.
    """
    width, dropout = settings.width, settings.dropout
    n, k, m = (layers.Input((1,), name=name, dtype="int32") for name in ("n", "k", "m"))
    inputs = [n, k, m, layers.Input((features.shape[1],), name="features")]
    k_embed = layers.Flatten()(layers.Embedding(7, 32, name="k_embedding")(k))
    m_embed = layers.Flatten()(layers.Embedding(6, 32, name="m_embedding")(m))

    mean, variance = features.mean(axis=0, dtype="float64"), features.var(axis=0, dtype="float64")
    scaled = ClippedNormalization(mean=mean, variance=variance, name="scale")(inputs[3])
    P_processed = dense_block(scaled, 256 * width, 0.3 * dropout)
    P_processed = dense_block(P_processed, 512 * width, 0.2 * dropout)

    x = layers.Concatenate()([n, k_embed, m_embed, P_processed])
    x = dense_block(x, 1024 * width, 0.3 * dropout)
    x = residual_block(x, 1024 * width, 0.2 * dropout)
    x = residual_block(x, 1024 * width, 0.2 * dropout)
    x = dense_block(x, 512 * width, 0.2 * dropout)
    x = dense_block(x, 256 * width, 0.1 * dropout)
    x = dense_block(x, 128 * width, 0.1 * dropout)
    x = layers.Dense(1, activation="softplus")(x)
    if settings.features == "basis":
        x = layers.Add()([x, FirstFeature()(inputs[3])])
    return keras.Model(inputs, x, name="log2_height")


def height_model(network: keras.Model, features: str) -> keras.Model:
    """The model that is saved: inputs as feature_model has them, output heights, (batch, 1).

    Where a height is infinite by definition, the model says so whatever the network says.
    """
    front = feature_model(features)
    n, k, m, P = front.inputs
    log_height = layers.Rescaling(math.log(2))(network([n, k, m, front.output]))
    height = layers.Activation("exponential")(log_height)
    output = InfiniteFrom()(height, m, MinimumDistance()(k, m, P))
    return keras.Model(front.inputs, output, name="run5")


def load_trained(path: Path) -> keras.Model:
    """A height_model from its file. Raises InputError for another kind of file."""
    try:
        model = keras.models.load_model(path)
        names = [x.name for x in model.inputs]
    except Exception as error:  # Keras and h5py raise many kinds.
        raise InputError(f"{path}: cannot be loaded as a model: {one_line(error)}") from None
    if names != ["n", "k", "m", "P_matrix"]:
        raise InputError(f"{path}: takes {', '.join(names)}, expected n, k, m, P_matrix")
    return model


# --- training -------------------------------------------------------------------------------------


def lr_schedule(epoch: int, lr: float, constant_epochs: int, decay: float) -> float:
    """The current learning rate, times `decay` from epoch `constant_epochs` (from 0) on."""
    return lr if epoch < constant_epochs else lr * decay


def network_inputs(dataset: Dataset, rows=slice(None)) -> dict[str, np.ndarray]:
    """What the network takes for these rows: n, k, m of shape (rows, 1), features (rows, width)."""
    k, m = dataset.k[rows, None], dataset.m[rows, None]
    return {"n": np.full_like(k, N), "k": k, "m": m, "features": dataset.features[rows]}


class Batches(keras.utils.PyDataset):
    """(inputs, log2 heights, sample weights) of each step of an epoch.

    An epoch has as many rows as the training set without extra codes. They are sampled anew for
    each epoch, evenly from the whole training set, none twice. The sample and its order follow
    from the seed and the number of the epoch alone, so that a resumed run has the same.
    """

    def __init__(self, train_set: Dataset, rows_per_epoch: int, settings: Settings) -> None:
        super().__init__()
        self.train_set, self.rows_per_epoch, self.settings = train_set, rows_per_epoch, settings
        self.group_weights = np.array(settings.group_weights, dtype=np.float32)
        self.start_epoch(0)  # Keras looks at the first batch before training.

    def start_epoch(self, epoch: int, logs: dict | None = None) -> None:
        """Sample the rows of this epoch, from 0."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        self.order = rng.permutation(len(self.train_set))[: self.rows_per_epoch]

    def __len__(self) -> int:
        return math.ceil(self.rows_per_epoch / self.settings.batch_size)

    def __getitem__(self, step: int) -> tuple:
        start = step * self.settings.batch_size
        rows = self.order[start : start + self.settings.batch_size]
        weights = self.group_weights[self.train_set.group[rows]]
        return network_inputs(self.train_set, rows), self.train_set.log2_height[rows, None], weights


class Checkpoint(callbacks.Callback):
    """Writes one file after each epoch, from which a run resumes: the design's ModelCheckpoint.

    The file holds the run's settings, the history, the seconds spent, whether early stopping ended
    the run, all variables of network and optimizer, and the weights of the epoch with the lowest
    val_loss. The state of EarlyStopping and ReduceLROnPlateau follows from the history, which is
    replayed to them; rows and order of an epoch follow from the seed. Raises InputError for a
    damaged file and for one of a run with other settings.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        super().__init__()
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.history, self.seconds, self.stopped, self.best_weights = [], 0.0, False, []
        if not path.exists():
            return
        try:
            with np.load(path) as file:
                earlier, self.history, self.seconds, self.stopped = json.loads(str(file["state"]))
                self.values = [file[x] for x in file.files if x.startswith("variable")]
                self.best_weights = [file[x] for x in file.files if x.startswith("best")]
        except Exception as error:  # NumPy and zipfile raise many kinds.
            problem = f"cannot be read, --fresh drops it: {one_line(error)}"
            raise InputError(f"{path}: {problem}") from None
        if differ := [x for x, now in self.settings.items() if earlier.get(x) != now]:
            pairs = ", ".join(f"{x} {earlier.get(x)}, now {self.settings[x]}" for x in differ)
            raise InputError(f"{path}: is of a run with {pairs}; --fresh drops it")

    def variables(self) -> list:
        return [*self.model.variables, *self.model.optimizer.variables]

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.history:
            return
        if [x.shape for x in self.variables()] != [x.shape for x in self.values]:
            raise InputError(f"{self.path}: is of another network; --fresh drops it")
        for epoch, row in enumerate(self.history):
            for callback in (self.plateau, self.stopping):
                self.model.optimizer.learning_rate = row["learning_rate"]
                callback.on_epoch_end(epoch, dict(row))
        for variable, value in zip(self.variables(), self.values, strict=True):
            variable.assign(value)
        print(f"{self.path}: resuming after {len(self.history)} epochs", flush=True)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = {name: float(value) for name, value in logs.items()}
        if not np.isfinite([*row.values()]).all():
            problem = f"the loss became NaN or infinite in epoch {epoch + 1}"
            raise InputError(f"{problem}; a lower --learning-rate with --fresh may help")
        self.history.append(row)
        self.seconds += time.perf_counter() - self.start
        self.stopped = bool(self.model.stop_training)
        if best_epoch(self.history) == epoch + 1:
            self.best_weights = self.model.get_weights()
        state = json.dumps([self.settings, self.history, self.seconds, self.stopped])
        arrays = {f"variable_{i}": ops.convert_to_numpy(x) for i, x in enumerate(self.variables())}
        arrays |= {f"best_{i}": x for i, x in enumerate(self.best_weights)}
        content = io.BytesIO()  # On a full disk NumPy's writer prints tracebacks.
        np.savez(content, state=np.array(state), **arrays)
        with replacing(self.path) as temporary:
            temporary.write_bytes(content.getbuffer())

        left = min(self.stopping.patience - self.stopping.wait, self.params["epochs"] - epoch - 1)
        duration = timedelta(seconds=round(left * self.seconds / (epoch + 1)))
        losses = f"loss {row['loss']:.4f}, val_loss {row['val_loss']:.4f}"
        end = f"ends in {left} epochs ({duration}) if val_loss does not improve"
        print(f"epoch {epoch + 1}: {losses}; {end}", flush=True)


def best_epoch(history: list[dict]) -> int:
    """The epoch, from 1, with the lowest val_loss."""
    return 1 + int(np.argmin([row["val_loss"] for row in history]))


def why_ended(checkpoint: Checkpoint, settings: Settings) -> str:
    """Why a run has ended, in words."""
    if not checkpoint.stopped:
        return f"ended by --epochs {len(checkpoint.history)}"
    patience, least = settings.stop_patience, settings.stop_min_delta
    since = len(checkpoint.history) - patience
    return f"ended: val_loss fell by less than {least} in {patience} epochs after epoch {since}"


def commit() -> str:
    """The commit of this repository, "-dirty" where files were changed, or "unknown"."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def optimizer_and_callbacks(s: Settings) -> tuple:
    """The design's AdamW; then its LearningRateScheduler, ReduceLROnPlateau and EarlyStopping."""
    optimizer = keras.optimizers.AdamW(
        s.learning_rate, weight_decay=s.weight_decay, clipnorm=s.clipnorm
    )
    schedule = partial(lr_schedule, constant_epochs=s.constant_epochs, decay=s.decay)
    return optimizer, [
        callbacks.LearningRateScheduler(schedule),
        callbacks.ReduceLROnPlateau("val_loss", s.plateau_factor, s.plateau_patience),
        callbacks.EarlyStopping("val_loss", s.stop_min_delta, s.stop_patience),
    ]


def train(network, optimizer, design_callbacks, batches, val_set, checkpoint) -> None:
    """Start or resume training; at its end the network has the weights of the best epoch.

    optimizer, design_callbacks: what optimizer_and_callbacks returns.
    """
    # On a GPU XLA is not deterministic.
    network.compile(optimizer, "mean_squared_error", jit_compile=not GPUS)
    optimizer.build(network.trainable_variables)
    _, checkpoint.plateau, checkpoint.stopping = design_callbacks  # They run before it in fit.
    sample = callbacks.LambdaCallback(on_epoch_begin=batches.start_epoch)
    if not checkpoint.stopped and len(checkpoint.history) < batches.settings.epochs:
        network.fit(
            batches,
            initial_epoch=len(checkpoint.history),
            epochs=batches.settings.epochs,
            validation_data=(network_inputs(val_set), val_set.log2_height[:, None]),
            validation_batch_size=PREDICTION_BATCH,
            callbacks=[sample, *design_callbacks, checkpoint],
            shuffle=False,
            verbose=0,
        )
    network.set_weights(checkpoint.best_weights)


# --- report ---------------------------------------------------------------------------------------

TIERS = {
    "easy": [(4, 2), (4, 3), (5, 2)],
    "medium": [(4, 4), (5, 3), (6, 2)],
    "hard": [(4, 5), (5, 4), (6, 3)],  # m = n - k: there the largest bound is the m-height.
    "six": [(4, 2), (4, 3), (4, 4), (5, 2), (5, 3), (6, 2)],  # All but the hard ones.
    "all": list(GROUPS),
}
TARGETS = {"easy": 0.15, "medium": 0.30, "hard": 1.20, "all": 0.35}  # The design's.
SAME_SETS = ("test_codes", "val_fraction")  # With the same dataset, test errors compare.

REPORT = """\
Run 5: the m-height of linear codes of length 9, predicted in log2 from n, k, m and P
{changed}log2-MSE on {sets[test]:,} new codes; six: groups with m < n-k (else the bound is exact)
{headline}
{targets}

{design}{by_group}

{trainings}

{validation}

log2-MSE   mean of (log2 predicted - log2 true)^2 in a group; for several groups, the mean of these
factor     typical factor, 2^sqrt(log2-MSE), of a prediction to the true height or the reverse
mean       predicting the group's mean log2 height in training, without the low extra codes
raw P      Run 5 on the entries of P, the design's input, no extra codes; mean over the seeds
bound      each basis (information set) bounds the m-height from below; the largest bound
ridge      a regression for each group on the network's features, fitted to the training set
in 5%      codes within 5 %; 95%, max: factor within which 95 % or all are; bias: mean, in log2
test set   {settings[test_codes]:,} new codes a group; low codes: a tenth made to have small heights
tiers      easy (4,2) (4,3) (5,2), medium (4,4) (5,3) (6,2); six: both; hard (4,5) (5,4) (6,3)

Departures from the design: 252 features of the code's bases, clipped at 8 standard deviations, in
place of P, and the largest bound added at the output (not with --features raw); codes are split,
not rows; a test set; {extra_codes:,} rows of extra codes, an epoch samples {rows_per_epoch:,} rows;
min_delta {settings[stop_min_delta]} for early stopping; {parameters:,} parameters, not 3-4 million
run       {epochs_run} epochs, {ended}
sets      training {sets[training]:,} rows, validation {sets[validation]:,}, test {sets[test]:,}; \
seed {settings[seed]}; best epoch {best_epoch}
dataset   {dataset[file]}, {dataset[rows]:,} rows, {dataset[duplicates]:,} of them duplicates
heights   {dataset[labels]}; {dataset[infinite]:,} infinite left out, \
{dataset[suspect]:,} finite by rounding
machine   {machine}; {seconds:.0f} s, {finished}
versions  {packages}, commit {commit}
"""
DESIGN = """\
Run 2 and Run 4 as published, on another dataset, where most validation codes were in training too:
not what they reach on new codes ("trained here"). Run 5: n validation rows; vs: Run 5 / other - 1.
{}

"""


def read_baselines(path: Path = BASELINES) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published log2-MSE of Run 2 and Run 4 (columns) by k and m (index), and the rows that
    data/rerun_baselines.py has written. Raises InputError if a published figure is missing."""
    try:
        rows = pd.read_csv(path)
        by_group = rows[rows["source"] == "published"].set_index(["run", "k", "m"])["log2_mse"]
        published = by_group.astype(float).unstack("run").loc[list(GROUPS), ["Run 2", "Run 4"]]
    except (OSError, ValueError, KeyError) as error:
        expected = "expected published figures of Run 2 and Run 4"
        raise InputError(f"{path}: {expected} ({one_line(error)})") from None
    return published, rows[rows["source"] == "measured"].astype({"seed": int})


def rows_to_compare(rows: pd.DataFrame, results: dict) -> pd.DataFrame:
    """Those rows of read_baselines that have the dataset and the test set of a run."""
    same = [rows["dataset"] == results["dataset"]["sha256"]]
    same += [rows[x] == results["settings"][x] for x in SAME_SETS]
    return rows[np.all(same, axis=0)]


def with_means(errors: pd.DataFrame) -> pd.DataFrame:
    """The errors by group, named "k,m", then the means of the tiers. errors: by k, m."""
    means = pd.DataFrame({tier: errors.loc[groups].mean() for tier, groups in TIERS.items()}).T
    return pd.concat([errors.set_axis([f"{k},{m}" for k, m in errors.index]), means])


def error_statistics(error: np.ndarray) -> dict[str, float]:
    """What log2 errors, predicted - true, mean for the user: see the end of REPORT."""
    size = np.abs(error)
    return {
        "factor": 2 ** np.sqrt(np.mean(error**2)),
        "in 5%": np.mean(np.abs(2**error - 1) <= 0.05),
        "95%": 2 ** np.quantile(size, 0.95),
        "max": 2 ** size.max(),
        "bias": error.mean(),
    }


def group_table(test: pd.DataFrame, low: pd.DataFrame, statistics: dict) -> str:
    """Errors by group. test, low: of with_means; statistics: of error_statistics."""
    ways = [x for x in ("mean", "raw P", "bound", "ridge", "Run 5") if x in test]
    of_run = pd.DataFrame(statistics).T.drop(columns="factor")
    columns = {("log2-MSE", x): test[x] for x in ways}
    columns |= {("factor", x): 2 ** np.sqrt(test[x]) for x in ways[-3:]}
    columns |= {("Run 5", x): of_run[x] for x in of_run}
    columns |= {("low codes", x): low[x] for x in ways[-2:]}
    table = pd.DataFrame(columns).loc[[*test.index[: len(GROUPS)], "six", "all"]]
    formats = {"in 5%": "{:.0%}", "95%": "{:.2f}", "max": "{:.2f}", "bias": "{:+.3f}"}
    formats = [("{:.2f}" if x == "factor" else formats.get(y, "{:.4f}")).format for x, y in table]
    table.columns = table.columns.set_names(["test", "k,m"])
    return table.to_string(formatters=formats)


def trainings_table(rows: pd.DataFrame, this: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Test errors of each training in the rows of rows_to_compare, then those of this run."""
    own = this.reset_index().assign(run="this run", seed=seed, test_log2_mse=this["Run 5"].values)
    table = {}
    for name, part in pd.concat([rows, own]).groupby("run", sort=False):
        by_seed = part.pivot(index=["k", "m"], columns="seed", values="test_log2_mse")
        means = with_means(by_seed).loc[[*TIERS]]
        table[name] = {"seeds": " ".join(map(str, by_seed))} | means.mean(axis=1).to_dict()
        least, most = means.loc["all"].min(), means.loc["all"].max()
        table[name]["range of all"] = f"{least:.4f}-{most:.4f}" if most > least else ""
    return pd.DataFrame(table).T


def changed_settings(results: dict) -> str:
    """A sentence on the settings of a run that are not the default, and a line break; or ""."""
    defaults = json.loads(json.dumps(asdict(Settings()) | {"data": DATA.name}, default=str))
    own = results["settings"] | {"data": results["dataset"]["file"]}
    changed = ", ".join(f"{x} {own[x]}" for x in own if own[x] != defaults[x])
    text = f"Settings that are not the default: {changed}"
    return textwrap.fill(text, 100) + "\n" if changed else ""


def headline_table(test: pd.DataFrame, low: pd.DataFrame) -> pd.DataFrame:
    """Each way to predict, from the best to the worst. test, low: errors of with_means."""
    table = {"typical factor, six": 2 ** np.sqrt(test.loc["six"]), "six": test.loc["six"]}
    table |= {"all nine": test.loc["all"], "low codes, six": low.loc["six"]}
    return pd.DataFrame(table).drop("n").sort_values("six")


def design_table(published: pd.DataFrame, validation: pd.DataFrame) -> str:
    """The table that the design asks for. published: of read_baselines; validation: by k, m."""
    table = with_means(published.assign(**{"Run 5": validation["Run 5"]})).drop("six")
    for short, other in (("vs R2", "Run 2"), ("vs R4", "Run 4")):
        table[short] = (table["Run 5"] / table[other] - 1).map("{:+.1%}".format)
    rows = validation["n"]
    table["n"] = [*rows, *(rows.loc[TIERS[x]].sum() for x in table.index[len(rows) :])]
    return table.rename_axis(columns="k,m").to_string(float_format="{:.6f}".format)


def targets_met(test: pd.DataFrame) -> str:
    """The design's targets, and which of them Run 5 and ridge miss. test: of with_means."""
    targets = ", ".join(f"{x} {limit:.2f}" for x, limit in TARGETS.items())
    for way in ("Run 5", "ridge"):
        missed = [tier for tier, limit in TARGETS.items() if not test[way][tier] < limit]
        targets += f"; {way} misses {', '.join(missed) or 'none'}"
    return textwrap.fill(f"Design targets: {targets}", 100)


def write_report(results: dict, folder: Path, baselines: Path = BASELINES) -> str:
    """Write detailed_comparison.txt to a folder; returns the report.

    results: as in metrics.json. baselines: as data/baselines.csv.
    """
    published, rows = read_baselines(baselines)
    rows = rows_to_compare(rows, results)
    tables = {x: pd.DataFrame(t).set_index(["k", "m"]) for x, t in results["errors"].items()}
    tables = {x: table.rename(columns={"run5": "Run 5"}) for x, table in tables.items()}
    names = ("validation", "test", "low codes")
    validation, test, low = (with_means(tables[name]) for name in names)
    raw = rows[rows["run"] == "Run 5 on raw P"].groupby(["k", "m"])[["test_log2_mse"]].mean()
    if len(raw) and results["settings"]["features"] == "basis":  # Else this run is one on raw P.
        test["raw P"] = with_means(raw)["test_log2_mse"]
    design, targets = "", "Design targets: none for this dataset, split or test set"
    if validation["n"].min() >= 100:  # Below, percentages would say nothing.
        design = DESIGN.format(design_table(published, tables["validation"]))
    if len(rows):
        targets = targets_met(test)
    trainings = trainings_table(rows, tables["test"], results["settings"]["seed"])
    validation = validation.loc[[*TIERS], ["ridge", "Run 5"]].T.rename_axis(columns="validation")
    decimals = {"float_format": "{:.4f}".format, "na_rep": "-"}
    text = {
        "changed": changed_settings(results),
        "headline": headline_table(test, low).to_string(**decimals),
        "targets": targets,
        "design": design,
        "by_group": group_table(test, low, results["test_statistics"]),
        "trainings": trainings.rename_axis(columns="trained here, test set").to_string(**decimals),
        "validation": validation.to_string(**decimals),
        "packages": ", ".join(f"{x} {number}" for x, number in results["versions"].items()),
    }
    report = REPORT.format(**results | results["times"] | text)
    with replacing(folder / "detailed_comparison.txt") as path:
        path.write_text(report, encoding="utf-8")
    return report


# --- plots ----------------------------------------------------------------------------------------


def plot_history(results: dict, path: Path) -> None:
    """Loss and val_loss by epoch, with the best epoch and the ridge's error on validation rows."""
    history, best = pd.DataFrame(results["history"]), results["best_epoch"]
    history.index += 1
    figure = Figure(figsize=(9, 6), layout="constrained")
    panel, lowest = figure.subplots(), history["val_loss"][best]
    panel.plot(history["loss"], label="loss: training set, with dropout and group weights")
    panel.plot(history["val_loss"], label="val_loss: validation set, mean of the rows")
    panel.plot(best, lowest, "kv", label=f"best epoch {best}: {lowest:.4f}")
    table = pd.DataFrame(results["errors"]["validation"])
    ridge = np.average(table["ridge"], weights=table["n"])
    label = f"ridge regression, mean of the rows: {ridge:.4f}"
    panel.axhline(ridge, color="C2", linestyle="--", label=label)
    panel.set(xlabel="epoch", ylabel="MSE of log2 height", yscale="log")
    panel.set_title(f"Training {results['ended']}")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.grid(which="both", alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=120)


def plot_predictions(test_set: Dataset, predicted: np.ndarray, path: Path) -> None:
    """The error of each test row by its true log2 height, by group. predicted: log2 heights."""
    true, error = test_set.log2_height, predicted - test_set.log2_height
    figure = Figure(figsize=(12, 10), layout="constrained")
    groups = [(k, m) for tier in ("easy", "medium", "hard") for k, m in TIERS[tier]]
    panels = figure.subplots(3, 3, sharex=True, sharey=True)
    for panel, (k, m) in zip(panels.flat, groups, strict=True):
        group = test_set.group == GROUPS.index((k, m))
        panel.axhline(0, color="black", linewidth=0.8)
        for name, low, color in (("random codes", False, "C0"), ("low codes", True, "C3")):
            rows = group & (test_set.low == low)
            panel.scatter(true[rows], error[rows], 6, color, alpha=0.4, linewidths=0, label=name)
        figures = error_statistics(error[group])
        within = f"95 % within a factor of {figures['95%']:.2f}, bias {figures['bias']:+.3f}"
        panel.set_title(f"k={k}, m={m}: {within}", fontsize="small")
        panel.grid(alpha=0.3)
    panel.legend(markerscale=3)
    figure.supxlabel("true log2 height")
    figure.supylabel("predicted - true log2 height")
    rows = "in the rows: easy, medium, hard groups"
    figure.suptitle(f"Run 5 on the {len(test_set):,} codes of the test set; {rows}")
    figure.savefig(path, dpi=120)


def plot_comparison(results: dict, path: Path, baselines: Path = BASELINES) -> None:
    """Left: the test error of each way to predict, in the six groups where the bound is not the
    height. Right: Run 2 and Run 4 as published, and trained on this dataset."""
    published, rows = read_baselines(baselines)
    rows = rows_to_compare(rows, results)
    runs = rows.pivot(index=["k", "m"], columns=["run", "seed"], values="test_log2_mse")
    names = {"mean": "mean of the group", "raw": "Run 5 on raw P", "bound": "lower bound"}
    names |= {"ridge": "ridge regression", "run5": "Run 5"}
    errors = pd.DataFrame(results["errors"]["test"]).set_index(["k", "m"]).rename(columns=names)
    if "Run 5 on raw P" in runs:
        errors["Run 5 on raw P"] = runs["Run 5 on raw P"].mean(axis=1)
    errors = errors.loc[TIERS["six"], [x for x in names.values() if x in errors]]

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    errors.reset_index(drop=True).plot(ax=left, style="o")
    for name in ("Run 5 on raw P", "Run 5"):
        if name in runs:
            left.plot(runs[name].loc[TIERS["six"]].to_numpy(), "k.", markersize=3)
    left.set_xticks(range(len(TIERS["six"])), [f"k={k}, m={m}" for k, m in TIERS["six"]])
    left.set_yscale("log", base=2)
    left.yaxis.set_major_locator(LogLocator(2, numticks=20))
    left.yaxis.set_major_formatter("{x:.3g}")
    left.set_ylabel("log2-MSE, test set (each line doubles it)")
    left.set_xlabel("Black dots: single seeds. For m = n - k the lower bound is the height.")
    factors = (2 ** np.sqrt(errors.mean())).map("{:.2f}".format)
    others = ", ".join(f"{x} {factors[x]}" for x in reversed(errors.columns[:-1]))
    title = f"Run 5 is typically off by a factor of {factors['Run 5']},\n{others}"
    left.set_title(title, fontsize="medium")
    left.margins(y=0.2)
    left.legend(loc="lower center", ncols=3)

    here = {run: runs[run].mean(axis=1) for run in published if run in runs}
    here = pd.DataFrame(here, index=published.index)
    bars = published.add_suffix(", published").join(here.add_suffix(", here"))
    bars = with_means(bars).loc[["easy", "medium", "hard", "all"]]
    bars.plot.bar(ax=right, rot=0, color=["lightblue", "moccasin", "C0", "C1"])
    times = " and ".join(f"{here[run].mean() / published[run].mean():.1f}" for run in here)
    claim = f"trained here, have on new codes\n{times} times the published mean error"
    right.set_title(f"Run 2 and Run 4, {claim if times else 'as published'}", fontsize="medium")
    right.set_ylabel("log2-MSE")
    for panel in (left, right):
        panel.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


# --- prediction -----------------------------------------------------------------------------------


def predict(
    inputs: Path, heights_file: Path | None, labels: str, model: Path, output: Path | None
) -> None:
    """Write a model's heights for the codes of a file, in their order, to a file in `output`, or
    beside `inputs`.

    heights_file: true heights, to print the error of each group, or None. labels: see true_heights.
    Raises InputError for files that cannot be used.
    """
    inputs = files.in_folder(inputs, files.CODES_FILE)
    codes, output = files.read_codes(inputs), output or inputs.parent
    if heights_file:
        true, origin = files.true_heights(codes, heights_file, labels)
    predicted = predict_all(load_trained(model), codes)[:, 0].astype(float)
    output.mkdir(parents=True, exist_ok=True)
    suffix = ".csv" if inputs.suffix == ".npz" else ".pkl"
    written = output / f"{inputs.stem}_predicted{suffix}"
    files.write_heights(written, codes, predicted)
    print(f"{written}: {len(predicted):,} heights")
    if infinite := np.flatnonzero(np.isinf(predicted)).tolist():
        why = "by definition or beyond float32"
        print(f"{len(infinite):,} of them infinite, {why}: rows {one_line(infinite)}")
    files.warn_of_suspects(inputs, codes)
    if heights_file:
        finite = np.isfinite(true)
        bound = predict_all(feature_model("basis"), codes)[:, 0]
        both = pd.DataFrame({"log2_mse": np.log2(predicted), "bound_log2_mse": bound})[finite]
        part = Codes(*(x[finite] for x in codes))
        errors = group_errors(part, np.log2(true[finite]), both)
        print(errors.to_string(float_format="{:.6f}".format))
        print("means of the groups:", errors[[*both]].mean().round(6).to_dict())
        print(f"heights {origin}; {(~finite).sum():,} rows of infinite height left out")


load_once = lru_cache(load_trained)  # So that inference reads a model once.


def inference(n: int, k: int, m: int, p_list: Iterable, model: Path = TRAINED) -> list[float]:
    """The m-heights that a trained model predicts, called as the course's evaluator calls it.

    p_list: matrices P, arrays or nested lists of shape (k, n - k). A height is inf where it is so
    by definition. Raises InputError, a ValueError, where n, k, m are none of the trained groups or
    a matrix has another shape or is not finite.
    """
    rows = [[n, k, m, P] for P in p_list]
    if not rows:
        return []
    codes = files.codes_from_rows("p_list", rows)
    files.warn_of_suspects("p_list", codes)
    return predict_all(load_once(model), codes)[:, 0].tolist()


# --- main -----------------------------------------------------------------------------------------


def evaluate(model: keras.Model, sets: dict[str, Dataset], features: str) -> tuple:
    """Errors of every way to predict, as group_errors has them, on the validation set, the test set
    and its low codes. Then the log2 heights that `model` predicts for the test set, (rows,).

    Called once, at the end of a run: until then the test set is not predicted.
    """
    ways = {}
    for name in ("validation", "test"):
        simple = simple_predictions(sets["training"], sets[name], features)
        heights_of_model = predict_all(model, sets[name])[:, 0].astype(float)
        ways[name] = simple.assign(run5=np.log2(heights_of_model))
    errors = {x: group_errors(sets[x], sets[x].log2_height, ways[x]) for x in ways}
    low = sets["test"].take(sets["test"].low)
    errors["low codes"] = group_errors(low, low.log2_height, ways["test"][sets["test"].low])
    return errors, ways["test"]["run5"].to_numpy()


def run(settings: Settings, fresh: bool = False, labels: str = "check") -> None:
    """Load, split, train, report. fresh: drop an unfinished run. labels: see true_heights."""
    dataset = load_dataset(*settings.data, labels=labels)
    read_baselines()  # So that a damaged file is found before training.
    work = settings.output / "unfinished"
    work.mkdir(parents=True, exist_ok=True)
    if fresh:
        (work / "checkpoint.npz").unlink(missing_ok=True)
    identity = asdict(settings) | {"data": dataset.about["sha256"]}
    del identity["output"], identity["epochs"]  # They may differ when a run is resumed.
    checkpoint = Checkpoint(work / "checkpoint.npz", identity)
    if not checkpoint.history and (settings.output / "metrics.json").exists():
        print(f"{settings.output}: has a finished run, which this new one will replace at its end")

    sets = make_sets(dataset, settings)
    counts = {name: len(data) for name, data in sets.items()}
    print(pd.Series(dataset.about | counts).to_string(), "\ncomputing features", flush=True)
    front = feature_model(settings.features)
    sets = {x: replace(data, features=predict_all(front, data)) for x, data in sets.items()}

    keras.utils.set_random_seed(settings.seed)  # For initial weights and dropout.
    if GPUS:
        tf.config.experimental.enable_op_determinism()
    network = build_network(sets["training"].features, settings)
    batches = Batches(sets["training"], len(dataset) - len(sets["validation"]), settings)
    optimizer, design_callbacks = optimizer_and_callbacks(settings)
    train(network, optimizer, design_callbacks, batches, sets["validation"], checkpoint)

    model = height_model(network, settings.features)
    errors, predicted = evaluate(model, sets, settings.features)
    error, group = predicted - sets["test"].log2_height, sets["test"].group
    named = {f"{k},{m}": group == i for i, (k, m) in enumerate(GROUPS)}
    named |= {x: np.isin(group, [GROUPS.index(y) for y in TIERS[x]]) for x in TIERS}
    results = {
        "settings": checkpoint.settings | {"epochs": settings.epochs},
        "dataset": dataset.about,
        "sets": counts,
        "extra_codes": counts["training"] + counts["validation"] - len(dataset),
        "rows_per_epoch": batches.rows_per_epoch,
        "parameters": network.count_params(),
        "epochs_run": len(checkpoint.history),
        "best_epoch": best_epoch(checkpoint.history),
        "complete": checkpoint.stopped,
        "ended": why_ended(checkpoint, settings),
        "errors": {x: table.reset_index().to_dict("records") for x, table in errors.items()},
        "test_statistics": {x: error_statistics(error[rows]) for x, rows in named.items()},
        "history": checkpoint.history,
        "commit": commit(),
        "times": {"seconds": checkpoint.seconds, "finished": time.strftime("%Y-%m-%d %H:%M")},
        "versions": {x: version(x) for x in ("keras", "tensorflow", "numpy", "scikit-learn")},
        "machine": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} CPUs",
    }
    writers = {
        "best_model_run5.h5": model.save,
        "metrics.json": lambda path: path.write_text(json.dumps(results, indent=1) + "\n"),
        "training_history.png": partial(plot_history, results),
        "comparison.png": partial(plot_comparison, results),
        "predictions_scatter.png": partial(plot_predictions, sets["test"], predicted),
    }
    for name, write in writers.items():
        with replacing(settings.output / name, work) as path:
            write(path)
    print(f"\n{write_report(results, settings.output)}\nresults are in {settings.output}")
    checkpoint.path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Other files may be in it, or some that NFS keeps.
        work.rmdir()


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """The type, for argparse, of an option that takes numbers from `least` to `most`."""

    def read(text: str) -> float:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"found {text}, expected {least} to {most}")
        return value

    read.__name__ = kind.__name__  # For argparse's message about what is no number.
    return read


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """The settings, and the other options: fresh, labels, predict, heights, model."""
    example = "example: python train_model_v5.py --data codes.pkl heights.pkl --output my_run"
    about = {"description": __doc__.splitlines()[0], "epilog": example}
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", **about)
    hints = get_type_hints(Settings, include_extras=True)
    for option in fields(Settings):
        # Such as Annotated[int, "rows in one step", 1, 10**6]; a tuple stands for several values.
        kind, meaning, *limits = get_args(hints[option.name])
        several, default = get_origin(kind) is tuple, option.default
        shown = " ".join(map(str, default)) if several else default
        how = {"default": default, "help": f"{meaning} (default: {shown})"}
        if get_origin(kind) is Literal:
            how["choices"] = get_args(kind)
        else:
            kind = get_args(kind)[0] if several else kind
            how |= {"type": number(kind, *limits) if limits else kind, "metavar": kind.__name__}
        if several:
            how["nargs"] = len(default) if limits else "+"
        parser.add_argument(f"--{option.name.replace('_', '-')}", **how)
    add = parser.add_argument
    add("--fresh", action="store_true", help="drop an unfinished run and start anew")
    choices = ("check", "trust", "relabel")
    meaning = "check the file's heights, trust them, or take exact ones instead"
    add("--labels", choices=choices, default="check", help=meaning)
    add("--predict", type=Path, metavar="FILE", help="only predict heights, of the codes in FILE")
    add("--heights", type=Path, metavar="FILE", help="with --predict: true heights, to compare")
    add("--model", type=Path, metavar="FILE", help="with --predict: a model other than in run_5/")
    given = parser.parse_args(argv)
    if not given.predict and (given.heights or given.model):
        parser.error("--heights and --model: expected --predict FILE beside them")
    values = {option.name: getattr(given, option.name) for option in fields(Settings)}
    return Settings(**{x: tuple(v) if isinstance(v, list) else v for x, v in values.items()}), given


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what cannot be used or written, 130 for Ctrl-C."""
    for name in ("absl", "tensorflow"):  # They warn of the h5 format and of several models.
        logging.getLogger(name).setLevel("ERROR")
    settings, given = parse_arguments(argv)
    keep_freed_memory()
    try:
        if given.predict:
            model = given.model or TRAINED
            output = None if settings.output is Settings.output else settings.output
            predict(given.predict, given.heights, given.labels, model, output)
        else:
            run(settings, given.fresh, given.labels)
    except (InputError, OSError, MemoryError) as error:
        print(f"train_model_v5.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "train_model_v5.py: interrupted; training resumes by the same command", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
