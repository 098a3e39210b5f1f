"""Run 5: predict the m-height of a linear code G = [I_k | P], n = 9, from (n, k, m, P), in log2.

    python train_model_v5.py

trains a residual network on data/augmented.npz and writes the model, its figures, a report and
pictures to run_5/. The same command resumes a run that was killed; --dropout 0 trains without
dropout; --predict FILE predicts the heights of the codes in a file. On new codes the log2-MSE, mean
of the six (k, m) groups with m < n - k (else a bound is the height), is 0.0086, 0.0087 and 0.0089
with seeds 42, 1 and 2, one run each; ridge regression on the same features has 0.0201. A run
takes about an hour on two cores of an AMD EPYC (2.4 GHz), without a GPU.

The file is in the order in which the data flows, from settings to main(). "The design" is the
specification of Run 5. Run 2 and Run 4 are earlier networks for the same task, which comes from a
course (CSCE 636). "Low codes" are made to have small heights (data/README.md).
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
import secrets
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Else a missing GPU is logged as an error.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # Else off without AVX-512; a third faster.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # Some network file systems have no locks.
if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"  # A notebook's backend may be inherited but not installed.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out.

import keras
import numpy as np
import pandas as pd
from keras import callbacks, layers, ops
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data.dataset import (
    P_WIDTH,
    TEMPORARY,
    Codes,
    Dataset,
    InputError,
    codes_from_rows,
    exact_heights,
    load_dataset,
    one_line,
    read_codes,
    replacing,
    start_as_command,
)
from data.features import BasisFeatures, MinimumDistance
from data.heights import GROUPS, OPEN_GROUPS, N
from data.prepare import make_dataset, make_extra_codes

HERE = Path(__file__).resolve().parent
DATA, BASELINES = HERE / "data" / "augmented.npz", HERE / "data" / "baselines.csv"
RESULTS = HERE / "run_5"
TRAINED = RESULTS / "best_model_run5.h5"  # The model that predicts where none is named.


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a run depends on. The defaults are the experiment, and every field is an option.

    Annotated has the type of a number, its help text, the least and the largest value.
    """

    data: tuple[Path, ...] = (DATA,)
    output: Path = RESULTS
    features: str = "basis"  # Of the code's bases; or "raw", the entries of P.
    # Rows.
    val_fraction: Annotated[float, "share of the codes in the validation set", 0.01, 0.9] = 0.15
    test_codes: Annotated[int, "codes of each (k, m) group in the test set", 10, 10**6] = 2000
    extra_codes: Annotated[
        int, "new codes per training row, shared by groups with m < n-k", 0, 1000
    ] = 4
    # Training.
    epochs: Annotated[int, "largest number; may change on resuming", 1, 10**6] = 250
    batch_size: Annotated[int, "rows in one step of the optimizer", 1, 10**6] = 256
    seed: Annotated[int, "random seed of split, extra codes and training", 0, 2**32 - 1] = 42
    width: Annotated[float, "factor on the units of every hidden layer", 0.01, 10] = 1.0
    dropout: Annotated[float, "factor on every dropout rate, 0 for none", 0, 3] = 1.0
    learning_rate: Annotated[float, "AdamW's rate at the start", 0, 1] = 1e-3
    weight_decay: Annotated[float, "AdamW's decoupled weight decay", 0, 1] = 1e-4
    clipnorm: Annotated[float, "norm to which each gradient tensor is clipped", 1e-9, 1e9] = 1.0
    constant_epochs: Annotated[int, "epochs before the rate begins to fall", 0, 10**6] = 10
    decay: Annotated[float, "factor on the rate at the start of each later epoch", 0.01, 1] = 0.95
    plateau_factor: Annotated[float, "factor on the rate at a plateau", 0.01, 0.99] = 0.7
    plateau_patience: Annotated[int, "epochs without a fall by 1e-4: a plateau", 1, 10**6] = 15
    stop_patience: Annotated[int, "epochs without improvement that end a run", 1, 10**6] = 40
    stop_min_delta: Annotated[float, "smallest fall of val_loss that counts", 0, 100] = 0.002
    # In the loss, by (k, m) in the order of GROUPS.
    group_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.5, 1.2, 1.5)


TEST_SEED = 2  # The test set is the same whatever the seed of the run.
DATA_OPTIONS = ("val_fraction", "test_codes", "extra_codes")  # In the help beside --data.
PREDICTION_BATCH = 2048  # Rows in one step where nothing is learned; it affects speed alone.


# --- split and sets -------------------------------------------------------------------------------


def split_dataset(dataset: Dataset, val_fraction: float = 0.15, seed: int = 42) -> tuple:
    """Row numbers (training, validation), sorted: stratified by (k, m), and no code in both.

    Codes are split, not rows: all rows of a code, whatever their m, go with it, and the (k, m) of
    its first row is what it is stratified by. Raises InputError when a (k, m) group would have no
    row in one of the two sets.
    """
    _, first, code = np.unique(dataset.key, return_index=True, return_inverse=True)
    # The sign only keeps the split on which the rows of baselines.csv were measured.
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
    """The training, validation and test set, without extra codes.

    The dataset is split into the first two. The test set is made of new codes as the dataset was,
    with exact heights.
    """
    train_rows, val_rows = split_dataset(dataset, settings.val_fraction, settings.seed)
    return {
        "training": dataset.take(train_rows),
        "validation": dataset.take(val_rows),
        "test": make_dataset(settings.test_codes, TEST_SEED, known=dataset.key),
    }


