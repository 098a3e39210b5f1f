"""Run 2, Run 4 and Run 5 on raw P, trained on the dataset and the very split of train_model_v5.py.

    python data/rerun_baselines.py [--runs run2 run4 run4-curriculum run5-raw run2-shared]

Writes a row for each run and (k, m) group to data/baselines.csv, beside the published figures: log2-MSE of the epoch
with the lowest val_loss on the validation rows. A run takes half an hour to hours on two cores. It goes on where it
was when the same command is given again; Ctrl-C ends it after the epoch and writes what it has reached, marked so.

Run 2 and Run 4 are built from descriptions of their scripts: layers, weights, optimizer and callbacks as they were,
except that every run here sees each code on one side of the split only. `run2-shared` is there for the contrast: Run 2
on a third of the codes, each three times, rows split at random, which is how the published figures came about.
"""

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_model_v5 as run5
from data.prepare import GROUPS, InputError, OneLineParser, write_whole

import keras  # isort: skip  (TensorFlow's settings, which the script makes, come first)
import numpy as np
import pandas as pd
from keras import layers, ops
from sklearn.model_selection import train_test_split

COLUMNS = ["run", "source", "k", "m", "log2_mse", "n", "epochs", "best_epoch", "ended", "parameters", "seconds"]
COLUMNS += ["seed", "dataset"]


# --- networks -------------------------------------------------------------------------------------------------------


def dense(x, units: int, dropout: float = 0.0, norm: bool = True):
    """Dense with gelu, then BatchNormalization and Dropout where they are asked for."""
    x = layers.Dense(units, activation="gelu")(x)
    x = layers.BatchNormalization()(x) if norm else x
    return run5.HashDropout(dropout)(x) if dropout else x


def residual(x, dropout: float):
    """Two dense blocks of 1024 and the skip connection around them."""
    return layers.Add()([dense(dense(x, 1024, dropout), 1024), x])


@keras.saving.register_keras_serializable("m_height")
class LoneAttention(layers.MultiHeadAttention):
    """Keras' self-attention for sequences of length 1, (batch, 1, width), in two matrix products.

    The softmax is over one score, so it is 1 whatever query and key are. Their kernels stay, for the count of
    parameters, but nothing depends on them: in Keras' layer too no gradient reaches them. Dropout takes whole heads.
    """

    def build(self, query_shape, value_shape, key_shape=None) -> None:
        super().build(query_shape, value_shape, key_shape)
        self.query_dense.trainable = self.key_dense.trainable = False
        self.heads_kept = run5.HashDropout(self.dropout)

    def call(self, query, value, key=None, training=False):
        heads, width = self.num_heads, self.num_heads * self.key_dim
        kept = self.heads_kept(ops.ones((ops.shape(value)[0], heads)), training=training)
        x = ops.matmul(value[:, 0], ops.reshape(self.value_dense.kernel, (-1, width)))
        x = (x + ops.reshape(self.value_dense.bias, (width,))) * ops.repeat(kept, self.key_dim, axis=1)
        return (ops.matmul(x, ops.reshape(self.output_dense.kernel, (width, -1))) + self.output_dense.bias)[:, None]


def attention(x, heads: int, width: int, dropout: float):
    """Self-attention over a vector as a sequence of length 1."""
    x = layers.Reshape((1, x.shape[1]))(x)
    x = LoneAttention(heads, width, dropout=dropout)(x, x)
    return layers.Reshape((x.shape[2],))(x)


def inputs_and_embeddings(scaler, embedding: int):
    """The four inputs of a network, the embeddings of k and m, and scaled P."""
    n, k, m = (layers.Input((1,), name=name, dtype="int32") for name in ("n", "k", "m"))
    P = layers.Input((run5.P_WIDTH,), name="P_seen")
    k_embedded = layers.Reshape((embedding,))(layers.Embedding(7, embedding)(k))
    m_embedded = layers.Reshape((embedding,))(layers.Embedding(6, embedding)(m))
    return [n, k, m, P], k_embedded, m_embedded, scaler(P)


def build_run2(scaler) -> keras.Model:
    """Run 2: self-attention and four residual blocks, 10,875,041 parameters. Gives log2 heights."""
    inputs, k, m, P = inputs_and_embeddings(scaler, 32)
    P = attention(dense(dense(P, 256, 0.2), 512), 8, 64, 0.1)
    x = dense(layers.Concatenate()([inputs[0], k, m, P]), 1024, 0.4)
    for _ in range(4):
        x = residual(x, 0.4)
    x = dense(dense(x, 512), 256, norm=False)
    return keras.Model(inputs, layers.Activation("softplus")(layers.Dense(1)(x)), name="log2_height")


