"""Rates side by side: training, start, labeller, prediction. One table; each figure against its reference, in turn.

    python tests/benchmark.py [--repeats 3] [--only training start labeller prediction] [--precision float32]

Figure and reference are measured in turn, `--repeats` times; the table has the median of each, and the median, least
and largest of the ratios. Nothing else should run on the machine meanwhile. Takes about ten minutes on two cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if sys.argv[-1] == "plain":
    # Plain Keras has TensorFlow's own settings; the others have those that the script makes when it is imported.
    import tensorflow  # noqa: F401

import train_model_v5 as run5  # isort: skip

import keras
import numpy as np
from test_heights import height_by_lp
from threadpoolctl import threadpool_limits

from data.prepare import GROUPS, Codes, N, m_heights, unflatten

STEPS = 60

FIRST_STEP = """
import os, sys, time
import train_model_v5 as run5
def first_step(*_, **__):
    print(time.time() - float(sys.argv[1]), flush=True)
    os._exit(0)
run5.Progress.on_train_batch_end = first_step
run5.main(["--output", sys.argv[2]])
"""

# In a process of its own: workers import what the main module imports, and TensorFlow takes longer than their work.
LABEL_MANY = """
import sys, time
import numpy as np
from data.prepare import Codes, label, read_codes
codes = read_codes("data/augmented.npz")
rows = np.tile(np.arange(len(codes.k)), 20)
many = Codes(*(column[rows] for column in codes))
start = time.perf_counter()
label(many, workers=int(sys.argv[1]) or None)
print(len(rows) / (time.perf_counter() - start))
"""


def rate(work: Callable[[], int]) -> float:
    """What `work` says it did, a second."""
    start = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - start)


def in_turn(repeats: int, *ways: Callable[[], float]) -> list[list[float]]:
    """Readings of each way, taken in turn after one that does not count."""
    readings = [[way() for way in ways] for _ in range(1 + repeats)]
    return [list(column) for column in zip(*readings[1:], strict=True)]


def line(name: str, unit: str, goal: str, measured: list[float], reference: list[float]) -> str:
    """One line of the table."""
    ratios = np.divide(measured, reference)
    spread = f"{ratios.min():,.2f} to {ratios.max():,.2f}"
    figures = f"{np.median(measured):>12,.1f}{np.median(reference):>12,.4g}{np.median(ratios):>12,.2f}"
    return f"{name:<46}{unit:<9}{figures}  {spread:<26}{goal}"


# --- training -------------------------------------------------------------------------------------------------------


def some_of_the_dataset():
    """Dataset, what the network sees of every seventh row, these rows, settings."""
    settings = run5.Settings()
    dataset = run5.load_dataset(*settings.data)
    rows = np.arange(0, len(dataset), 7)
    seen = np.zeros((len(dataset), run5.BasisNorms.WIDTH), np.float32)
    seen[rows] = run5.see(Codes(dataset.k[rows], dataset.m[rows], dataset.P[rows]), settings.features)
    return dataset, seen, rows[: STEPS * settings.batch_size], settings


class StepEnds(keras.callbacks.Callback):
    def on_train_begin(self, logs=None) -> None:
        self.times = []

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.times.append(time.perf_counter())


def fit_rate(network: keras.Model, *data, **options) -> float:
    """Rows a second by the median step: `fit` takes seconds to end, once, which would weigh in a short one."""
    ends = StepEnds()
    network.fit(*data, verbose=0, callbacks=[ends], **options)
    return run5.Settings().batch_size / np.median(np.diff(ends.times))


def as_the_script_trains() -> Callable[[], float]:
    run5.make_repeatable(42)
    keras.config.set_dtype_policy(run5.PRECISIONS[run5.faster_precision()])
    dataset, seen, rows, settings = some_of_the_dataset()
    network = run5.build_network(seen.shape[1], run5.fit_scaler(seen, rows))
    run5.compile_network(network, settings)
    stream = run5.batches(dataset, seen, rows, len(rows), settings)
    run5.keep_freed_memory()

    def fit() -> float:
        with run5.compiled_between_products():
            return fit_rate(network, stream, steps_per_epoch=STEPS, shuffle=False)

    return fit


def as_plain_keras_trains() -> Callable[[], float]:
    """The same layers with Keras' own Dropout, steps not compiled."""
    run5.HashDropout = keras.layers.Dropout
    dataset, seen, rows, settings = some_of_the_dataset()
    network = run5.build_network(seen.shape[1], run5.fit_scaler(seen, rows))
    network.compile(keras.optimizers.AdamW(1e-3, weight_decay=1e-4, clipnorm=1.0), "mse", jit_compile=False)
    inputs, target = run5.network_inputs(dataset, seen, rows), dataset.log2_height[rows, None]
    return lambda: fit_rate(network, inputs, target, batch_size=settings.batch_size)