def add_extra_codes(sets: dict[str, Dataset], settings: Settings) -> dict[str, Dataset]:
    """The sets, the training set extended by new codes, as many for each of the OPEN_GROUPS.

    In the other groups the largest bound is the height, and there is nothing to learn.
    """
    per_group = settings.extra_codes * len(sets["training"]) // len(OPEN_GROUPS)
    if not per_group:
        return sets
    count = per_group * len(OPEN_GROUPS)
    print(f"making {count:,} extra codes for training (--extra-codes 0 makes none)", flush=True)
    known, made = np.concatenate([data.key for data in sets.values()]), []
    for part in make_extra_codes(per_group, settings.seed, known):
        print(f"  k={part.k[0]}, m={part.m[0]}: {len(part):,} codes", flush=True)
        made.append(part)
    return sets | {"training": sets["training"].extended(*made)}


def require_disjoint(sets: dict[str, Dataset]) -> None:
    """Raise RuntimeError if a code, whatever its m, is in two of the sets.

    Codes are told apart by their keys (data/heights.py). Equivalent codes have the same key, but
    for codes with real entries in different systematic forms.
    """
    for one, other in combinations(sets, 2):
        if shared := len(np.intersect1d(sets[one].key, sets[other].key)):
            raise RuntimeError(f"{shared} codes are in the {one} set and in the {other} set")


# --- features -------------------------------------------------------------------------------------


def feature_model(kind: str) -> keras.Model:
    """From n, k, m, (batch, 1), and P_matrix, (batch, 20), to the features, float32.

    kind: "basis" for BasisFeatures, (batch, 252), or "raw" for the entries of P, (batch, 20).
    """
    n, k, m = (layers.Input((1,), name=name, dtype="int32") for name in ("n", "k", "m"))
    P = layers.Input((P_WIDTH,), name="P_matrix", dtype="float64")
    output = (
        BasisFeatures()(k, m, P) if kind == "basis" else layers.Rescaling(1.0, dtype="float32")(P)
    )
    return keras.Model([n, k, m, P], output)


def outputs_of(model: keras.Model, codes: Dataset | Codes) -> np.ndarray:
    """What a feature_model or height_model gives for these codes, float32 (rows, outputs).

    By batches, since Model.predict can wait for two seconds at its end.
    """
    inputs = [np.full((len(codes.k), 1), N), codes.k[:, None], codes.m[:, None], codes.P]
    outputs = np.empty((len(codes.k), model.output.shape[1]), dtype=np.float32)
    for start in range(0, len(outputs), PREDICTION_BATCH):
        part = slice(start, start + PREDICTION_BATCH)
        outputs[part] = model.predict_on_batch([x[part] for x in inputs])
    return outputs


# --- without a network ----------------------------------------------------------------------------


def simple_predictions(train_set: Dataset, data: Dataset, kind: str) -> pd.DataFrame:
    """log2 heights of the rows of `data` without a network, a column for each way, float64.

    mean: of the group's training rows, without low extra codes; bound: the largest bound, the first
    of the basis features; ridge: a regression for each group on all features. All are fitted to the
    training set alone. Both sets have rows of every group. kind: as in feature_model.
    """
    table = pd.DataFrame({"mean": np.zeros(len(data))})
    if kind == "basis":
        table["bound"] = data.features[:, 0].astype("float64")
    for i in range(len(GROUPS)):
        fitted, rows = train_set.group == i, data.group == i
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


def height_model(network: keras.Model, kind: str) -> keras.Model:
    """The model that is saved: inputs as feature_model has them, output heights, (batch, 1).

    Where a height is infinite by definition, the model says so whatever the network says.
    """
    to_features = feature_model(kind)
    n, k, m, P = to_features.inputs
    log_height = layers.Rescaling(math.log(2))(network([n, k, m, to_features.output]))
    height = layers.Activation("exponential")(log_height)
    output = InfiniteFrom()(height, m, MinimumDistance()(k, m, P))
    return keras.Model(to_features.inputs, output, name="run5")


def load_trained(path: Path) -> keras.Model:
    """A height_model from its file. Raises InputError for another kind of file."""
    try:
        model = keras.models.load_model(path)
        found, expected = (
            [(x.name, x.dtype, x.shape[1:]) for x in other.inputs]
            for other in (model, feature_model("raw"))
        )
        if found != expected or model.name != "run5":
            raise ValueError(f"{model.name} takes {found}, expected run5 with {expected}")
    except Exception as error:  # Keras and h5py raise many kinds.
        raise InputError(f"{path}: is no model of this script: {one_line(error)}") from None
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