def build_run4(scaler) -> keras.Model:
    """Run 4: three experts on P, mixed by a gate that sees k and m, and three residual blocks. Gives log2 heights."""
    inputs, k, m, P = inputs_and_embeddings(scaler, 64)
    gate = layers.Dense(3, activation="softmax")(layers.Concatenate()([k, m]))
    P = dense(P, 512, 0.25)
    experts = []
    for heads, width, units, dropout in ((4, 64, 256, 0.35), (8, 64, 512, 0.4), (16, 128, 768, 0.4)):
        x = dense(dense(attention(P, heads, width, 0.15), units, dropout), units)
        experts.append(dense(x, 512, norm=False))
    stacked = layers.Reshape((3, experts[0].shape[1]))(layers.Concatenate()(experts))
    x = dense(layers.Concatenate()([inputs[0], k, m, layers.Dot(1)([gate, stacked])]), 1024, 0.45)
    for _ in range(3):
        x = residual(x, 0.4)
    x = run5.HashDropout(0.2)(dense(dense(x, 512, 0.3), 256, norm=False))
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
    "run4-curriculum": replace(RUN4, name="Run 4, curriculum in force", weights=curriculum),
    "run2-shared": replace(RUN2, name="Run 2, codes shared", shared=True),
}
RUNS = ["run2", "run4", "run4-curriculum", "run5-raw", "run2-shared"]


# --- data -----------------------------------------------------------------------------------------------------------


