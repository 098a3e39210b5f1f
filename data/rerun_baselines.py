"""Earlier runs, and Run 5 with other settings, trained on the dataset and the split of train_model_v5.py.

    python data/rerun_baselines.py [--runs run2 run4 run4-curriculum run5-raw ...] [--seed 42]

Writes a row for each run and (k, m) group to data/baselines.csv, beside the published figures: log2-MSE of the epoch
with the lowest val_loss, on the validation set and on the test set. data/comparison.py says what each run is. A run
takes half an hour to hours on two cores. One that was stopped is resumed by the same command.

Run 2 and Run 4 are built from descriptions of their scripts: layers, weights, optimizer and callbacks as they were,
except that no code is in training and validation at once, and that `attention` leaves out what has no effect there.
`run2-shared` is there for the contrast: Run 2 on a third of the codes, each three times, rows split at random, so that
validation codes are in training as in the published runs.
"""

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_model_v5 as run5
from data import prepare
from data.command_line import OneLineParser, status_of_main, whole
from data.comparison import BASELINES, NO_EXTRA, RAW, SHARED, WEIGHTED
from data.files import InputError, write_whole
from data.heights import GROUPS, P_WIDTH

import keras  # isort: skip  (the script, which sets its backend, comes first)
import numpy as np
import pandas as pd
from keras import layers
from sklearn.model_selection import train_test_split

COLUMNS = ["run", "source", "k", "m", "log2_mse", "test_log2_mse", "n", "epochs", "best_epoch", "ended", "parameters"]
COLUMNS += ["seconds", "backend", "seed", "dataset"]


# --- networks -------------------------------------------------------------------------------------------------------


def dense(x, units: float, dropout: float = 0.0, norm: bool = True):
    """Dense with gelu, then BatchNormalization and Dropout where they are asked for."""
    x = layers.Dense(max(4, round(units)), activation="gelu")(x)
    x = layers.BatchNormalization()(x) if norm else x
    return run5.HashDropout(dropout)(x) if dropout else x


def residual(x, units: float, dropout: float):
    """Two dense blocks and the skip connection around them."""
    return layers.Add()([dense(dense(x, units, dropout), units), x])


def attention(x, heads: int, width: int, dropout: float):
    """Self-attention over a vector as a sequence of length 1: what keras.layers.MultiHeadAttention does there.

    The softmax over one key is 1, whatever the query. So queries and keys, which would take most of the time of a step,
    are left out: the values remain, a dropout of whole heads, and the output.
    """
    values = layers.EinsumDense("ac,cde->ade", (heads, width), bias_axes="de", name=f"values_of_{heads}_heads")(x)
    values = layers.Dropout(dropout, noise_shape=(None, heads, 1))(values)
    return layers.EinsumDense("ade,dec->ac", x.shape[1], bias_axes="c")(values)


def parameters_as_built(network: keras.Model) -> int:
    """Those of Run 2 or Run 4 with the queries and keys that attention leaves out, each as many as the values."""
    values = [layer for layer in network.layers if layer.name.startswith("values_of_")]
    return network.count_params() + 2 * sum(layer.count_params() for layer in values)


def inputs_and_embeddings(P_train: np.ndarray, embedding: int) -> tuple[list, list]:
    """The four inputs of a network; then n, the embeddings of k and m, and P, scaled by the training set's."""
    n, k, m = (layers.Input((1,), name=name, dtype="int32") for name in ("n", "k", "m"))
    P = layers.Input((P_WIDTH,), name="features")
    scaled = layers.Normalization(mean=P_train.mean(axis=0).tolist(), variance=P_train.var(axis=0).tolist())(P)
    k_embed = layers.Reshape((embedding,))(layers.Embedding(7, embedding)(k))
    m_embed = layers.Reshape((embedding,))(layers.Embedding(6, embedding)(m))
    return [n, k, m, P], [n, k_embed, m_embed, scaled]


def build_run2(P_train: np.ndarray, width: float = 1.0) -> keras.Model:
    """Run 2: self-attention and four residual blocks. Gives log2 heights.

    P_train: that of the training set, (rows, 20), for its scale; width: factor on the units, to be small in tests.
    """
    inputs, (n, k, m, P) = inputs_and_embeddings(P_train, 32)
    P = attention(dense(dense(P, 256 * width, 0.2), 512 * width), 8, 64, 0.1)
    x = dense(layers.Concatenate()([n, k, m, P]), 1024 * width, 0.4)
    for _ in range(4):
        x = residual(x, 1024 * width, 0.4)
    x = dense(dense(x, 512 * width), 256 * width, norm=False)
    return keras.Model(inputs, layers.Activation("softplus")(layers.Dense(1)(x)), name="log2_height")


