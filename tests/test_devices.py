"""Training on several devices at once, here two logical CPUs, against one."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

RUN = """
import sys
import tensorflow as tf
import train_model_v5 as run5
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
if sys.argv[1] == "two":
    run5.all_gpus = lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
sys.exit(run5.main(sys.argv[2:]))
"""


def test_two_devices_learn_what_one_does_from_the_same_batches(tmp_path, small_npz):
    """With dropout and clipped gradients; the 306 training rows make three batches, each halved between the devices."""

    def history(devices):
        output = tmp_path / devices
        command = [sys.executable, "-c", RUN, devices, "--data", small_npz, "--output", output, "--drawn", "0"]
        command += ["--features", "raw", "--batch-size", "102", "--epochs", "2", "--precision", "float32"]
        done = subprocess.run([str(x) for x in command], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads((output / "metrics.json").read_text())["history"]

    one, two = history("one"), history("two")
    for epoch in range(2):
        for name in ("loss", "log2_mse", "val_loss", "val_log2_mse"):
            assert two[epoch][name] == pytest.approx(one[epoch][name], rel=1e-4), (epoch, name)
