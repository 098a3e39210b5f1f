"""The whole script as a user runs it, on a small dataset of all nine groups."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT, run_script
from PIL import Image

import train_model_v5 as run5
from data.dataset import Codes, exact_heights

RESULTS = [
    "best_model_run5.h5",
    "comparison.png",
    "detailed_comparison.txt",
    "metrics.json",
    "predictions_scatter.png",
    "training_history.png",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Environment variables of a user of a notebook on a network file system.

    keras.json names another backend and float type, the home is read-only (for all but root),
    MPLBACKEND is one that is not installed, and files cannot be locked.
    """
    folder = tmp_path_factory.mktemp("home")
    (folder / ".keras").mkdir()
    config = {"backend": "jax", "floatx": "float16", "image_data_format": "channels_first"}
    (folder / ".keras" / "keras.json").write_text(json.dumps(config))
    variables = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "HOME": str(folder)}
    variables |= {"KERAS_HOME": str(folder / ".keras"), "MPLCONFIGDIR": "/nowhere/to/be/made"}
    if shutil.which("gcc") and sys.platform == "linux":
        source = "#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }"
        (folder / "no_locks.c").write_text(source)
        command = ["gcc", "-shared", "-fPIC", "-o", folder / "no_locks.so", folder / "no_locks.c"]
        subprocess.run(command, check=True)
        variables["LD_PRELOAD"] = str(folder / "no_locks.so")
    folder.chmod(0o500)
    return variables


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_npz, home):
    """(what the resumed process printed, folder) of a run of two epochs, killed after the first.

    From another folder, with a space and a letter outside ASCII in the paths.
    """
    folder = tmp_path_factory.mktemp("a rün")
    data, output = folder / "smäll data.npz", folder / "results"
    shutil.copy(small_npz, data)
    output.mkdir()
    (output / "metrics.json").write_text("earlier")
    arguments = ["--data", data, "--output", output, "--epochs", "2", "--test-codes", "50"]
    arguments += ["--width", str(NARROW)]
    command = [sys.executable, ROOT / "train_model_v5.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | home, **pipes)
    for line in process.stdout:
        if "val_loss" in line:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in output.iterdir()) == ["metrics.json", "unfinished"]
    assert (output / "metrics.json").read_text() == "earlier"
    resumed = run_script(*arguments, cwd=folder, **home)
    assert resumed.returncode == 0, resumed.stderr
    assert "Traceback" not in resumed.stderr
    return resumed.stdout, output


@pytest.fixture(scope="module")
def metrics(finished):
    return json.loads((finished[1] / "metrics.json").read_text())


def without_times(folder):
    results = json.loads((folder / "metrics.json").read_text())
    return {name: x for name, x in results.items() if name != "times"}


def test_a_killed_run_is_resumed_and_leaves_its_results_alone(finished, metrics):
    assert "resuming after 1 epochs" in finished[0]
    assert len(metrics["history"]) == 2
    assert sorted(path.name for path in finished[1].iterdir()) == RESULTS
    assert len(re.findall(r"^epoch 2: .*\(0:00:00\)", finished[0], re.M)) == 1


@pytest.fixture(scope="module")
def best(finished):
    return run5.load_trained(finished[1] / "best_model_run5.h5")


LOAD_ELSEWHERE = """
import sys, numpy as np, tensorflow as tf
given = np.load("given.npz")
served = tf.saved_model.load("exported mödel")
inputs = [tf.constant(given[name]) for name in ("n", "k", "m", "P")]
np.save("heights.npy", served.serve(inputs).numpy())
assert not {"train_model_v5", "data"} & set(sys.modules)
"""


def test_another_process_loads_the_export_without_our_code(best, small, home, tmp_path):
    best.export(tmp_path / "exported mödel", verbose=False)
    P = small.P * (np.arange(360) % 8 > 0)[:, None]  # By P = 0 heights are infinite.
    codes = Codes(np.full(360, 9), small.k, small.m, P.astype("float64"))
    n, k, m = (x.astype("int32")[:, None] for x in codes[:3])
    np.savez(tmp_path / "given.npz", n=n, k=k, m=m, P=codes.P)
    command = [sys.executable, "-c", LOAD_ELSEWHERE]
    env = os.environ | home | {"MPLBACKEND": "Agg"}  # Keras imports matplotlib.
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    heights = np.load(tmp_path / "heights.npy")
    np.testing.assert_allclose(heights, run5.predict_all(best, codes), rtol=1e-5)
    np.testing.assert_array_equal(np.isinf(heights[:, 0]), np.isinf(exact_heights(codes)))


