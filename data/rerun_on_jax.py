"""The trainings on raw P of rerun_baselines.py, by Keras' JAX backend: for a machine that has a GPU and JAX.

    python data/rerun_on_jax.py --runs run4 --seed 1

The options, the code that trains and the rows of the csv are those of rerun_baselines.py; only the random numbers
differ. A training takes minutes where two CPU cores take an hour and more. The features need TensorFlow.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["KERAS_BACKEND"] = "jax"
if not find_spec("jax"):
    print("rerun_on_jax.py: found no package jax, expected it to be installed", file=sys.stderr)
    sys.exit(2)

import jax
import keras  # noqa: F401  (First, so that the script does not set its own backend.)

jax.config.update("jax_default_matmul_precision", "highest")  # float32, as on a CPU, and not TF32.
# All that the script wants of TensorFlow is its list of GPUs.
sys.modules["tensorflow"] = ModuleType("tensorflow")
sys.modules["tensorflow"].config = SimpleNamespace(list_physical_devices=lambda kind: [])

from data import rerun_baselines  # noqa: E402

del sys.modules["tensorflow"]  # Keras looks whether it is there.
on_features = [run for run, (_, changes) in rerun_baselines.VARIANTS.items() if changes.get("features") != "raw"]
rerun_baselines.RUNS = [run for run in rerun_baselines.RUNS if run not in on_features]

if __name__ == "__main__":
    sys.exit(rerun_baselines.main())