class Training(callbacks.Callback):
    """The design's optimizer and callbacks, and the checkpoint from which a killed run resumes.

    The checkpoint, the design's ModelCheckpoint, is one file, written after each epoch. It holds
    the settings, the history, the seconds spent, whether early stopping ended the run, a mark of
    the process that wrote it, all variables of network and optimizer, and the weights of the epoch
    with the lowest val_loss. The state of EarlyStopping and ReduceLROnPlateau follows from the
    history, which is replayed to them; rows and order of an epoch follow from the seed.

    identity: what must be the same in a resumed run. data/rerun_baselines.py gives a schedule, the
    rate by epoch and current rate, in place of the design's, and the least rate to which a plateau
    may cut it. Raises InputError for a checkpoint that is damaged or of another run.
    """

    def __init__(
        self,
        path: Path,
        identity: dict,
        settings: Settings,
        schedule: Callable[[int, float], float] | None = None,
        least_rate: float = 0.0,
    ) -> None:
        super().__init__()
        s = self.settings = settings
        self.optimizer = keras.optimizers.AdamW(
            s.learning_rate, weight_decay=s.weight_decay, clipnorm=s.clipnorm
        )
        decay = partial(lr_schedule, constant_epochs=s.constant_epochs, decay=s.decay)
        self.schedule = callbacks.LearningRateScheduler(schedule or decay)
        self.plateau = callbacks.ReduceLROnPlateau(
            "val_loss", s.plateau_factor, s.plateau_patience, min_lr=least_rate
        )
        self.stopping = callbacks.EarlyStopping("val_loss", s.stop_min_delta, s.stop_patience)

        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.history, self.seconds, self.stopped_early, self.mark = [], 0.0, False, ""
        self.variables, self.best_weights = [], []
        if path.exists():
            self.load()

    def load(self) -> None:
        """Take over what the checkpoint has."""
        try:
            with np.load(self.path) as file:
                earlier, self.history, self.seconds, self.stopped_early, self.mark = json.loads(
                    str(file["state"])
                )
                self.variables = [file[x] for x in file.files if x.startswith("variable")]
                self.best_weights = [file[x] for x in file.files if x.startswith("best")]
        except Exception as error:  # NumPy and zipfile raise many kinds.
            problem = f"cannot be read, delete it to begin anew: {one_line(error)}"
            raise InputError(f"{self.path}: {problem}") from None
        if differ := [x for x, now in self.identity.items() if earlier.get(x) != now]:
            pairs = ", ".join(f"{x} {earlier.get(x)}, now {self.identity[x]}" for x in differ)
            raise InputError(f"{self.path}: is of a run with {pairs}; delete it to begin anew")

    def save(self, variables: list[np.ndarray]) -> None:
        """Replace the checkpoint, if it is still this run's own."""
        self.require_own_checkpoint()
        self.mark = secrets.token_hex(8)
        state = [self.identity, self.history, self.seconds, self.stopped_early, self.mark]
        arrays = {f"variable_{i}": x for i, x in enumerate(variables)}
        arrays |= {f"best_{i}": x for i, x in enumerate(self.best_weights)}
        content = io.BytesIO()  # On a full disk NumPy's writer prints tracebacks.
        np.savez(content, state=np.array(json.dumps(state)), **arrays)
        # Another run, at its start, may remove the temporary file; the next save will notice it.
        with contextlib.suppress(FileNotFoundError), replacing(self.path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def require_own_checkpoint(self) -> None:
        """Raise InputError where another training has written or dropped the checkpoint."""
        mark = ""
        with contextlib.suppress(Exception), np.load(self.path) as file:  # It may be missing.
            *_, mark = json.loads(str(file["state"]))
        if mark != self.mark:
            raise InputError(f"{self.path.parent}: another training uses it, this one ends here")

    def fit(self, network: keras.Model, batches: Batches, val_set: Dataset) -> None:
        """Start or resume; at the end the network has the weights of the best epoch.

        Raises InputError if the checkpoint is of another network.
        """
        shapes = [x.shape for x in network.get_weights()]
        if self.best_weights and [x.shape for x in self.best_weights] != shapes:
            raise InputError(f"{self.path}: is of another network; delete it to begin anew")
        keep_freed_memory()
        network.compile(self.optimizer, "mean_squared_error", jit_compile=True)
        self.optimizer.build(network.trainable_variables)
        sample = callbacks.LambdaCallback(on_epoch_begin=batches.start_epoch)
        if not self.stopped_early and len(self.history) < self.settings.epochs:
            network.fit(
                batches,
                initial_epoch=len(self.history),
                epochs=self.settings.epochs,
                validation_data=(network_inputs(val_set), val_set.log2_height[:, None]),
                validation_batch_size=PREDICTION_BATCH,
                callbacks=[sample, self.schedule, self.plateau, self.stopping, self],
                shuffle=False,
                verbose=verbosity(),
            )
        network.set_weights(self.best_weights)

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.history:
            return
        for epoch, row in enumerate(self.history):
            self.optimizer.learning_rate = row["learning_rate"]
            self.plateau.on_epoch_end(epoch, dict(row))
            self.stopping.on_epoch_end(epoch, dict(row))
        own = [*self.model.variables, *self.optimizer.variables]
        for variable, value in zip(own, self.variables, strict=True):
            variable.assign(value)
        self.variables = []

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = {name: float(value) for name, value in logs.items()}
        if not np.isfinite([*row.values()]).all():
            problem = f"the loss became NaN or infinite in epoch {epoch + 1}"
            raise InputError(f"{problem}; a lower --learning-rate may help, from the beginning")
        self.history.append(row)
        self.seconds += time.perf_counter() - self.start
        self.stopped_early = bool(self.model.stop_training)
        own = [*self.model.variables, *self.optimizer.variables]
        if best_epoch(self.history) == epoch + 1:
            self.best_weights = self.model.get_weights()
        self.save([ops.convert_to_numpy(x) for x in own])

    def why_ended(self) -> str:
        """Why training has ended, in words."""
        if not self.stopped_early:
            return f"ended by --epochs after epoch {len(self.history)}"
        patience, least = self.settings.stop_patience, self.settings.stop_min_delta
        since = len(self.history) - patience
        return f"ended: val_loss fell by less than {least} in {patience} epochs after epoch {since}"


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    Else glibc returns the memory of each training step to the kernel and asks for it again in the
    next one, which takes a third of the time of an epoch. Called when training begins, since what
    comes before frees more than training needs.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-2, 2**28)  # M_TOP_PAD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def verbosity() -> int:
    """Keras' verbose: a progress bar on a terminal, else a line for each epoch, else nothing."""
    return 0 if not sys.stdout else 1 if sys.stdout.isatty() else 2