def build_run4(P_train: np.ndarray, width: float = 1.0) -> keras.Model:
    """Run 4: three experts on P, mixed by a gate on k and m, and three residual blocks. Arguments as for build_run2."""
    inputs, (n, k, m, P) = inputs_and_embeddings(P_train, 64)
    gate = layers.Dense(3, activation="softmax")(layers.Concatenate()([k, m]))
    P = dense(P, 512 * width, 0.25)
    experts = []
    for heads, key_width, units, dropout in ((4, 64, 256, 0.35), (8, 64, 512, 0.4), (16, 128, 768, 0.4)):
        x = dense(dense(attention(P, heads, key_width, 0.15), units * width, dropout), units * width)
        experts.append(dense(x, 512 * width, norm=False))
    stacked = layers.Reshape((3, experts[0].shape[1]))(layers.Concatenate()(experts))
    x = dense(layers.Concatenate()([n, k, m, layers.Dot(1)([gate, stacked])]), 1024 * width, 0.45)
    for _ in range(3):
        x = residual(x, 1024 * width, 0.4)
    x = run5.HashDropout(0.2)(dense(dense(x, 512 * width, 0.3), 256 * width, norm=False))
    return keras.Model(inputs, layers.Activation("softplus")(layers.Dense(1)(x)), name="log2_height")


# --- recipes --------------------------------------------------------------------------------------------------------

RUN2_WEIGHTS = dict.fromkeys([(4, 2), (4, 3), (5, 2)], 1.0) | dict.fromkeys([(4, 4), (5, 3)], 1.5)
RUN2_WEIGHTS |= {(6, 2): 2.0, (5, 4): 3.0, (6, 3): 3.0, (4, 5): 5.0}


def run2_weights(epoch: int) -> dict[tuple[int, int], float]:
    return RUN2_WEIGHTS


def no_weights(epoch: int) -> dict[tuple[int, int], float]:
    return dict.fromkeys(GROUPS, 1.0)


def curriculum(epoch: int) -> dict[tuple[int, int], float]:
    """Run 4's weights by epoch, from 0. They were written for it, but never reached `fit`."""
    if epoch < 30:
        easy, medium, hard = 1.0, 0.4, (0.2, 0.2, 0.2)
    elif epoch < 60:
        easy, medium, hard = 1.0, 1.0, (0.5, 0.5, 0.5)
    else:
        w = min(5.0, 2.0 + 0.08 * (epoch - 60))
        easy, medium, hard = 1.0, 1.5, (w, 1.1 * w, 1.3 * w)
    weights = dict.fromkeys(run5.TIERS["easy"], easy) | dict.fromkeys(run5.TIERS["medium"], medium)
    return weights | dict(zip([(5, 4), (6, 3), (4, 5)], hard, strict=True))


def constant(epoch: int, rate: float) -> float:
    return rate


def cosine(epoch: int, rate: float) -> float:
    """Run 4's rate: from 7e-4 to 1e-6 along a cosine, anew every 30 epochs."""
    return 1e-6 + (7e-4 - 1e-6) * (1 + math.cos(math.pi * (epoch % 30) / 30)) / 2


@dataclass(frozen=True)
class Recipe:
    """How one of the earlier runs was trained. Plateau: factor, patience and least rate of ReduceLROnPlateau."""

    name: str
    build: Callable
    weights: Callable[[int], dict]
    rate: float
    schedule: Callable[[int, float], float]
    stop_patience: int
    plateau: tuple[float, int, float]
    epochs: int = 200
    weight_decay: float = 1e-3
    shared: bool = False


