"""Rates side by side: training, labeller, prediction. Each figure against its reference, in turn.

    python tests/benchmark.py [--repeats 3] [--only training labeller prediction]

Figure and reference are measured in turn, `--repeats` times. The table has the median of each, and
the median, least and largest of the ratios. Nothing else should run on the machine meanwhile.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_model_v5 as run5  # isort: skip

import keras
import numpy as np
from test_heights import height_by_lp
from threadpoolctl import threadpool_limits

from data.dataset import Dataset, unflatten
from data.heights import GROUPS, N, m_heights
from data.prepare import make_dataset

STEPS = 60


def rate(work: Callable[[], int]) -> float:
    """What `work` says it did, a second."""
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def in_turn(repeats: int, *ways: Callable[[], float]) -> list[list[float]]:
    """Readings of each way, taken in turn after one that does not count."""
    readings = [[way() for way in ways] for _ in range(1 + repeats)]
    return [list(column) for column in zip(*readings[1:], strict=True)]


def line(name: str, goal: str, measured: list[float], reference: list[float]) -> str:
    """One line of the table."""
    ratios = np.divide(measured, reference)
    figures = (
        f"{np.median(measured):>10,.0f}{np.median(reference):>10,.4g}{np.median(ratios):>10,.2f}"
    )
    return f"{name:<36}{figures}  {f'{ratios.min():,.2f} to {ratios.max():,.2f}':<24}{goal}"


def training_rows(settings: run5.Settings) -> Dataset:
    """Rows of all groups for so many steps, with their features."""
    data = make_dataset(1 + STEPS * settings.batch_size // len(GROUPS), seed=1)
    return replace(data, features=run5.predict_all(run5.feature_model("basis"), data))


class StepEnds(keras.callbacks.Callback):
    def on_train_begin(self, logs=None) -> None:
        self.times = []

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.times.append(time.perf_counter())


def training(repeats: int) -> list[str]:
    """Rows a second by the median step of `fit`: the script's way, and Keras' own Dropout without
    compilation by XLA."""
    settings, ends = run5.Settings(extra_codes=0), StepEnds()
    data = training_rows(settings)
    batches, kinds = run5.Batches(data, settings), {run5.HashDropout: keras.layers.Dropout}
    network = run5.build_network(data.features, settings)

    def stock(layer: keras.layers.Layer) -> keras.layers.Layer:
        return kinds.get(type(layer), type(layer)).from_config(layer.get_config())

    plain = keras.models.clone_model(network, clone_function=stock)
    for model, compiled in ((network, True), (plain, False)):
        optimizer = run5.optimizer_and_callbacks(settings)[0]
        model.compile(optimizer, "mse", jit_compile=compiled)

    def rows_a_second(model: keras.Model) -> float:
        model.fit(batches, verbose=0, shuffle=False, callbacks=[ends])
        return settings.batch_size / np.median(np.diff(ends.times))

    ways = (lambda: rows_a_second(network), lambda: rows_a_second(plain))
    return [line("training, rows/s, plain Keras", ">= 1.25", *in_turn(repeats, *ways))]


def labeller(repeats: int) -> list[str]:
    """Codes a second, one m at a time on one core, against the LP definition by HiGHS."""
    lines = []
    shipped = run5.load_dataset(*run5.Settings().data)
    for i, (k, m) in enumerate(GROUPS):
        P = unflatten(shipped.P[shipped.group == i], k)  # At an infinite height HiGHS ends early.
        programs = iter(P)

        def exact(P=P, m=m) -> int:
            return len(m_heights(P, [m]))

        def by_lp(programs=programs, m=m) -> int:
            return int(height_by_lp(next(programs), m) > 0)

        with threadpool_limits(1):
            readings = in_turn(repeats, lambda f=exact: rate(f), lambda f=by_lp: rate(f))
        goal = ">= 50,000" if m == N - k else ">= 2,500"
        lines.append(line(f"labeller, codes/s, k={k},m={m}, HiGHS", goal, *readings))
    return lines


def prediction(repeats: int) -> list[str]:
    """Codes a second from the model as it is saved, the groups mixed."""
    settings = run5.Settings()
    network = run5.build_network(training_rows(settings).features, settings)
    model = run5.height_model(network, settings.features)
    codes = make_dataset(4000, seed=1)
    codes = codes.take(np.random.default_rng(0).permutation(len(codes)))
    (rates,) = in_turn(repeats, lambda: rate(lambda: len(run5.predict_all(model, codes))))
    return [line("prediction, codes/s, 10,000", ">= 1", rates, [10000.0] * repeats)]


PARTS = {"training": training, "labeller": labeller, "prediction": prediction}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="readings of each (default: 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="(default: all)")
    given = parser.parse_args()
    head = f"{'measured':>10}{'reference':>10}{'ratio':>10}  {'least to largest':<24}goal"
    print(f"{f'what, unit, reference; {given.repeats} readings':<36}{head}")
    for name in given.only:
        print(*PARTS[name](given.repeats), sep="\n", flush=True)


if __name__ == "__main__":
    main()
