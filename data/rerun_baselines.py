"""Run 2 and Run 4, trained on the dataset and the split of train_model_v5.py.

    python data/rerun_baselines.py [--runs run2 run4] [--seed 42]
    python data/rerun_baselines.py --add "Run 5 without dropout" my_run

The first command writes a row for each run and (k, m) group to data/baselines.csv: the log2-MSE of
the epoch with the lowest val_loss, on the validation set and on the test set. A run takes hours on
two cores; one that was stopped is resumed. The second command writes the rows of a run of
train_model_v5.py whose results are in my_run.

Layers, weights, optimizer and callbacks are those of the runs' descriptions, except that no code is
in training and validation at once.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["MPLBACKEND"] = "Agg"  # As in the script, which is imported first to set its backend.

import train_model_v5 as run5  # isort: skip
import keras
import numpy as np
import pandas as pd
from keras import layers

from data.dataset import (
    P_WIDTH,
    Dataset,
    InputError,
    load_dataset,
    replacing,
    start_as_command,
)

# What rows have in common that replace each other.
SAME = ["run", "source", "seed", "dataset", *run5.SAME_SETS]


# --- networks -------------------------------------------------------------------------------------


def dense(x, units: float, dropout: float = 0.0, norm: bool = True):
    """Dense with gelu, then BatchNormalization and Dropout where there are any."""
    x = layers.Dense(max(4, round(units)), activation="gelu")(x)
    x = layers.BatchNormalization()(x) if norm else x
    return run5.HashDropout(dropout)(x) if dropout else x


def residual(x, units: float, dropout: float):
    """Two dense blocks and the skip connection around them."""
    return layers.Add()([dense(dense(x, units, dropout), units), x])


def attention(x, heads: int, width: int, dropout: float):
    """Self-attention over a vector as a sequence of length 1."""
    x = layers.Reshape((1, x.shape[1]))(x)
    return layers.Flatten()(layers.MultiHeadAttention(heads, width, dropout=dropout)(x, x))


def inputs_and_embeddings(P_train: np.ndarray, embedding: int) -> tuple[list, list]:
    """The four inputs; then n, the embeddings of k and m, and P scaled by the training set's."""
    n, k, m = (layers.Input((1,), name=name, dtype="int32") for name in ("n", "k", "m"))
    P = layers.Input((P_WIDTH,), name="features")
    mean, variance = P_train.mean(axis=0).tolist(), P_train.var(axis=0).tolist()
    scaled = layers.Normalization(mean=mean, variance=variance)(P)
    k_embed = layers.Flatten()(layers.Embedding(7, embedding)(k))
    m_embed = layers.Flatten()(layers.Embedding(6, embedding)(m))
    return [n, k, m, P], [n, k_embed, m_embed, scaled]


def build_run2(P_train: np.ndarray, width: float = 1.0) -> keras.Model:
    """Run 2: self-attention and four residual blocks. Gives log2 heights, (batch, 1).

    P_train: that of the training set, (rows, 20). width: factor on the units.
    """
    inputs, (n, k, m, P) = inputs_and_embeddings(P_train, 32)
    P = attention(dense(dense(P, 256 * width, 0.2), 512 * width), 8, 64, 0.1)
    x = dense(layers.Concatenate()([n, k, m, P]), 1024 * width, 0.4)
    for _ in range(4):
        x = residual(x, 1024 * width, 0.4)
    x = dense(dense(x, 512 * width), 256 * width, norm=False)
    return keras.Model(inputs, layers.Dense(1, activation="softplus")(x), name="log2_height")


def build_run4(P_train: np.ndarray, width: float = 1.0) -> keras.Model:
    """Run 4: three experts on P, mixed by a gate on k and m, and three residual blocks.

    Arguments and output as those of build_run2.
    """
    inputs, (n, k, m, P) = inputs_and_embeddings(P_train, 64)
    gate = layers.Dense(3, activation="softmax")(layers.Concatenate()([k, m]))
    P = dense(P, 512 * width, 0.25)
    experts = []
    sizes = ((4, 64, 256, 0.35), (8, 64, 512, 0.4), (16, 128, 768, 0.4))
    for heads, key_width, size, rate in sizes:
        x = dense(attention(P, heads, key_width, 0.15), size * width, rate)
        x = dense(dense(x, size * width), 512 * width, norm=False)
        experts.append(x)
    stacked = layers.Reshape((3, experts[0].shape[1]))(layers.Concatenate()(experts))
    x = dense(layers.Concatenate()([n, k, m, layers.Dot(1)([gate, stacked])]), 1024 * width, 0.45)
    for _ in range(3):
        x = residual(x, 1024 * width, 0.4)
    x = run5.HashDropout(0.2)(dense(dense(x, 512 * width, 0.3), 256 * width, norm=False))
    return keras.Model(inputs, layers.Dense(1, activation="softplus")(x), name="log2_height")


# --- training -------------------------------------------------------------------------------------

EARLIER = {"features": "raw", "extra_codes": 0, "weight_decay": 1e-3, "clipnorm": None}
EARLIER |= {"epochs": 200, "constant_epochs": 200, "plateau_factor": 0.5, "stop_min_delta": 0.0}
RUN2 = {"learning_rate": 5e-4, "plateau_patience": 20, "stop_patience": 30}
RUN2 |= {"group_weights": (1.0, 1.0, 1.5, 5.0, 1.0, 1.5, 3.0, 2.0, 3.0)}
RUN4 = {"learning_rate": 7e-4, "plateau_patience": 10, "stop_patience": 25}
RUN4 |= {"group_weights": (1.0,) * 9}
# The network, the settings of train_model_v5.py, the least rate to which a plateau cuts.
RUNS = {"run2": (build_run2, EARLIER | RUN2, 1e-6), "run4": (build_run4, EARLIER | RUN4, 1e-7)}