RUN2 = Recipe("Run 2", build_run2, run2_weights, 5e-4, constant, 30, (0.5, 20, 1e-6))
RUN4 = Recipe("Run 4", build_run4, no_weights, 7e-4, cosine, 25, (0.5, 10, 1e-7))
RECIPES = {
    "run2": RUN2,
    "run4": RUN4,
    "run4-curriculum": replace(RUN4, name=WEIGHTED, weights=curriculum),
    "run2-shared": replace(RUN2, name=SHARED, shared=True),
}
# Run 5 with other settings than its defaults.
WITHOUT_EXTRA, ON_P = {"extra_codes": 0}, {"features": "raw"}
VARIANTS = {
    "run5-raw": (RAW, ON_P | WITHOUT_EXTRA),
    "run5-raw-weights-1": ("raw P, weight 1", ON_P | WITHOUT_EXTRA | {"group_weights": dict.fromkeys(GROUPS, 1.0)}),
    "run5-raw-weights-5": ("raw P, weight 5", ON_P | WITHOUT_EXTRA | {"group_weights": RUN2_WEIGHTS}),
    "run5-raw-extra": ("raw P, extra", ON_P),
    "run5-without-extra": (NO_EXTRA, WITHOUT_EXTRA),
    "run5-without-dropout": ("no dropout", {"dropout": 0.0}),
}
RUNS = [*(run for run in RECIPES if run != "run2-shared"), *VARIANTS, "run2-shared"]


# --- data -----------------------------------------------------------------------------------------------------------