def best_epoch(history: list[dict]) -> int:
    """The epoch, from 1, with the lowest val_loss."""
    return 1 + int(np.argmin([row["val_loss"] for row in history]))


def commit() -> str:
    """The commit of this repository, "-dirty" where files were changed, or "unknown"."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


# --- report ---------------------------------------------------------------------------------------

TIERS = {
    "easy": [(4, 2), (4, 3), (5, 2)],
    "medium": [(4, 4), (5, 3), (6, 2)],
    "hard": [(4, 5), (5, 4), (6, 3)],  # m = n - k: there the largest bound is the m-height.
    "six": list(OPEN_GROUPS),
    "all": list(GROUPS),
}
TARGETS = {"easy": 0.15, "medium": 0.30, "hard": 1.20, "all": 0.35}  # The design's.
SAME_SETS = ("test_codes", "val_fraction")  # Runs with equal ones and one dataset compare.

KEY = """\
log2-MSE   mean of (log2 predicted - log2 true)^2, averaged over groups; RMS factor: 2^sqrt of it
bound      each basis (information set) bounds the m-height from below; the largest bound
ridge      a regression for each group on the network's features, fitted to the training set
mean       the mean log2 height of the group's training rows, without low extra codes
in 5%      Run 5's codes within 5 %; 95%, max: factor within which 95 % or all are; bias: in log2
low codes  a tenth of the {test_codes:,} test codes of each group, made to have small heights
tiers      easy (4,2) (4,3) (5,2); medium (4,4) (5,3) (6,2); hard (4,5) (5,4) (6,3), m = n-k"""
DESIGN = """\
The design's table: validation log2-MSE. Run 2 and Run 4 are as published, on another dataset, most
validation codes being in training, too. Ignore the percentages, compare "trained here" instead.
{}"""
DEPARTURES = """\
Departures from the design: 252 features of the bases, clipped, in place of P, and the largest bound
added at the output (not for --features raw); split by code; a test set; {extra_codes:,} extra
rows, {rows_per_epoch:,} of all rows an epoch; min_delta {settings[stop_min_delta]} for
early stopping; {parameters:,} parameters, not 3-4 million"""
RUN = """\
{departures}
run       {epochs_run} epochs (best {best_epoch}), {ended}
rows      training {sets[training]:,}, validation {sets[validation]:,}, test {sets[test]:,}
dataset   {dataset[file]}, {dataset[rows]:,} rows, {dataset[duplicates]:,} of them duplicates
heights   {dataset[labels]}; {dataset[infinite]:,} infinite ones left out
made      {times[finished]}, {times[seconds]:.0f} s of training, seed {settings[seed]}, \
commit {commit}
machine   {machine}; {versions}"""


def read_baselines() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published log2-MSE of Run 2 and Run 4 (columns) by k and m (index), and the rows that
    data/rerun_baselines.py has written."""
    rows = pd.read_csv(BASELINES)
    published = rows[rows["source"] == "published"].pivot(
        index=["k", "m"], columns="run", values="log2_mse"
    )
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


def error_table(results: dict, name: str) -> pd.DataFrame:
    """The log2-MSE of each way to predict (columns) by group and tier on the validation set, the
    test set or its low codes."""
    errors = pd.DataFrame(results["errors"][name]).set_index(["k", "m"]).drop(columns="n")
    return with_means(errors.rename(columns={"network": "Run 5"}))


def error_statistics(error: np.ndarray) -> dict[str, float]:
    """What log2 errors, predicted - true, mean for the user: see KEY."""
    size = np.abs(error)
    return {
        "RMS factor": 2 ** np.sqrt(np.mean(error**2)),
        "in 5%": np.mean(np.abs(2**error - 1) <= 0.05),
        "95%": 2 ** np.quantile(size, 0.95),
        "max": 2 ** size.max(),
        "bias": error.mean(),
    }


