"""Accuracy of a model beyond the test set, and the speed of predictions beside exact heights.

python tests/benchmark.py accuracy
python tests/benchmark.py speed
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_model_v5 as run5  # isort: skip

import numpy as np
import pandas as pd
from conftest import COURSE_SAMPLE

from data.dataset import Codes, Dataset, exact_heights, flatten, write_heights
from data.heights import GROUPS, OPEN_GROUPS, N
from data.prepare import VERY_LOW, make_dataset


def default_sets() -> dict[str, Dataset]:
    """The sets of the default run, with features."""
    settings, to_features = run5.Settings(), run5.feature_model("basis")
    dataset = run5.load_dataset(*settings.data)
    sets = run5.add_extra_codes(run5.make_sets(dataset, settings), settings)
    return {
        x: replace(data, features=run5.outputs_of(to_features, data)) for x, data in sets.items()
    }


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
    network, to_features = run5.load_trained(model), run5.feature_model("basis")
    sets, shipped = default_sets(), run5.load_dataset(*run5.Settings().data)
    rng, k, m = np.random.default_rng(0), *np.repeat(GROUPS, 500, axis=0).T
    uniform = [flatten(rng.integers(-100, 101, (500, k, N - k))) for k, _ in GROUPS]
    small = [(shipped.group == i) & (np.abs(shipped.P).max(1) <= 8) for i in range(len(GROUPS))]
    rows = [rng.permutation(np.flatnonzero(of_group))[:200] for of_group in small]
    within_8 = shipped.take(np.concatenate(rows))
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
        new = replace(new, features=run5.outputs_of(to_features, new))
        ways = run5.simple_predictions(sets["training"], new, "basis")
        predicted = run5.outputs_of(network, new)[:, 0].astype(float)
        ways = ways.assign(**{"Run 5": np.log2(predicted)})[["mean", "bound", "ridge", "Run 5"]]
        errors = run5.group_errors(new, new.log2_height, ways)
        six = errors[errors.index.isin(OPEN_GROUPS)]
        worse = six.index[six["Run 5"] > six["ridge"]]
        table[name] = {"codes": len(new), "left out": len(data) - len(new)}
        table[name] |= {f"{x}, six": six[x].mean() for x in ways} | {"nine": errors["Run 5"].mean()}
        table[name]["ridge is better in"] = " ".join(f"({k},{m})" for k, m in worse) or "none"
        print(f"{name}\n{errors.T.round(4).to_string()}", flush=True)
    return "\n" + pd.DataFrame(table).T.to_string(float_format="{:.4f}".format)


def speed(model: Path) -> str:
    """Codes a second: predictions, and exact heights in one process, in turn three times."""
    network, data = run5.load_trained(model), make_dataset(4000, seed=1)
    data = data.take(np.random.default_rng(0).permutation(len(data)))
    codes = Codes(np.full(len(data), N), data.k, data.m, data.P)
    run5.outputs_of(network, codes)  # Its graph is traced.
    ways = {"predictions": partial(run5.outputs_of, network), "exact heights": exact_heights}
    turns = [[timeit(partial(way, codes), number=1) for way in ways.values()] for _ in range(3)]
    rates = len(codes.k) / np.min(turns, axis=0)
    return "\n".join(f"{x}: {y:,.0f} a second" for x, y in zip(ways, rates, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "speed"])
    parser.add_argument("--model", type=Path, default=run5.TRAINED)
    given = parser.parse_args()
    print({"accuracy": accuracy, "speed": speed}[given.what](given.model))


if __name__ == "__main__":
    main()