def with_shared_codes(dataset: run5.Dataset, seed: int) -> tuple[run5.Dataset, run5.Dataset]:
    """Training and validation sets as the published figures had them: a third of the codes of each group, each three
    times, and rows split at random by group, so that most validation codes are in training too."""
    rng = np.random.default_rng(seed)
    kept = [np.flatnonzero(dataset.group == i) for i in range(len(GROUPS))]
    rows = np.concatenate([np.repeat(rng.choice(r, len(r) // 3, replace=False), 3) for r in kept])
    size = run5.Settings().val_fraction
    train_rows, val_rows = train_test_split(rows, test_size=size, random_state=seed, stratify=dataset.group[rows])
    return dataset.take(np.sort(train_rows)), dataset.take(np.sort(val_rows))


class WeightedBatches(run5.Batches):
    """The batches of train_model_v5.py, each epoch with the weights that the recipe has for it."""

    def __init__(self, train_set: run5.Dataset, settings: run5.Settings, recipe: Recipe) -> None:
        self.recipe = recipe
        super().__init__(train_set, settings)

    def start_epoch(self, epoch: int) -> None:
        self.settings = replace(self.settings, group_weights=self.recipe.weights(epoch))
        super().start_epoch(epoch)


# --- runs -----------------------------------------------------------------------------------------------------------


def errors_of(model: keras.Model, val_set: run5.Dataset, test_set: run5.Dataset) -> pd.DataFrame:
    """The run's log2-MSE by (k, m) group (rows), on the validation set and on the test set, as the csv has them."""
    tables = []
    for name, data in (("log2_mse", val_set), ("test_log2_mse", test_set)):
        predicted = pd.DataFrame({name: np.log2(run5.predict_all(model, data)[:, 0].astype(float))})
        tables.append(run5.group_errors(data, data.log2_height, predicted))
    return tables[0].join(tables[1]["test_log2_mse"]).reset_index()


def train_recipe(recipe: Recipe, dataset: run5.Dataset, settings: run5.Settings, work: Path) -> pd.DataFrame:
    """Train or go on; returns the run's rows for the csv."""
    test_set = prepare.make_dataset(settings.test_codes, run5.TEST_SEED, known=dataset.key.tolist())
    if recipe.shared:
        train_set, val_set = with_shared_codes(dataset, settings.seed)
    else:
        train_set, val_set = map(dataset.take, run5.split_dataset(dataset, settings.val_fraction, settings.seed))
    train_set, val_set = (replace(part, features=part.P.astype("float32")) for part in (train_set, val_set))
    settings = replace(settings, features="raw", extra_codes=0, epochs=min(recipe.epochs, settings.epochs))
    about = {"run": recipe.name, "data": dataset.sha256, "seed": settings.seed, "batch_size": settings.batch_size}
    checkpoint = run5.Checkpoint(work, about)

    run5.set_up_keras(settings.seed, "float32")
    network = recipe.build(train_set.features, settings.width)
    model = run5.height_model(network, "raw")
    run5.compile_network(network, keras.optimizers.AdamW(recipe.rate, weight_decay=recipe.weight_decay))
    factor, patience, least = recipe.plateau
    callbacks = [
        keras.callbacks.LearningRateScheduler(recipe.schedule),
        keras.callbacks.ReduceLROnPlateau("val_loss", factor, patience, min_lr=least),
        keras.callbacks.EarlyStopping("val_loss", patience=recipe.stop_patience),
        run5.BestModel(work / "best_model.h5", model),
    ]
    run5.fit(network, WeightedBatches(train_set, settings, recipe), val_set, callbacks, checkpoint)
    if checkpoint.diverged:
        raise InputError(f"{work}: the loss of {recipe.name} became NaN or infinite")
    best_epoch = 1 + int(np.argmin([row["val_loss"] for row in checkpoint.history]))
    complete = checkpoint.early_stop or settings.epochs == recipe.epochs
    table = errors_of(run5.load_trained(work / "best_model.h5"), val_set, test_set)
    table = table.assign(run=recipe.name, epochs=len(checkpoint.history), best_epoch=best_epoch)
    table = table.assign(ended="complete" if complete else f"--epochs {settings.epochs}")
    return table.assign(parameters=parameters_as_built(network), seconds=round(checkpoint.seconds))


def train_variant(name: str, changes: dict, settings: run5.Settings, work: Path) -> pd.DataFrame:
    """The same for Run 5 with other settings, trained by train_model_v5.py itself."""
    settings = replace(settings, precision="float32", output=work, **changes)
    if status := run5.run(settings, labels="trust"):
        raise InputError(f"{work}: {name} ended with status {status}")
    results = json.loads((work / "metrics.json").read_text(encoding="utf-8"))
    val, test = (pd.DataFrame(results["errors"][errors]) for errors in ("validation", "test"))
    table = val.rename(columns={"run5": "log2_mse"}).assign(test_log2_mse=test["run5"])
    complete = results["ended"] == "early stopping" or settings.epochs == run5.Settings().epochs
    table = table.assign(run=name, epochs=results["epochs_run"], best_epoch=results["best_epoch"])
    table = table.assign(ended="complete" if complete else results["ended"])
    return table.assign(parameters=results["parameters"], seconds=round(results["times"]["training_seconds"]))


def write_rows(table: pd.DataFrame, path: Path) -> None:
    """Put the run's rows in the csv, in place of those that it had there for the same dataset and seed."""
    kept = pd.read_csv(path).reindex(columns=COLUMNS)
    same = ["run", "source", "dataset", "seed"]
    kept = kept[(kept[same] != table[same].iloc[0]).any(axis=1)]
    both = pd.concat([kept.astype(object), table.reindex(columns=COLUMNS).astype(object)], ignore_index=True)
    write_whole(path, both.to_csv(index=False, lineterminator="\n"))


def train_runs(runs: Sequence[str], settings: run5.Settings, work: Path, csv: Path) -> None:
    """Train these runs one after the other and write their rows. `work` holds the state of what is unfinished."""
    dataset = run5.load_dataset(*settings.data)
    for run in runs:
        folder = work / f"{run}-{settings.seed}"
        print(f"{run}: {folder}", flush=True)
        keras.utils.clear_session()
        if run in VARIANTS:
            table = train_variant(*VARIANTS[run], settings, folder)
        else:
            table = train_recipe(RECIPES[run], dataset, settings, folder)
        table = table.assign(source="measured", backend=keras.backend.backend())
        table = table.assign(seed=settings.seed, dataset=dataset.sha256)
        write_rows(table, csv)
        val, test = table["log2_mse"].mean(), table["test_log2_mse"].mean()
        print(f"{csv}: {run}, means of the groups: validation {val:.6f}, test {test:.6f}", flush=True)
        shutil.rmtree(folder)


@status_of_main
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    logging.getLogger("absl").setLevel("ERROR")  # As in train_model_v5.py: Keras calls h5 an old format.
    logging.getLogger("tensorflow").setLevel("ERROR")  # It takes one network after the other for a mistake.
    default = run5.Settings()
    example = "example: python data/rerun_baselines.py --runs run2 run5-raw"
    parser = OneLineParser(description=__doc__.splitlines()[0], epilog=example)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="(default: all)")
    parser.add_argument("--data", type=Path, nargs="+", default=default.data, help="as in train_model_v5.py")
    parser.add_argument("--output", type=Path, default=default.output / "unfinished_baselines", help="their state")
    parser.add_argument("--csv", type=Path, default=BASELINES, help="where the rows go")
    about = "at most so many, and what a run has"
    parser.add_argument("--epochs", type=whole(1, 10**6), default=default.epochs, help=about)
    about = "of split, weights, order and dropout"
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=default.seed, help=about)
    asked = parser.parse_args(argv)
    if not asked.csv.is_file():
        raise InputError(f"--csv: {asked.csv} is no file, expected one with the published figures")
    settings = run5.Settings(data=tuple(asked.data), epochs=asked.epochs, seed=asked.seed)
    train_runs(asked.runs, settings, asked.output, asked.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
