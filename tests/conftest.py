import functools
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
COURSE_SAMPLE = ROOT.parent / "shared" / "course_sample"
NARROW = 1 / 32  # The width of networks where only what is around them is tested.


def pytest_configure(config):
    slow = config.option.markexpr == "slow"
    examples = 1500 if slow else 25
    hypothesis.settings.register_profile("project", max_examples=examples, deadline=None)
    hypothesis.settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Under -m slow hypothesis' tests run too, with more examples. The longest file comes first."""
    items.sort(key=lambda item: item.path.name != "test_run.py")
    for item in items:
        if config.option.markexpr == "slow" and hasattr(item.obj, "is_hypothesis_test"):
            item.add_marker("slow")


def run_script(*arguments, script="train_model_v5.py", cwd=None, **environment):
    """Run a script of the project as a user would; returns the finished process with its output."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=600,
    )


@functools.cache
def made(rows_per_group, seed):
    from data.prepare import make_dataset

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
    from data.dataset import load_dataset

    return load_dataset(small_npz)


@pytest.fixture
def short_search(monkeypatch):
    """Low codes after a few rounds of the search, where only what is done with them is tested."""
    from data import matrices

    monkeypatch.setattr(matrices, "SEARCH_ROUNDS", (1, 5))
    monkeypatch.setattr(matrices, "VERY_LOW_ROUNDS", (1, 5))


@pytest.fixture
def eager(short_search):
    """Without graphs to trace, where only what is around the network is tested."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