def with_shared_codes(dataset: run5.Dataset, seed: int) -> tuple[run5.Dataset, np.ndarray, np.ndarray]:
    """A dataset as the published figures had it, with training and validation rows: a third of the codes of each group,
    each three times, and rows split at random by group, so that most codes are on both sides."""
    rng = np.random.default_rng(seed)
    kept = [np.flatnonzero(dataset.group == i) for i in range(len(GROUPS))]
    rows = np.sort(np.concatenate([np.repeat(rng.choice(r, len(r) // 3, replace=False), 3) for r in kept]))
    columns = {name: getattr(dataset, name)[rows] for name in ("k", "m", "P", "height")}
    shared = run5.Dataset(**columns, source=dataset.source, sha256=dataset.sha256)
    train_rows, val_rows = train_test_split(
        np.arange(len(rows)), test_size=run5.Settings().val_fraction, random_state=seed, stratify=shared.group
    )
    return shared, np.sort(train_rows), np.sort(val_rows)


def weighted_batches(dataset, seen, rows, recipe: Recipe, settings, steps: int, first_epoch: int) -> Iterator[tuple]:
    """The batches of train_model_v5.py, each epoch with the weights that the recipe has for it."""
    for epoch in count(first_epoch):
        now = replace(settings, group_weights=recipe.weights(epoch))
        yield from islice(run5.batches(dataset, seen, rows, len(rows), now, epoch), steps)


# --- runs -----------------------------------------------------------------------------------------------------------


def train_recipe(recipe: Recipe, dataset, train_rows, val_rows, settings, work: Path) -> tuple:
    """Train or go on; returns the journal and the log2 heights predicted for the validation rows by the best epoch."""
    run5.make_repeatable(settings.seed)
    # A run of Run 5 earlier in this process may have left Keras with another.
    keras.config.set_dtype_policy("float32")
    seen = run5.see(dataset, "raw")
    model = run5.height_model(recipe.build(run5.fit_scaler(seen, train_rows)), "raw")
    network = model.get_layer("log2_height")
    optimizer = keras.optimizers.AdamW(recipe.rate, weight_decay=recipe.weight_decay)
    network.compile(optimizer, "mse", jit_compile=not run5.has_gpu())
    factor, patience, least = recipe.plateau
    remembering = [
        keras.callbacks.ReduceLROnPlateau("val_loss", factor, patience, min_lr=least),
        keras.callbacks.EarlyStopping("val_loss", patience=recipe.stop_patience),
        run5.BestModel(work / "best_model.h5", model),
    ]
    about = {"run": recipe.name, "data": dataset.sha256, "rows": len(dataset), "seed": settings.seed}
    about |= {"epochs": min(recipe.epochs, settings.epochs), "batch_size": settings.batch_size}
    journal = run5.Journal(work / "journal.npz", about, model.count_params(), remembering)
    steps = math.ceil(len(train_rows) / settings.batch_size)
    run5.fit_resumably(
        network,
        journal,
        partial(weighted_batches, dataset, seen, train_rows, recipe, settings, steps),
        steps,
        (run5.network_inputs(dataset, seen, val_rows), dataset.log2_height[val_rows, None]),
        about["epochs"],
        keras.callbacks.LearningRateScheduler(recipe.schedule),
    )
    best = run5.load_trained(work / "best_model.h5")
    return journal, np.log2(run5.predict_heights(best, dataset, val_rows))


def rows_of_recipe(recipe: Recipe, dataset, settings, work: Path) -> tuple[pd.DataFrame, bool]:
    """The run's rows for the csv, and whether it was interrupted."""
    if recipe.shared:
        dataset, train_rows, val_rows = with_shared_codes(dataset, settings.seed)
    else:
        train_rows, val_rows = run5.split_dataset(dataset, settings.val_fraction, settings.seed)
    journal, predicted = train_recipe(recipe, dataset, train_rows, val_rows, settings, work)
    true = dataset.log2_height[val_rows]
    table = run5.group_errors(dataset.k[val_rows], dataset.m[val_rows], true, predicted).reset_index()
    ended = "interrupted" if journal.interrupted else "complete"
    table = table.assign(epochs=len(journal.history), best_epoch=journal.best_epoch, ended=ended)
    table = table.assign(parameters=journal.parameters, seconds=round(journal.seconds))
    return table.assign(run=recipe.name), journal.interrupted


def rows_of_run5_raw(settings, work: Path) -> tuple[pd.DataFrame, bool]:
    """The same for Run 5 on raw P without drawn codes, trained by train_model_v5.py itself."""
    ended = run5.run(replace(settings, features="raw", drawn=0, output=work), trust_labels=True)
    if ended not in (0, run5.INTERRUPTED):
        raise InputError(f"{work}: Run 5 on raw P ended with status {ended}")
    results = json.loads((work / "metrics.json").read_text(encoding="utf-8"))
    table = pd.DataFrame(results["groups"])[["k", "m", "run5", "n"]].rename(columns={"run5": "log2_mse"})
    table = table.assign(epochs=results["epochs_run"], best_epoch=results["best_epoch"])
    table = table.assign(ended="interrupted" if results["interrupted"] else "complete")
    table = table.assign(parameters=results["parameters"], seconds=round(results["times"]["wall_seconds"]))
    return table.assign(run="Run 5, raw P"), results["interrupted"]


def write_rows(table: pd.DataFrame, path: Path) -> None:
    """Put the run's rows in the csv, in place of those that it had there for the same dataset and seed."""
    kept = pd.read_csv(path).reindex(columns=COLUMNS)
    same = ["run", "source", "dataset", "seed"]
    kept = kept[(kept[same] != table[same].iloc[0]).any(axis=1)]
    both = pd.concat([kept.astype(object), table.reindex(columns=COLUMNS).astype(object)], ignore_index=True)
    write_whole(path, both.to_csv(index=False, lineterminator="\n").encode())


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    default = run5.Settings()
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, metavar="RUN", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--data", type=Path, nargs="+", default=default.data, help="as in train_model_v5.py")
    parser.add_argument("--output", type=Path, default=run5.HERE / "run_5" / "unfinished_baselines", help="their state")
    parser.add_argument("--csv", type=Path, default=run5.HERE / "data" / "baselines.csv", help="where the rows go")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="at most this many, and what a run has")
    parser.add_argument("--seed", type=int, default=default.seed, help="of split, weights, order and dropout")
    logging.getLogger("absl").setLevel("ERROR")  # As in train_model_v5.py: Keras calls h5 an old format.
    logging.getLogger("tensorflow").setLevel("ERROR")  # It takes one network after the other for a mistake.
    try:
        asked = parser.parse_args(argv)
        if len(asked.data) > 2:
            raise InputError(f"--data: found {len(asked.data)} paths, expected 1 or 2")
        if not asked.csv.is_file():
            raise InputError(f"--csv: {asked.csv} is no file, expected one with the published figures")
        settings = run5.Settings(data=tuple(asked.data), epochs=asked.epochs, seed=asked.seed)
        dataset = run5.load_dataset(*settings.data)
        run5.check_labels(dataset)
        for run in asked.runs:
            work = asked.output / run
            work.mkdir(parents=True, exist_ok=True)
            print(f"{run}: {work}", flush=True)
            keras.utils.clear_session()
            if run == "run5-raw":
                table, interrupted = rows_of_run5_raw(settings, work)
            else:
                with run5.only_run_in(work):
                    table, interrupted = rows_of_recipe(RECIPES[run], dataset, settings, work)
            write_rows(table.assign(source="measured", seed=settings.seed, dataset=dataset.sha256), asked.csv)
            print(f"{asked.csv}: {run}, mean of the groups {table['log2_mse'].mean():.6f}", flush=True)
            if interrupted:
                return run5.INTERRUPTED
            shutil.rmtree(work)
    except InputError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
