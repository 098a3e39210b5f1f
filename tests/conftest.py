import functools
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf

import train_model_v5 as run5
from data import matrices
from data.dataset import load_dataset
from data.features import BasisFeatures, MinorLayer
from data.prepare import make_dataset

ROOT = Path(__file__).resolve().parent.parent
COURSE_SAMPLE = ROOT.parent / "shared" / "course_sample"
NARROW = 1 / 32  # The width of networks where only what is around them is tested.
# The design's: units of hidden layers, and rates of Dropout, in the order of the layers.
UNITS = [256, 512, 1024, 1024, 1024, 1024, 1024, 512, 256, 128]
RATES = [0.3, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1]


for profile, examples in (("many", 1500), ("few", 25)):
    hypothesis.settings.register_profile(profile, max_examples=examples, deadline=None)
hypothesis.settings.load_profile("few")  # Unless --hypothesis-profile names the other one.


def pytest_collection_modifyitems(items):
    """The longest file comes first."""
    items.sort(key=lambda item: item.path.name != "test_run.py")


def run_script(*arguments, cwd=None, **environment):
    """Run a command of Python as a user would; returns the finished process with its output."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=600,
    )


@functools.cache
def made(rows_per_group, seed):
    return make_dataset(rows_per_group, seed)


def write_dataset(path, rows_per_group=40, seed=1):
    """A dataset of all nine groups at `path`; returns its arrays."""
    dataset = made(rows_per_group, seed)
    arrays = {name: getattr(dataset, name).copy() for name in ("k", "m", "P", "height")}
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small.npz"
    write_dataset(path)
    return path


@pytest.fixture(scope="session")
def small(small_npz):
    """The small dataset as it is read."""
    return load_dataset(small_npz)


@pytest.fixture(scope="session", autouse=True)
def eager():
    """No graphs are traced, which takes longer than what is computed here."""

    def compute_output_spec(self, k, m, P_matrix):
        dtype = "float32" if isinstance(self, BasisFeatures) else "float64"
        return keras.KerasTensor((None, self.WIDTH), dtype)

    tf.config.run_functions_eagerly(True)
    MinorLayer.compute_output_spec = compute_output_spec


@pytest.fixture
def graphs(eager):
    """Graphs are traced as in a user's process, where that is tested."""
    tf.config.run_functions_eagerly(False)
    yield
    tf.config.run_functions_eagerly(True)


@contextmanager
def short_search():
    """Low codes after a few rounds of the search, where only what is done with them is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "SEARCH_ROUNDS", (1, 5))
        patch.setattr(matrices, "VERY_LOW_ROUNDS", (1, 5))
        yield


@pytest.fixture
def quick_search():
    with short_search():
        yield


def watch(thing, name):
    """A mock in place of an attribute, which does the same and keeps the arguments."""
    original = getattr(thing, name)
    return mock.patch.object(thing, name, autospec=True, side_effect=original)


@contextmanager
def interrupted(epoch):
    """Ctrl-C when this epoch, from 0, begins."""
    start = run5.Batches.start_epoch

    def stopped(self, number, logs=None):
        if number == epoch:
            raise KeyboardInterrupt
        start(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run5.Batches, "start_epoch", stopped)
        yield