def matrix_products_alone() -> Callable[[], float]:
    """The products of each step, forward and backward, on all cores, in the precision in which the script trains:
    float32 by NumPy, bfloat16 by TensorFlow's oneDNN."""
    width = run5.BasisNorms.WIDTH
    network = run5.build_network(width, keras.layers.Normalization(mean=[0.0] * width, variance=[1.0] * width))
    shapes = [layer.kernel.shape for layer in network.layers if isinstance(layer, keras.layers.Dense)]
    pairs = [(np.ones((256, a), np.float32), np.ones((a, b), np.float32)) for a, b in shapes]

    def products(x, weight) -> tuple:
        y = x @ weight
        return x.T @ y, y @ weight.T

    if run5.faster_precision() == "bfloat16":
        import tensorflow as tf

        pairs = [[tf.cast(matrix, tf.bfloat16) for matrix in pair] for pair in pairs]

        @tf.function
        def products(x, weight) -> tuple:
            y = tf.matmul(x, weight)
            return tf.matmul(x, y, transpose_a=True), tf.matmul(y, weight, transpose_b=True)

    def work() -> int:
        for _ in range(STEPS):
            for pair in pairs:
                products(*pair)
        return STEPS * 256

    return lambda: rate(work)


WAYS = {"script": as_the_script_trains, "plain": as_plain_keras_trains, "products": matrix_products_alone}


def serve(way: str) -> None:
    """A reading for every line on stdin. Each way has a process of its own: TensorFlow's settings are global."""
    reading = WAYS[way]()
    for _ in sys.stdin:
        print(reading(), flush=True)


def training(repeats: int) -> list[str]:
    with ExitStack() as stack:

        def start(way: str) -> Callable[[], float]:
            command = [sys.executable, __file__, "--precision", run5.faster_precision(), "--serve", way]
            pipe = subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))

            def ask() -> float:
                process.stdin.write("\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            return ask

        script, plain, products = in_turn(repeats, *map(start, WAYS))
    return [
        line("training, against plain float32 fit", "rows/s", ">= 1.6", script, plain),
        line("training, against its products alone", "rows/s", ">= 0.75", script, products),
    ]


# --- start, labeller, prediction ------------------------------------------------------------------------------------


def start(repeats: int) -> list[str]:
    """From the command to the end of the first training step, imports included."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, "-c", FIRST_STEP, str(time.time()), output]
            done = subprocess.run(command, cwd=run5.HERE, stdout=subprocess.PIPE, text=True, check=True)
        seconds.append(float(done.stdout.split()[-1]))
    return [line("command to first step, against 20 s", "s", "< 1", seconds, [20.0] * repeats)]


def labeller(repeats: int) -> list[str]:
    """Codes a second, one m at a time on one core, against the LP definition by HiGHS; then all cores against one."""
    lines = []
    shipped = run5.load_dataset(*run5.Settings().data)
    for i, (k, m) in enumerate(GROUPS):
        # Of finite height all: at an infinite one the linear programs end early.
        P = unflatten(shipped.P[shipped.group == i], k)
        number = iter(range(len(P)))

        def exact(P=P, m=m) -> int:
            m_heights(P, [m])
            return len(P)

        def programs(P=P, m=m, number=number) -> int:
            height_by_lp(P[next(number)], m)
            return 1

        with threadpool_limits(1):
            readings = in_turn(repeats, lambda: rate(exact), lambda: rate(programs))
        goal = ">= 50,000" if m == N - k else ">= 2,500"
        lines.append(line(f"labeller, k={k},m={m}, against HiGHS", "codes/s", goal, *readings))

    def many(workers: int) -> float:
        command = [sys.executable, "-c", LABEL_MANY, str(workers)]
        return float(subprocess.run(command, cwd=run5.HERE, stdout=subprocess.PIPE, text=True, check=True).stdout)

    readings = in_turn(repeats, lambda: many(0), lambda: many(1))
    return [*lines, line("labeller, 2,160,000 codes, against one core", "codes/s", "", *readings)]


def prediction(repeats: int) -> list[str]:
    """Codes a second from the model as it is saved, the groups mixed."""
    keras.config.set_dtype_policy(run5.PRECISIONS[run5.faster_precision()])
    dataset, seen, rows, settings = some_of_the_dataset()
    network = run5.build_network(seen.shape[1], run5.fit_scaler(seen, rows))
    with tempfile.TemporaryDirectory() as folder:
        run5.height_model(network, settings.features).save(Path(folder) / "model.h5")
        model = run5.load_trained(Path(folder) / "model.h5")
    rows = np.random.default_rng(0).permutation(len(dataset))[:40_000]
    (rates,) = in_turn(repeats, lambda: rate(lambda: len(run5.predict_heights(model, dataset, rows))))
    return [line("prediction, against 10,000 codes/s", "codes/s", ">= 1", rates, [10_000.0] * repeats)]


PARTS = {"training": training, "start": start, "labeller": labeller, "prediction": prediction}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="readings of each figure (default: 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)")
    parser.add_argument("--precision", choices=run5.PRECISIONS, help="of training and prediction (default: the faster)")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    # Tried once, while nothing else runs: by later trials the ways could differ in what they train in.
    precision = asked.precision or run5.faster_precision()
    run5.faster_precision = lambda: precision
    if asked.serve:
        return serve(asked.serve)
    print(f"{run5.machine()}; {run5.faster_precision()}; {asked.repeats} readings each\n")
    print(f"{'':<46}{'unit':<9}{'measured':>12}{'reference':>12}{'ratio':>12}  {'least to largest':<26}goal")
    for name in asked.only:
        print(*PARTS[name](asked.repeats), sep="\n", flush=True)


if __name__ == "__main__":
    main()
