"""Rates side by side: training, labeller, prediction. One table; each figure against its reference, in turn.

    python tests/benchmark.py [--repeats 3] [--only training labeller prediction] [--precision float32]

Figure and reference are measured in turn, `--repeats` times; the table has the median of each, and the median, least
and largest of the ratios. Nothing else should run on the machine meanwhile.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_model_v5 as run5  # isort: skip

import keras
import numpy as np
from test_heights import height_by_lp
from threadpoolctl import threadpool_limits

from data import prepare
from data.command_line import environment
from data.heights import GROUPS, N, m_heights, unflatten

STEPS = 60


def rate(work: Callable[[], int]) -> float:
    """What `work` says it did, a second."""
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def in_turn(repeats: int, *ways: Callable[[], float]) -> list[list[float]]:
    """Readings of each way, taken in turn after one that does not count."""
    readings = [[way() for way in ways] for _ in range(1 + repeats)]
    return [list(column) for column in zip(*readings[1:], strict=True)]


def line(name: str, unit: str, goal: str, measured: list[float], reference: list[float]) -> str:
    """One line of the table."""
    ratios = np.divide(measured, reference)
    figures = f"{np.median(measured):>12,.1f}{np.median(reference):>12,.4g}{np.median(ratios):>12,.2f}"
    return f"{name:<42}{unit:<9}{figures}  {f'{ratios.min():,.2f} to {ratios.max():,.2f}':<24}{goal}"


def training_rows() -> tuple[run5.Dataset, run5.Settings]:
    """Rows of all groups for so many steps, with their features."""
    settings = run5.Settings(extra_codes=0)
    data = prepare.make_dataset(1 + STEPS * settings.batch_size // len(GROUPS), seed=1)
    return replace(data, features=run5.predict_all(run5.feature_model("basis"), data)), settings


class StepEnds(keras.callbacks.Callback):
    def on_train_begin(self, logs=None) -> None:
        self.times = []

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.times.append(time.perf_counter())


def serve(way: str, precision: str) -> None:
    """Rows a second by the median step of `fit`, for every line on stdin. Each way has a process of its own."""
    run5.set_up_keras(42, "float32" if way == "plain" else precision)
    data, settings = training_rows()
    network, batches, ends = run5.build_network(data.features, settings), run5.Batches(data, settings), StepEnds()
    optimizer = keras.optimizers.AdamW(settings.learning_rate, weight_decay=1e-4, clipnorm=1.0)
    if way == "plain":
        kinds = {run5.HashDropout: keras.layers.Dropout}
        network = keras.models.clone_model(
            network, clone_function=lambda x: kinds.get(type(x), type(x)).from_config(x.get_config())
        )
        network.compile(optimizer, "mse", jit_compile=False)
    else:
        run5.compile_network(network, optimizer)
    for _ in sys.stdin:
        network.fit(batches, verbose=0, shuffle=False, callbacks=[ends])
        print(settings.batch_size / np.median(np.diff(ends.times)), flush=True)


def training(repeats: int, precision: str) -> list[str]:
    with ExitStack() as stack:

        def start(way: str) -> Callable[[], float]:
            command = [sys.executable, __file__, "--precision", precision, "--serve", way]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            process = stack.enter_context(subprocess.Popen(command, text=True, **pipes))

            def ask() -> float:
                process.stdin.write("\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            return ask

        readings = in_turn(repeats, start("script"), start("plain"))
    return [line("training, against plain float32 fit", "rows/s", "bfloat16 1.4, float32 1.25", *readings)]


def labeller(repeats: int, precision: str) -> list[str]:
    """Codes a second, one m at a time on one core, against the LP definition by HiGHS."""
    lines = []
    shipped = run5.load_dataset(*run5.Settings().data)
    for i, (k, m) in enumerate(GROUPS):
        P = unflatten(shipped.P[shipped.group == i], k)  # Finite heights: at an infinite one HiGHS ends early.
        programs = iter(P)
        ways = (lambda P=P, m=m: len(m_heights(P, [m])), lambda m=m, P=programs: int(height_by_lp(next(P), m) > 0))
        with threadpool_limits(1):
            readings = in_turn(repeats, *(lambda way=way: rate(way) for way in ways))
        goal = ">= 50,000" if m == N - k else ">= 2,500"
        lines.append(line(f"labeller, k={k},m={m}, against HiGHS", "codes/s", goal, *readings))
    return lines


def prediction(repeats: int, precision: str) -> list[str]:
    """Codes a second from the model as it is saved, the groups mixed."""
    run5.set_up_keras(42, precision)
    data, settings = training_rows()
    model = run5.height_model(run5.build_network(data.features, settings), settings.features)
    codes = prepare.make_dataset(4000, seed=1)
    codes = codes.take(np.random.default_rng(0).permutation(len(codes)))
    (rates,) = in_turn(repeats, lambda: rate(lambda: len(run5.predict_all(model, codes))))
    return [line("prediction, against 10,000 codes/s", "codes/s", ">= 1", rates, [10000.0] * repeats)]


PARTS = {"training": training, "labeller": labeller, "prediction": prediction}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="readings of each figure (default: 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=run5.precision_for("auto"))
    parser.add_argument("--serve", choices=("script", "plain"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        return serve(asked.serve, asked.precision)
    print(f"{environment()['machine']}; {asked.precision}; {asked.repeats} readings each")
    print(f"{'':<42}{'unit':<9}{'measured':>12}{'reference':>12}{'ratio':>12}  {'least to largest':<24}goal")
    for name in asked.only:
        print(*PARTS[name](asked.repeats, asked.precision), sep="\n", flush=True)


if __name__ == "__main__":
    main()