def test_metrics_are_those_of_the_saved_model(metrics, best, small):
    sets = run5.make_sets(small, run5.Settings(test_codes=50))
    sets["low codes"] = sets["test"].take(sets["test"].low)
    for name, n in (("validation", 6), ("test", 50), ("low codes", 5)):
        data = sets[name]
        error = np.log2(run5.predict_all(best, data)[:, 0]) - data.log2_height
        for i, row in enumerate(metrics["errors"][name]):
            assert (row["k"], row["m"], row["n"]) == (*run5.GROUPS[i], n)
            assert row["run5"] == pytest.approx(np.mean(error[data.group == i] ** 2), rel=1e-3)
            assert row["bound"] < row["mean"] and row["ridge"] >= 0
    lowest = min(row["val_loss"] for row in metrics["history"])
    assert metrics["history"][metrics["best_epoch"] - 1]["val_loss"] == lowest
    validation = np.mean([row["run5"] for row in metrics["errors"]["validation"]])
    assert lowest == pytest.approx(validation, rel=1e-3)


def numbers(line):
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line)]


def tables_of(metrics):
    tables = {x: pd.DataFrame(t).set_index(["k", "m"]) for x, t in metrics["errors"].items()}
    return {x: table.rename(columns={"run5": "Run 5"}) for x, table in tables.items()}


def test_the_report_has_the_figures_the_best_way_first(finished, metrics):
    printed, output = finished
    report = (output / "detailed_comparison.txt").read_text()
    lines = report.splitlines()
    assert report.strip() in printed and len(lines) <= 80 and max(map(len, lines)) <= 100
    assert f"width {NARROW}" in lines[1] and "50" in lines[1]
    tables = tables_of(metrics)
    test, low = tables["test"], tables["low codes"]
    six = run5.TIERS["easy"] + run5.TIERS["medium"]
    first = [line for line in lines if re.match(r"(Run 5|ridge|bound|mean) +\d", line)][:4]
    ways = [line.split("  ")[0] for line in first]
    means = test.loc[six, ways].mean()
    assert means.tolist() == sorted(means)
    for line, way in zip(first, ways, strict=True):
        expected = [2 ** means[way] ** 0.5, means[way], test[way].mean(), low.loc[six, way].mean()]
        assert numbers(line) == pytest.approx(expected, abs=6e-5)
    for (k, m), row in test.iterrows():
        (line,) = (line for line in lines if line.startswith(f"{k},{m} "))
        expected = [row["mean"], row["bound"], row["ridge"], row["Run 5"]]
        assert numbers(line)[:4] == pytest.approx(expected, abs=6e-5)
        factors = 2 ** np.sqrt(row[["bound", "ridge", "Run 5"]].to_numpy(dtype=float))
        assert numbers(line)[4:7] == pytest.approx(factors, abs=6e-3)
        assert numbers(line)[-1] == pytest.approx(low.loc[(k, m), "Run 5"], abs=6e-5)


def test_statistics_say_what_log2_errors_mean():
    error = np.log2(np.repeat([1, 1.04, 0.94, 0.5], [90, 4, 4, 2]))
    found = run5.error_statistics(error)
    assert np.log2(found["factor"]) ** 2 == pytest.approx(np.mean(error**2))
    assert found["in 5%"] == 0.94 and found["bias"] == pytest.approx(error.mean())
    assert found["95%"] == pytest.approx(1 / 0.94) and found["max"] == pytest.approx(2)


@pytest.fixture(scope="module")
def shipped():
    """The metrics of the run in the repository."""
    return json.loads((ROOT / "run_5" / "metrics.json").read_text())


def test_the_report_compares_run_5_with_the_published_figures(shipped, tmp_path, metrics):
    report = run5.write_report(shipped, tmp_path)
    lines = re.split(r"k,m +Run 2 +Run 4 +Run 5 +vs R2 +vs R4 +n\n", report)[1].splitlines()
    published, _ = run5.read_baselines()
    for row, line in zip(shipped["errors"]["validation"], lines, strict=False):
        run2, run4 = published.loc[row["k"], row["m"]]
        versus = [100 * (row["run5"] / run - 1) for run in (run2, run4)]
        assert numbers(line)[:3] == pytest.approx([run2, run4, row["run5"]], abs=1e-6)
        assert numbers(line)[3:] == pytest.approx(versus, abs=0.06)
    assert "vs R2" not in run5.write_report(metrics, tmp_path)  # Six rows a group say nothing.


