"""Accuracy of the shipped model beyond the test set; rates, each beside that of a reference.

    python tests/benchmark.py accuracy
    python tests/benchmark.py training library prediction [--repeats 3]

Both are measured in turn, `--repeats` times. The table has the median of each, and the median,
least and largest of the ratios; `training` has seconds an epoch, where less is better. Nothing else
should run on the machine meanwhile. The library is analog-ecc-heights of PyPI, to be installed for
this alone.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_model_v5 as run5  # isort: skip

import keras
import numpy as np
import pandas as pd
from conftest import COURSE_SAMPLE
from threadpoolctl import threadpool_limits

from data.dataset import Codes, Dataset, exact_heights, flatten, unflatten, write_heights
from data.heights import GROUPS, N, m_heights
from data.prepare import VERY_LOW, make_dataset


def rate(work: Callable[[], int]) -> float:
    """What `work` says it did, a second."""
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def in_turn(repeats: int, *ways: Callable[[], float]) -> list[list[float]]:
    """Readings of each way, taken in turn after one that does not count."""
    readings = [[way() for way in ways] for _ in range(1 + repeats)]
    return [list(column) for column in zip(*readings[1:], strict=True)]


def line(name: str, measured: list[float], reference: list[float]) -> str:
    """One line of the table."""
    ratios = np.divide(measured, reference)
    figures = (
        f"{np.median(measured):>10,.4g}{np.median(reference):>10,.4g}{np.median(ratios):>10,.2f}"
    )
    return f"{name:<36}{figures}  {ratios.min():,.2f} to {ratios.max():,.2f}"


def epoch_seconds(*command: str) -> float:
    """Mean seconds of an epoch after the first, in which functions are compiled, of a process that
    prints a line after each."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        ends = [time.perf_counter() for line in process.stdout if line.startswith("epoch")]
    return np.diff(ends).mean()


def training(repeats: int) -> list[str]:
    """Seconds an epoch of the default run as a user types it, against plain_keras, each in a
    process of its own, without and with the memory kept that is freed."""
    script = Path(run5.__file__), "--epochs", "3", "--fresh", "--output"
    with TemporaryDirectory() as folder:
        ways = [(*script, folder), (__file__, "plain"), (__file__, "plain_kept")]
        readings = [[epoch_seconds(*map(str, way)) for way in ways] for _ in range(repeats)]
    ours, plain, kept = zip(*readings, strict=True)
    lines = [line("seconds an epoch, plain Keras", ours, plain)]
    return [*lines, line("the same, memory kept in both", ours, kept)]


def plain_keras(keep_memory: bool) -> None:
    """The same rows and network by stock Keras: its own Dropout, not compiled by XLA."""
    if keep_memory:
        run5.keep_freed_memory()
    settings = run5.Settings()
    dataset = run5.load_dataset(*settings.data)
    sets = run5.add_extra_codes(run5.make_sets(dataset, settings), settings)
    front = run5.feature_model("basis")
    sets = {x: replace(data, features=run5.outputs_of(front, data)) for x, data in sets.items()}
    kinds = {run5.HashDropout: keras.layers.Dropout}
    network = keras.models.clone_model(
        run5.build_network(sets["training"].features, settings),
        clone_function=lambda x: kinds.get(type(x), type(x)).from_config(x.get_config()),
    )
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=1e-4, clipnorm=1.0)
    network.compile(optimizer, "mse", jit_compile=False)
    rows = len(dataset) - len(sets["validation"])
    validation = sets["validation"]
    network.fit(
        run5.Batches(sets["training"], rows, settings),
        epochs=3,
        validation_data=(run5.network_inputs(validation), validation.log2_height[:, None]),
        callbacks=[
            keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: print("epoch", flush=True))
        ],
        verbose=0,
    )


def library(repeats: int) -> list[str]:
    """Codes a second on one core, against the fastest function of analog-ecc-heights for a group.

    It is the reference implementation by an author of arXiv 2602.20366.
    """
    try:
        import analog_ecc_heights
    except ImportError:
        return ["library: analog-ecc-heights is not installed"]
    names = [x for x in analog_ecc_heights.__all__ if "roth" in x and "parity" not in x]
    shipped, lines = run5.load_dataset(*run5.Settings().data), []
    for i, (k, m) in enumerate(GROUPS):
        data = shipped.take(np.flatnonzero(shipped.group == i))
        P = unflatten(data.P, k)
        G = [np.hstack([np.eye(k), x]).astype(float) for x in P]

        def by_library(name: str, codes: slice = slice(10), m=m, G=G) -> list[float]:
            return [getattr(analog_ecc_heights, name)(x, m) for x in G[codes]]

        fit = [x for x in names if "mds" not in x or m == N - k]
        rates = {x: rate(lambda x=x: len(by_library(x, slice(2)))) for x in fit}
        fastest = max(rates, key=rates.get)
        np.testing.assert_allclose(by_library(fastest), data.height[:10], rtol=1e-6)
        with threadpool_limits(1):
            readings = in_turn(
                repeats,
                lambda P=P, m=m: rate(lambda: len(m_heights(P, m))),
                lambda x=fastest: rate(lambda: len(by_library(x))),
            )
        lines.append(line(f"labeller, codes/s, k={k},m={m}, library", *readings))
    return lines


