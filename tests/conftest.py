import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import pytest
import tensorflow as tf

import train_model_v5 as run5
from data import matrices, prepare
from data.dataset import load_dataset

ROOT = Path(__file__).resolve().parent.parent
NARROW = 1 / 32  # The width of networks where only what is around them is tested.
# The rounds of the search for low codes in a user's process.
WHOLE_SEARCH = {x: getattr(matrices, x) for x in ("SEARCH_ROUNDS", "VERY_LOW_ROUNDS")}

hypothesis.settings.register_profile("few", max_examples=25, deadline=None)
hypothesis.settings.load_profile("few")


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


@pytest.fixture(scope="session", autouse=True)
def quick():
    """No graphs are traced and no codes are searched for long, where nothing depends on it."""
    tf.config.run_functions_eagerly(True)
    matrices.SEARCH_ROUNDS = matrices.VERY_LOW_ROUNDS = (1, 5)


@pytest.fixture
def graphs(quick):
    """Graphs are traced as in a user's process, where that is tested."""
    tf.config.run_functions_eagerly(False)
    yield
    tf.config.run_functions_eagerly(True)


@pytest.fixture
def whole_search(quick, monkeypatch):
    """The search is as long as a user's, where the codes are compared."""
    for name, rounds in WHOLE_SEARCH.items():
        monkeypatch.setattr(matrices, name, rounds)


@pytest.fixture(scope="session")
def small_npz(quick, tmp_path_factory):
    """A dataset of forty codes of each group."""
    data, path = prepare.make_dataset(40, 1), tmp_path_factory.mktemp("data") / "small.npz"
    np.savez_compressed(path, k=data.k, m=data.m, P=data.P, height=data.height)
    return path


@pytest.fixture(scope="session")
def small(small_npz):
    """The small dataset as it is read."""
    return load_dataset(small_npz)


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