@pytest.mark.parametrize("error", [1e-9, 50.0, math.nan])
def test_targets_are_reported_as_met_or_missed(shipped, metrics, tmp_path, error):
    errors = {x: [row | {"run5": error} for row in rows] for x, rows in shipped["errors"].items()}
    report = run5.write_report(shipped | {"errors": errors}, tmp_path)
    missed = re.search(r"Run 5 misses ([\w, ]+);", " ".join(report.split()))[1]
    assert missed == ("none" if error < 1 else ", ".join(run5.TARGETS))
    assert "misses" not in run5.write_report(metrics, tmp_path)


def test_pictures_are_drawn(finished):
    for name in (x for x in RESULTS if x.endswith(".png")):
        with Image.open(finished[1] / name) as picture:
            assert min(picture.size) > 600
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 40


def test_the_repository_holds_the_model_and_the_report_of_one_run(shipped, tmp_path):
    dataset = run5.load_dataset(*run5.Settings().data)
    assert shipped["settings"]["data"] == dataset.about["sha256"]
    rows = run5.split_dataset(dataset, seed=shipped["settings"]["seed"])[1]
    val_set = dataset.take(rows)
    heights = run5.predict_all(run5.load_trained(run5.TRAINED), val_set)[:, 0].astype(float)
    predicted = pd.DataFrame({"run5": np.log2(heights)})
    errors = run5.group_errors(val_set, val_set.log2_height, predicted)["run5"]
    expected = pd.DataFrame(shipped["errors"]["validation"])["run5"]
    np.testing.assert_allclose(errors, expected, rtol=0.01)
    report = (ROOT / "run_5" / "detailed_comparison.txt").read_text()
    assert run5.write_report(shipped, tmp_path) == report


def rows_of_the_readme(heading):
    """{first cell: numbers} of the README's table whose head begins with this."""
    lines = (ROOT / "README.md").read_text().split(f"| {heading}")[1].split("\n\n")[0].splitlines()
    cells = [line.strip("| ").split(" | ", 1) for line in lines[2:]]
    return {first: [float(x) for x in re.findall(r"\d[\d.]*", rest)] for first, rest in cells}


def test_the_readme_has_the_figures_of_the_runs():
    metrics = json.loads((ROOT / "run_5" / "metrics.json").read_text())
    tables = {x: pd.DataFrame(t).set_index(["k", "m"]) for x, t in metrics["errors"].items()}
    test, low = tables["test"], tables["low codes"]["run5"]
    both = test[["mean", "bound", "ridge", "run5"]].assign(low=low)
    six = run5.TIERS["easy"] + run5.TIERS["medium"]
    expected = {f"({k},{m})": both.loc[k, m] for k, m in run5.GROUPS if (k, m) in six}
    expected |= {"these six": both.loc[six].mean(), "all nine": both.mean()}
    found = rows_of_the_readme("group")
    assert list(found) == list(expected)
    for name, figures in found.items():
        assert figures == pytest.approx(expected[name].tolist(), rel=2e-4, abs=6e-5), name

    rows = run5.read_baselines()[1]
    for name, figures in rows_of_the_readme("training").items():
        runs = rows[rows["run"] == name].pivot(
            index=["k", "m"], columns="seed", values="test_log2_mse"
        )
        seeds = [len(runs.columns)]
        if name in test:  # Without a network, by the default run.
            runs, seeds = test[[name]], []
        means = run5.with_means(runs).loc[["easy", "medium", "hard", "all"]]
        expected = [*seeds, *means.mean(axis=1)]
        if len(runs.columns) > 1:
            expected += [means.loc["all"].min(), means.loc["all"].max()]
        assert figures == pytest.approx(expected, rel=2e-4, abs=6e-5), name


def short_run(small_npz, output, *more, epochs=1):
    """The exit status of a run on raw P in a narrow network."""
    arguments = ["--data", small_npz, "--output", output, "--width", NARROW, "--features", "raw"]
    arguments += ["--extra-codes", 0, "--test-codes", 10, "--epochs", epochs, *more]
    return run5.main([*map(str, arguments)])


def test_epochs_may_differ_on_resuming_and_fresh_starts_anew(
    small_npz, small, tmp_path, eager, capsys
):
    start = run5.Batches.start_epoch

    def stopped(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt
        start(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run5.Batches, "start_epoch", stopped)
        assert short_run(small_npz, tmp_path, epochs=50) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    assert short_run(small_npz, tmp_path, "--batch-size", 10) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert "batch_size 256, now 10" in refused
    assert short_run(small_npz, tmp_path) == 0
    assert without_times(tmp_path)["epochs_run"] == 2
    network = run5.load_trained(tmp_path / "best_model_run5.h5").get_layer("log2_height")
    P = small.P[run5.split_dataset(small)[0]]
    mean = np.ravel(network.get_layer("scale").mean)
    np.testing.assert_allclose(mean, P.mean(axis=0), rtol=1e-4, atol=1e-4)

    capsys.readouterr()
    assert short_run(small_npz, tmp_path) == 0
    assert "has a finished run, which this new one will replace" in capsys.readouterr().out

    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "checkpoint.npz").write_text("damaged")
    assert short_run(small_npz, tmp_path) == 2
    assert short_run(small_npz, tmp_path, "--fresh") == 0
    assert without_times(tmp_path)["epochs_run"] == 1


