"""Errors of the model in run_5/ on codes beyond the test set.

python tests/benchmark.py
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_model_v5 as run5  # isort: skip

import numpy as np

from data.dataset import Codes, exact_heights
from data.heights import OPEN_GROUPS, N
from data.prepare import VERY_LOW


def codes_of(data) -> Codes:
    return Codes(np.full(len(data), N), data.k, data.m, data.P)


def main() -> None:
    """Mean and ridge are those of the default run. Codes of its training and validation set are
    left out."""
    settings, to_features = run5.Settings(), run5.feature_model("basis")
    shipped, network = run5.load_dataset(*settings.data), run5.load_trained(run5.TRAINED)
    sets = run5.add_extra_codes(run5.make_sets(shipped, settings), settings)
    train_set = sets["training"]
    train_set = replace(train_set, features=run5.outputs_of(to_features, train_set))
    tenths = shipped.take(np.abs(shipped.P).max(axis=1) <= 8)
    tenths = replace(tenths, P=tenths.P * 0.1, key=np.zeros(len(tenths), dtype="S32"))
    tenths = replace(tenths, height=exact_heights(codes_of(tenths)))
    very_low = run5.load_dataset(VERY_LOW)
    beyond = {
        "test set": sets["test"],
        "entries within 8, times 0.1": tenths.take(np.isfinite(tenths.height)),
        "very small heights": very_low.take(np.arange(9, len(very_low))),
    }
    course = (run5.HERE.parent / "shared" / "course_sample").glob("*.pkl")
    if files := sorted(course, reverse=True):  # Codes and heights.
        beyond["sample of the course's DS-1"] = run5.load_dataset(*files)
    known = np.concatenate([train_set.key, sets["validation"].key])
    for name, data in beyond.items():
        new = data.take(~np.isin(data.key, known))
        new = replace(new, features=run5.outputs_of(to_features, new))
        ways = run5.simple_predictions(train_set, new, "basis")
        ways["Run 5"] = np.log2(run5.outputs_of(network, new)[:, 0].astype(float))
        errors = run5.group_errors(new, new.log2_height, ways)
        six = errors[errors.index.isin(OPEN_GROUPS)].mean().round(4).to_dict()
        print(f"{name}: {len(new):,} codes, {len(data) - len(new):,} left out; six groups: {six}")
        print(errors.round(4).to_string(), flush=True)


if __name__ == "__main__":
    main()