def as_dataset(k: np.ndarray, m: np.ndarray, P: np.ndarray) -> Dataset:
    """The codes of finite height with their exact heights. P: (rows, 20)."""
    codes = Codes(np.full(len(k), N), k, m, P)
    with TemporaryDirectory() as folder:
        path = Path(folder, "codes.npz")
        write_heights(path, codes, exact_heights(codes))
        return run5.load_dataset(path)


def accuracy(model: Path) -> str:
    """Errors of a model, and of what needs no network, on sets of codes beyond the test set.

    Mean and ridge are fitted to the training set of the default run. Codes of its training and
    validation set are left out.
    """
    settings, network = run5.Settings(), run5.load_trained(model)
    shipped, front = run5.load_dataset(*settings.data), run5.feature_model("basis")
    sets = run5.add_extra_codes(run5.make_sets(shipped, settings), settings)
    train_set = replace(sets["training"], features=run5.outputs_of(front, sets["training"]))
    rng, k, m = np.random.default_rng(0), *np.repeat(GROUPS, 500, axis=0).T
    uniform = [flatten(rng.integers(-100, 101, (500, k, N - k))) for k, _ in GROUPS]
    within_8 = np.flatnonzero(np.abs(shipped.P).max(axis=1) <= 8)
    within_8 = shipped.take(
        np.concatenate(
            [
                rng.permutation(within_8[shipped.group[within_8] == i])[:200]
                for i in range(len(GROUPS))
            ]
        )
    )
    very_low = run5.load_dataset(VERY_LOW)
    codes = {
        "test set": sets["test"],
        "its low codes": sets["test"].take(sets["test"].low),
        "its codes with entries within 8": sets["test"].take(np.abs(sets["test"].P).max(1) <= 8),
        "entries uniform on [-100, 100]": as_dataset(k, m, np.concatenate(uniform)),
        "entries within 8, times 1/3": as_dataset(within_8.k, within_8.m, within_8.P / 3),
        "entries within 8, times 0.1": as_dataset(within_8.k, within_8.m, within_8.P * 0.1),
        "very small heights": very_low.take(np.arange(len(GROUPS), len(very_low))),
        "smallest published": very_low.take(np.arange(len(GROUPS))),
    }
    if COURSE_SAMPLE.exists():
        codes["sample of the course's DS-1"] = run5.load_dataset(COURSE_SAMPLE)
    known = np.concatenate([sets["training"].key, sets["validation"].key])
    table = {}
    for name, data in codes.items():
        new = data.take(~np.isin(data.key, known))
        new = replace(new, features=run5.outputs_of(front, new))
        ways = run5.simple_predictions(train_set, new, "basis")
        predicted = run5.outputs_of(network, new)[:, 0].astype(float)
        ways = ways.assign(**{"Run 5": np.log2(predicted)})[["mean", "bound", "ridge", "Run 5"]]
        errors = run5.group_errors(new, new.log2_height, ways)
        six = errors[errors.index.isin(run5.TIERS["easy"] + run5.TIERS["medium"])]
        worse = six.index[six["Run 5"] > six["ridge"]]
        table[name] = {"codes, six": six["n"].sum(), "codes": len(new)}
        table[name]["left out"] = len(data) - len(new)
        table[name] |= {f"{x}, six": six[x].mean() for x in ways}
        table[name] |= {f"{x}, nine": errors[x].mean() for x in ways}
        table[name]["ridge is better in"] = " ".join(f"({k},{m})" for k, m in worse) or "none"
        print(f"{name}\n{errors.T.round(4).to_string()}", flush=True)
    return "\n" + pd.DataFrame(table).T.to_string(float_format="{:.4f}".format)


def prediction(repeats: int) -> list[str]:
    """Codes a second from the model as it is saved, against exact heights; the groups mixed."""
    model = run5.load_trained(run5.TRAINED)
    codes = make_dataset(4000, seed=1)
    codes = codes.take(np.random.default_rng(0).permutation(len(codes)))
    exact = Codes(np.full(len(codes), N), codes.k, codes.m, codes.P)
    ways = (lambda: run5.outputs_of(model, codes), lambda: exact_heights(exact))
    rates = in_turn(repeats, *(lambda way=way: rate(lambda: len(way())) for way in ways))
    return [line("prediction, codes/s, exact heights", *rates)]


RATES = {"training": training, "library": library, "prediction": prediction}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["accuracy", *RATES, "plain", "plain_kept"])
    parser.add_argument("--repeats", type=int, default=3, help="readings of each (default: 3)")
    parser.add_argument("--model", type=Path, default=run5.TRAINED, help="for accuracy")
    given = parser.parse_args()
    if given.parts[0].startswith("plain"):  # What `training` starts.
        return plain_keras(given.parts[0] == "plain_kept")
    if "accuracy" in given.parts:
        print(accuracy(given.model))
    rates = [name for name in given.parts if name in RATES]
    if rates:
        head = f"{'measured':>10}{'reference':>10}{'ratio':>10}  least to largest"
        print(f"{f'what, unit, reference; {given.repeats} readings':<36}{head}")
    for name in rates:
        print(*RATES[name](given.repeats), sep="\n", flush=True)


if __name__ == "__main__":
    main()