def head_section(results: dict, comparable: bool) -> str:
    """What was done, and each way to predict, from the best to the worst."""
    defaults = json.loads(json.dumps(asdict(Settings()) | {"data": DATA.name}, default=str))
    own = results["settings"] | {"data": results["dataset"]["file"]}
    changed = ", ".join(f"{x} {own[x]}" for x in own if own[x] != defaults[x])
    changed = f"Settings that are not the default: {changed}" if changed else ""
    test, low = error_table(results, "test"), error_table(results, "low codes")
    table = {"RMS factor, six": 2 ** np.sqrt(test.loc["six"]), "log2-MSE, six": test.loc["six"]}
    table |= {"all nine": test.loc["all"], "low codes, six": low.loc["six"]}
    table = pd.DataFrame(table).sort_values("RMS factor, six")
    targets = "Targets: none for this dataset, split or test set"
    if comparable:
        limits, ways = ", ".join(f"{tier} {limit:.2f}" for tier, limit in TARGETS.items()), []
        for way in [x for x in ("Run 5", "ridge", "bound") if x in test]:
            missed = [tier for tier, limit in TARGETS.items() if not test[way][tier] < limit]
            ways.append(f"{way} {', '.join(missed) or 'none'}")
        targets = f"Targets: {limits}; missed: {'; '.join(ways)}"
    count = f"{results['sets']['test']:,} new codes"
    return "\n".join(
        [
            "Run 5: the m-height of linear codes of length 9, predicted in log2 from n, k, m and P",
            *textwrap.wrap(changed, 100),
            f"Errors on {count}; six: the groups with m < n-k (else the bound is the height)",
            table.to_string(float_format="{:.4f}".format),
            *textwrap.wrap(targets, 100),
        ]
    )


def groups_section(results: dict) -> str:
    """Errors by group."""
    test, low = error_table(results, "test"), error_table(results, "low codes")
    statistics = pd.DataFrame(results["test_statistics"]).T.loc[test.index]
    table = pd.concat([test, statistics, low[["ridge", "Run 5"]].add_prefix("low, ")], axis=1)
    table = table.drop(index=["easy", "medium", "hard"]).rename_axis(columns="test set")
    formats = {"RMS factor": "{:.3f}", "in 5%": "{:.0%}", "95%": "{:.2f}", "max": "{:.2f}"}
    formats = {x: formats.get(x, "{:+.3f}" if x == "bias" else "{:.4f}").format for x in table}
    return table.to_string(formatters=formats)


def design_section(results: dict, published: pd.DataFrame) -> str:
    """The table that the design asks for."""
    table = with_means(published).assign(**{"Run 5": error_table(results, "validation")["Run 5"]})
    table = table.drop(index=["easy", "medium", "hard", "six"])
    for short, other in (("vs R2", "Run 2"), ("vs R4", "Run 4")):
        table[short] = (100 * (table["Run 5"] / table[other] - 1)).map("{:+.1f}%".format)
    rows = [row["n"] for row in results["errors"]["validation"]]
    table["n"] = [f"n={count}" for count in (*rows, sum(rows))]
    table.index = [*(f"k={k},m={m}" for k, m in GROUPS), "mean"]
    table = table.rename_axis(columns="k,m").to_string(float_format="{:.6f}".format)
    return DESIGN.format(table)


def trainings_section(rows: pd.DataFrame) -> str:
    """Test errors of each training in the rows of rows_to_compare."""
    table = {}
    for name, part in rows.groupby("run", sort=False):
        by_seed = part.pivot(index=["k", "m"], columns="seed", values="test_log2_mse")
        means = with_means(by_seed).loc[[*TIERS]]
        table[name] = {"seeds": " ".join(map(str, by_seed))} | means.mean(axis=1).to_dict()
        least, most = means.loc["all"].min(), means.loc["all"].max()
        table[name]["range of all"] = f"{least:.4f}-{most:.4f}" if most > least else ""
    table = pd.DataFrame(table).T.rename_axis(columns="trained here, test log2-MSE")
    return table.to_string(float_format="{:.4f}".format)


