import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import prepare

ROOT = Path(__file__).resolve().parent.parent
COURSE_SAMPLE = ROOT.parent / "shared" / "course_sample"


def run_script(*arguments, script="train_model_v5.py", cwd=None, **environment):
    """Run a script of the project as a user would; returns the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=600,
    )


def write_dataset(path, rows_per_group=40, seed=1):
    """A dataset of all nine groups at `path`; returns its arrays."""
    arrays = prepare.make_dataset(rows_per_group, seed)
    del arrays["key"]
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small.npz"
    write_dataset(path)
    return path