def cosine(epoch: int, rate: float) -> float:
    """Run 4's rate: from 7e-4 to 1e-6 along a cosine, anew every 30 epochs."""
    return 1e-6 + (7e-4 - 1e-6) * (1 + math.cos(math.pi * (epoch % 30) / 30)) / 2


def train_run(run: str, dataset: Dataset, settings: run5.Settings, checkpoint: Path) -> dict:
    """Start or resume a run of RUNS; returns its figures as metrics.json has them.

    settings: for data, seed and width.
    """
    build, changes, least_rate = RUNS[run]
    settings = replace(settings, **changes)
    sets = run5.make_sets(dataset, settings)
    run5.require_disjoint(sets)
    sets = {x: replace(data, features=data.P.astype("float32")) for x, data in sets.items()}
    same = {"run": run, "data": dataset.about["sha256"], "seed": settings.seed}
    schedule = cosine if run == "run4" else None
    training = run5.Training(checkpoint, same, settings, schedule, least_rate)

    keras.utils.clear_session()
    keras.utils.set_random_seed(settings.seed)
    network = build(sets["training"].features, settings.width)
    batches = run5.Batches(sets["training"], len(sets["training"]), settings)
    training.fit(network, batches, sets["validation"])
    errors, _ = run5.evaluate(network, sets, "raw")
    return {
        "errors": {x: table.reset_index().to_dict("records") for x, table in errors.items()},
        "epochs_run": len(training.history),
        "best_epoch": run5.best_epoch(training.history),
        "stopped_early": True,  # Or it had all of its epochs.
        "parameters": network.count_params(),
        "times": {"seconds": training.seconds},
        "settings": asdict(settings),
        "dataset": dataset.about,
    }


# --- rows of baselines.csv ------------------------------------------------------------------------


def rows_of(run: str, results: dict) -> pd.DataFrame:
    """A run's rows for the csv, one for each group. results: as in metrics.json.

    Raises InputError for a run that --epochs ended: its rows would stand for the whole training.
    """
    if not results["stopped_early"]:
        problem = f"{run}: was ended by --epochs after {results['epochs_run']}"
        raise InputError(f"{problem}, expected a training that early stopping ended")
    test, val = (pd.DataFrame(results["errors"][x]) for x in ("test", "validation"))
    return val[["k", "m", "n"]].assign(
        run=run,
        source="measured",
        log2_mse=val["network"],
        test_log2_mse=test["network"],
        epochs=results["epochs_run"],
        best_epoch=results["best_epoch"],
        parameters=results["parameters"],
        seconds=round(results["times"]["seconds"]),
        backend="tensorflow",
        dataset=results["dataset"]["sha256"],
        **{x: results["settings"][x] for x in ("seed", *run5.SAME_SETS)},
    )


def write_rows(table: pd.DataFrame) -> None:
    """Put a run's rows in the csv, in place of those that it has for the same sets and seed."""
    kept = pd.read_csv(run5.BASELINES, dtype=str, keep_default_na=False)
    table = table.astype(str)
    others = (kept[SAME] != table[SAME].iloc[0]).any(axis=1)
    both = pd.concat([kept[others], table], ignore_index=True)[kept.columns]
    with replacing(run5.BASELINES) as temporary:
        both.to_csv(temporary, index=False, lineterminator="\n")


# --- main -----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    logging.getLogger("tensorflow").setLevel("ERROR")  # It warns of several models.
    default, about = run5.Settings(), "Train Run 2 and Run 4 on the dataset, for comparison."
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=about)
    add = parser.add_argument
    add("--runs", nargs="+", choices=RUNS, default=[*RUNS], help="(default: all)")
    add("--add", nargs=2, metavar=("NAME", "FOLDER"), help="only add the rows of a finished run")
    add("--data", type=Path, nargs="+", default=default.data, help="as in train_model_v5.py")
    add("--output", type=Path, default=default.output / "baselines", help="for their checkpoints")
    add("--seed", type=run5.number(int, 0, 2**32 - 1), default=default.seed, help="of everything")
    given = parser.parse_args(argv)
    keras.config.set_floatx("float32")
    try:
        if given.add:
            path = Path(given.add[1]) / "metrics.json"
            try:
                rows = rows_of(given.add[0], json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError) as error:
                problem = f"is not of a finished run: {run5.one_line(error)}"
                raise InputError(f"{path}: {problem}") from None
            write_rows(rows)
            return 0
        dataset = load_dataset(*given.data)
        given.output.mkdir(parents=True, exist_ok=True)
        for run in given.runs:
            checkpoint = given.output / f"{run}-{given.seed}.npz"
            results = train_run(run, dataset, replace(default, seed=given.seed), checkpoint)
            write_rows(rows_of(run.replace("run", "Run "), results))
            print(f"{run}: the rows are in {run5.BASELINES}")
            checkpoint.unlink()
    except (InputError, OSError) as error:
        print(f"rerun_baselines.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rerun_baselines.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    start_as_command()
    sys.exit(main())