def make_report(results: dict, published: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The text of detailed_comparison.txt.

    results: as in metrics.json; published, rows: of read_baselines.
    """
    rows = rows_to_compare(rows, results)
    sections = [head_section(results, comparable=len(rows) > 0), KEY.format(**results["settings"])]
    sections.append(groups_section(results))
    if min(row["n"] for row in results["errors"]["validation"]) >= 100:  # Else it says nothing.
        sections.append(design_section(results, published))
    if len(rows):
        sections.append(trainings_section(rows))
    versions = ", ".join(f"{x} {number}" for x, number in results["versions"].items())
    departures = textwrap.fill(DEPARTURES.format(**results), 100)
    run = RUN.format(**results | {"versions": versions, "departures": departures})
    return "\n\n".join([*sections, run]) + "\n"


# --- pictures -------------------------------------------------------------------------------------


def plot_history(results: dict) -> Figure:
    """Loss and val_loss by epoch, with the best epoch and the ridge's error on validation rows."""
    history, best = pd.DataFrame(results["history"]), results["best_epoch"]
    history.index += 1
    validation = pd.DataFrame(results["errors"]["validation"])
    ridge = np.average(validation["ridge"], weights=validation["n"])
    figure = Figure(figsize=(9, 6), layout="constrained")
    panel, lowest = figure.subplots(), history["val_loss"][best]
    panel.plot(history["loss"], label="loss: training set, with any dropout, weighted by group")
    panel.plot(history["val_loss"], label="val_loss: validation set, mean of the rows")
    panel.plot(best, lowest, "kv", label=f"best epoch {best}: {lowest:.4f}")
    panel.axhline(ridge, color="C2", linestyle="--", label=f"ridge, validation set: {ridge:.4f}")
    panel.set(xlabel="epoch", ylabel="MSE of log2 height", yscale="log")
    panel.set_title(f"Training {results['ended']}")
    panel.xaxis.set_major_locator(MaxNLocator(steps=[1, 5, 10], integer=True))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.grid(which="both", alpha=0.3)
    panel.legend()
    return figure


def plot_predictions(test_set: Dataset, predicted: np.ndarray) -> Figure:
    """The error of each test row by its true log2 height, by group. predicted: log2 heights."""
    true, error = test_set.log2_height, predicted - test_set.log2_height
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for panel, (k, m) in zip(panels.flat, OPEN_GROUPS, strict=True):
        group = test_set.group == GROUPS.index((k, m))
        panel.axhline(0, color="black", linewidth=0.8, zorder=0)
        for name, low, color in (("random codes", False, "C0"), ("low codes", True, "C3")):
            rows = group & (test_set.low == low)
            panel.scatter(true[rows], error[rows], 8, color, alpha=0.4, linewidths=0, label=name)
        panel.set_title(f"k={k}, m={m}", fontsize="small")
        panel.grid(alpha=0.3)
    panel.legend(markerscale=3)
    figure.supxlabel("true log2 height")
    figure.supylabel("predicted - true log2 height")
    figure.suptitle("Run 5 on new codes, in the groups where the bound is not the height")
    return figure


def plot_comparison(results: dict, published: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Left: the RMS error of each way to predict, in log2 but read as a factor, in the six groups
    where the bound is not the height. Right: Run 2 on validation rows and on new codes, and Run 5
    on new codes."""
    test, rows = error_table(results, "test"), rows_to_compare(rows, results)
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    groups = [f"{k},{m}" for k, m in TIERS["six"]]
    for way, size in np.sqrt(test.loc[groups]).items():
        left.plot(groups, size, "o")
        left.annotate(way, (groups[-1], size.iloc[-1]), (8, -3), textcoords="offset points")
    left.set(yscale="log", xlabel="k,m", ylabel="RMS factor, on the log scale of the log2-MSE")
    left.set_title("Test error in the groups where the bound is not the height", fontsize="medium")
    factors = [1.02, 1.05, 1.1, 1.2, 1.4, 2, 4]
    left.set_yticks(np.log2(factors), map(str, factors))
    left.set_yticks([], minor=True)
    left.margins(x=0.12)

    errors = rows.groupby("run")[["log2_mse", "test_log2_mse"]].mean()
    bars = {f"{way}, on new codes": test[way]["all"] for way in ("bound", "Run 5") if way in test}
    if {"Run 2", "Run 2, rows split at random"} <= {*errors.index}:
        in_validation, on_new_codes = errors.loc["Run 2, rows split at random"]
        bars = {
            "Run 2, rows split at random,\nin validation": in_validation,
            "the same, on new codes": on_new_codes,
            "Run 2, codes split,\non new codes": errors.loc["Run 2", "test_log2_mse"],
        } | bars
    right.bar_label(right.barh([*bars], [*bars.values()]), fmt=" {:.3g}")
    right.invert_yaxis()
    for (run, error), style in zip(published.mean().items(), ("--", ":"), strict=True):
        right.axvline(
            error, color="black", linestyle=style, label=f"{run} as published: {error:.3f}"
        )
    right.legend(loc="lower right")
    right.set(xscale="log", xlabel="log2-MSE, mean of the nine groups")
    right.margins(x=0.2)
    right.set_title("Codes that are in training, too, hide the error", fontsize="medium")
    for panel, axis in ((left, "y"), (right, "x")):
        panel.grid(axis=axis, alpha=0.3)
    return figure


# --- prediction -----------------------------------------------------------------------------------


def predict(file: Path, model_file: Path, output: Path | None) -> None:
    """Write predicted and exact heights of the codes in a file, in its order, to a csv in `output`,
    or beside the file. Print the errors.

    Codes of other lengths or groups than the trained ones have exact heights alone. Raises
    InputError for files that cannot be used.
    """
    model, codes = load_trained(model_file), read_codes(file, trained=False)
    table = pd.DataFrame({"n": codes.n, "k": codes.k, "m": codes.m})
    covered = codes.are_trained()
    table["predicted"] = np.full(len(table), np.nan, dtype=np.float32)
    if covered.any():
        of_groups = codes.take(covered)
        of_groups = of_groups._replace(P=of_groups.P[:, :P_WIDTH])  # Longer codes have more.
        table.loc[covered, "predicted"] = outputs_of(model, of_groups)[:, 0]
        bound = outputs_of(feature_model("basis"), of_groups)[:, 0]
    table["exact"] = exact_heights(codes)
    output = output or file.parent
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{file.name}_predicted.csv"
    with replacing(path) as temporary:
        table.to_csv(temporary, index_label="row", lineterminator="\n")
    infinite = np.isinf(table["exact"])
    print(f"{path}: {len(table):,} rows, {infinite.sum():,} of infinite height")
    if others := (~covered).sum():
        groups = ", ".join(map(str, GROUPS))
        print(f"{others:,} rows have exact heights alone: the model knows n = {N}, (k, m) {groups}")
    if (covered & ~infinite).any():
        table, finite = table[covered], ~infinite[covered]
        ways = pd.DataFrame({"network": np.log2(table["predicted"]), "bound": bound})[finite]
        errors = group_errors(table[finite], np.log2(table["exact"][finite]), ways)
        print("log2-MSE on the n codes of finite height of each group; bound: the largest bound")
        print(errors.to_string(float_format="{:.6f}".format))


@lru_cache(maxsize=4)
def load_once(path: Path, changed: int) -> keras.Model:
    """load_trained, once for each state of the file. changed: when it was, in nanoseconds."""
    return load_trained(path)


def inference(n: int, k: int, m: int, p_list: Iterable, model: Path = TRAINED) -> list[float]:
    """The m-heights that a trained model predicts, called as the course's evaluator calls it.

    p_list: matrices P, arrays or nested lists of shape (k, n - k). A height is inf where it is so
    by definition. Raises InputError, a ValueError, where n, k, m are none of the trained groups or
    a matrix has another shape or is not finite.
    """
    rows = [[n, k, m, P] for P in p_list]
    if not rows:
        return []
    codes = codes_from_rows("p_list", rows)
    changed = os.stat(model).st_mtime_ns if os.path.exists(model) else 0
    return outputs_of(load_once(Path(model), changed), codes)[:, 0].tolist()


# --- main -----------------------------------------------------------------------------------------


def evaluate(network: keras.Model, sets: dict[str, Dataset], kind: str) -> tuple:
    """Errors of every way to predict, as group_errors has them, on the validation set, the test set
    and its low codes. Then the log2 heights that the network predicts for the test set, (rows,).

    Called once, at the end of a run: until then the test set is not predicted.
    """
    errors = {}
    for name in ("validation", "test"):
        ways = simple_predictions(sets["training"], sets[name], kind)
        predicted = network.predict(network_inputs(sets[name]), PREDICTION_BATCH, verbose=0)
        ways["network"] = predicted[:, 0].astype("float64")
        errors[name] = group_errors(sets[name], sets[name].log2_height, ways)
    low = sets["test"].low
    low_set = sets["test"].take(low)
    errors["low codes"] = group_errors(low_set, low_set.log2_height, ways[low])
    return errors, ways["network"].to_numpy()


def results_of(
    training: Training, network: keras.Model, batches: Batches, sets: dict[str, Dataset]
) -> tuple[dict, np.ndarray]:
    """What metrics.json holds, and the predicted log2 heights of the test set, (rows,)."""
    settings, history = training.settings, training.history
    errors, predicted = evaluate(network, sets, settings.features)
    error, group = predicted - sets["test"].log2_height, sets["test"].group
    named = {f"{k},{m}": group == i for i, (k, m) in enumerate(GROUPS)}
    named |= {x: np.isin(group, [GROUPS.index(y) for y in TIERS[x]]) for x in TIERS}
    counts = {name: len(data) for name, data in sets.items()}
    results = {
        "settings": training.identity | {"epochs": settings.epochs},
        "dataset": sets["validation"].about,
        "sets": counts,
        "extra_codes": counts["training"] - batches.rows_per_epoch,
        "rows_per_epoch": batches.rows_per_epoch,
        "parameters": network.count_params(),
        "epochs_run": len(history),
        "best_epoch": best_epoch(history),
        "stopped_early": training.stopped_early,
        "ended": training.why_ended(),
        "errors": {x: table.reset_index().to_dict("records") for x, table in errors.items()},
        "test_statistics": {x: error_statistics(error[rows]) for x, rows in named.items()},
        "history": history,
        "commit": commit(),
        "times": {"seconds": training.seconds, "finished": time.strftime("%Y-%m-%d")},
        "versions": {x: version(x) for x in ("keras", "tensorflow", "numpy", "scikit-learn")},
        "machine": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} CPUs",
    }
    return results, predicted


def run(settings: Settings) -> None:
    """Load, split, train, report."""
    names = ", ".join(map(str, settings.data))
    print(f"reading {names}; then come the sets, their features and training", flush=True)
    dataset = load_dataset(*settings.data)
    published, rows = read_baselines()  # Before training, so that a damaged file ends no long run.
    settings.output.mkdir(parents=True, exist_ok=True)
    for unfinished in settings.output.glob(f"{TEMPORARY}*"):  # What a killed process was writing.
        unfinished.unlink(missing_ok=True)
    checkpoint = settings.output / "checkpoint.npz"
    identity = asdict(settings) | {"data": dataset.about["sha256"]}
    del identity["output"], identity["epochs"]  # They may differ when a run is resumed.
    training = Training(checkpoint, identity, settings)
    if training.history:
        print(f"{training.path}: resuming after epoch {len(training.history)}", flush=True)
    elif (settings.output / "metrics.json").exists():
        print(f"{settings.output}: has a finished run, which this new one will replace at its end")

    sets = add_extra_codes(make_sets(dataset, settings), settings)
    require_disjoint(sets)
    counts = {name: len(data) for name, data in sets.items()}
    print(pd.Series(dataset.about | counts).to_string(), "\ncomputing features", flush=True)
    to_features = feature_model(settings.features)
    sets = {x: replace(data, features=outputs_of(to_features, data)) for x, data in sets.items()}

    print("training", flush=True)
    keras.utils.set_random_seed(settings.seed)  # For initial weights and dropout.
    network = build_network(sets["training"].features, settings)
    batches = Batches(sets["training"], len(dataset) - counts["validation"], settings)
    training.fit(network, batches, sets["validation"])

    results, predicted = results_of(training, network, batches, sets)
    training.require_own_checkpoint()
    report = make_report(results, published, rows)
    pictures = {
        "training_history.png": plot_history(results),
        "comparison.png": plot_comparison(results, published, rows),
        "predictions_scatter.png": plot_predictions(sets["test"], predicted),
    }
    writers = {"best_model_run5.h5": height_model(network, settings.features).save}
    writers |= {x: partial(figure.savefig, dpi=120) for x, figure in pictures.items()}
    texts = {
        "metrics.json": json.dumps(results, indent=1) + "\n",
        "detailed_comparison.txt": report,
    }
    escaped = {"encoding": "utf-8", "errors": "backslashreplace"}  # File names can be any bytes.
    writers |= {x: partial(Path.write_text, data=text, **escaped) for x, text in texts.items()}
    for name, write in writers.items():
        with replacing(settings.output / name) as path:
            write(path)
    print(f"\n{report}\nresults are in {settings.output}")
    if not training.stopped_early:
        print(f"{training.why_ended()}: the same command with more epochs goes on from there")
    else:
        checkpoint.unlink(missing_ok=True)


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """The type, for argparse, of an option that takes numbers from `least` to `most`."""

    def read(text: str) -> float:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"found {text}, expected {least} to {most}")
        return value

    read.__name__ = kind.__name__  # For argparse's message about what is no number.
    return read


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Settings, dict]:
    """The settings, and the options that were typed."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Train the Run 5 network on codes and their m-heights, or predict heights.",
        epilog="example: python train_model_v5.py --data codes.pkl heights.pkl --output my_run",
        argument_default=argparse.SUPPRESS,
    )
    data, training, predicting = map(parser.add_argument_group, ("data", "training", "prediction"))

    def add(group, name: str, about: str, **how) -> None:
        group.add_argument(f"--{name.replace('_', '-')}", help=about, **how)

    file = {"type": Path, "metavar": "FILE"}
    about = "npz; or codes and heights, pickled (default: data/augmented.npz)"
    add(data, "data", about, nargs="+", **file)
    about = "folder for results (default: run_5; with --predict: that of FILE)"
    add(data, "output", about, type=Path, metavar="FOLDER")
    about = "input of the network: numbers of the code's bases (default), or the entries of P"
    add(training, "features", about, choices=("basis", "raw"))
    weights = " ".join(f"{x:g}" for x in Settings.group_weights)
    about = f"nine weights in the loss, for {GROUPS[0]} to {GROUPS[-1]} (default: {weights})"
    add(training, "group_weights", about, type=number(float, 0, 100), nargs=9, metavar="W")
    hints = get_type_hints(Settings, include_extras=True)
    for option in fields(Settings):
        if get_origin(hints[option.name]) is Annotated:
            kind, meaning, least, most = get_args(hints[option.name])
            group = data if option.name in DATA_OPTIONS else training
            about = f"{meaning}, {least} to {most} (default: {option.default:g})"
            add(group, option.name, about, type=number(kind, least, most), metavar=kind.__name__)
    about = "do not train; write predicted and exact heights of the codes in FILE"
    add(predicting, "predict", about, **file)
    add(predicting, "model", "what predicts (default: run_5/best_model_run5.h5)", **file)

    typed = vars(parser.parse_args(argv))
    beside = {"predict", "model", "output"} if "predict" in typed else typed.keys() - {"model"}
    if unused := ", ".join(f"--{x.replace('_', '-')}" for x in typed if x not in beside):
        parser.error(
            f"{unused}: no effect {'beside' if 'predict' in typed else 'without'} --predict"
        )
    of_run = {x.name: typed[x.name] for x in fields(Settings) if x.name in typed}
    return Settings(**{x: tuple(y) if isinstance(y, list) else y for x, y in of_run.items()}), typed


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what cannot be used or written, 130 when interrupted."""
    for name in ("absl", "tensorflow"):  # They warn of the h5 format and of several models.
        logging.getLogger(name).setLevel("ERROR")
    settings, typed = parse_arguments(argv)
    keras.config.set_floatx("float32")  # The user's keras.json may name another.
    again = "; the same command resumes training"
    try:
        if "predict" in typed:
            again = ""
            predict(typed["predict"], typed.get("model", TRAINED), typed.get("output"))
        else:
            run(settings)
    except (InputError, OSError, MemoryError) as error:
        print(f"train_model_v5.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"train_model_v5.py: interrupted{again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    start_as_command()
    sys.exit(main())