def test_a_folder_that_cannot_be_removed_does_not_spoil_a_run(
    small_npz, tmp_path, eager, monkeypatch, capsys
):
    def busy(*arguments, **options):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(os, "rmdir", busy)
    assert short_run(small_npz, tmp_path) == 0
    assert "sha256" in capsys.readouterr().out
    assert set(RESULTS) < {path.name for path in tmp_path.iterdir()}


def test_a_run_needs_no_standard_output(small_npz, tmp_path, eager, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert short_run(small_npz, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == RESULTS


def test_a_diverged_run_ends_with_one_line_and_its_epochs_can_be_reported(
    small_npz, tmp_path, eager, capsys, monkeypatch
):
    monkeypatch.setattr(run5, "lr_schedule", lambda epoch, lr, **_: lr if epoch < 1 else math.inf)
    assert short_run(small_npz, tmp_path, epochs=5) == 2
    problem = capsys.readouterr().err
    assert "epoch 2" in problem and problem.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    assert short_run(small_npz, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == RESULTS


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "2.5"], "--batch-size"),
        (["--seed", "-1"], "--seed"),
        (["--dropout", "4"], "--dropout"),
        (["--learning-rate", "fast"], "--learning-rate"),
        (["--val-fraction", "nan"], "--val-fraction"),
        (["--group-weights", "1", "2"], "--group-weights"),
        (["--features", "minors"], "minors"),
        (["--labels", "maybe"], "maybe"),
        (["--heights", "h.pkl"], "--predict"),
        (["--data", "none.npz"], "none.npz"),
        (["--data", "a", "b", "c"], "3 paths"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, arguments, word
):
    monkeypatch.chdir(tmp_path)
    try:
        status = run5.main([*arguments, "--output", "out"])
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and word in err.splitlines()[-1] and len(err.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_every_setting_is_an_option_with_its_default():
    settings, given = run5.parse_arguments([])
    assert settings == run5.Settings()
    assert given.labels == "check" and not (given.fresh or given.predict)
    for setting in fields(run5.Settings):
        value = {"features": "raw", "output": "out"}.get(setting.name, "0.5")
        value = "12" if isinstance(setting.default, int) else value
        values = [value] * (9 if setting.name == "group_weights" else 1)
        option = f"--{setting.name.replace('_', '-')}"
        changed, _ = run5.parse_arguments([option, *values])
        assert getattr(changed, setting.name) != setting.default
        assert replace(changed, **{setting.name: setting.default}) == settings


def test_an_output_path_that_is_a_file_is_refused(tmp_path, small_npz, capsys):
    (tmp_path / "file").write_text("mine")
    arguments = ["--data", str(small_npz), "--output", str(tmp_path / "file")]
    assert run5.main(arguments) == 2
    err = capsys.readouterr().err
    assert "file" in err and err.startswith("train_model_v5.py: ") and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(tmp_path, small_npz):
    rng, done = np.random.default_rng(0), []
    command = [sys.executable, ROOT / "train_model_v5.py", "--data", small_npz, "--epochs", "500"]
    command += ["--stop-patience", "500", "--width", NARROW, "--test-codes", "10", "--output"]
    command = [*map(str, command)]
    subprocess.run([*command, tmp_path / "unbroken"], check=True, stdout=subprocess.DEVNULL)
    for kill in range(21):
        pipes = {"stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([*command, tmp_path / "broken"], **pipes) as process:
            epochs = rng.integers(6)
            for line in process.stdout:
                done += re.findall(r"resuming after (\d+) epochs", line)
                epochs -= line.startswith("epoch")
                if epochs < 0 and kill < 20:
                    time.sleep(rng.uniform(0, 0.2))
                    process.kill()
        assert process.returncode == (-signal.SIGKILL if kill < 20 else 0)
    print(f"resumed after {done} epochs")
    done = [*map(int, done)]
    assert len(set(done)) > 5 and done == sorted(done)
    assert without_times(tmp_path / "unbroken") == without_times(tmp_path / "broken")
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == RESULTS
