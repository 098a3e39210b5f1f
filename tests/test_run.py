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
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT, run_script

import train_model_v5 as run5
from data.dataset import Codes, exact_heights
from data.heights import N

# Each of them is away from its default.
SETTINGS = ["--test-codes", "50", "--val-fraction", "0.25", "--extra-codes", "2", "--seed", "7"]
SETTINGS += ["--width", str(NARROW), "--dropout", "0.5", "--batch-size", "64", "--epochs", "9"]
SETTINGS += ["--stop-patience", "1", "--stop-min-delta", "99", "--learning-rate", "0.002"]
SETTINGS += ["--group-weights", *"123456789"]
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
    variables |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
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
    """(what was printed, folder) of a run of two epochs, interrupted by SIGTERM after the first.

    Without docstrings and a safe path, from another folder, with a space and letters
    outside ASCII and UTF-8 in the paths, in a locale that knows ASCII alone.
    """
    folder = tmp_path_factory.mktemp("a rün")
    data, output = folder / os.fsdecode(b"sm\xe4ll data.npz"), folder / "results"
    shutil.copy(small_npz, data)
    output.mkdir()
    (output / "metrics.json").write_text("earlier")
    arguments = ["--data", data, "--output", output, *SETTINGS]
    safe = (
        ["-P", "-OO"] if version("tensorflow") >= "2.21" else ["-P"]
    )  # Before, it needs docstrings.
    command = [sys.executable, *safe, ROOT / "train_model_v5.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | home, **pipes)
    said = []
    for line in process.stdout:
        said.append(line)
        if "val_loss" in line:
            break
    process.terminate()
    assert process.communicate()[1].splitlines()[-1].endswith("the same command resumes training")
    assert process.returncode == 130
    assert sorted(path.name for path in output.iterdir()) == ["metrics.json", "unfinished"]
    assert (output / "metrics.json").read_text() == "earlier"
    (output / "unfinished" / ".tmp-1-checkpoint.npz").write_text("left by a kill")
    resumed = run_script(*arguments, cwd=folder, **home)
    assert resumed.returncode == 0, resumed.stderr
    assert "Traceback" not in resumed.stderr
    return "".join(said) + resumed.stdout, output


@pytest.fixture(scope="module")
def metrics(finished):
    return json.loads((finished[1] / "metrics.json").read_text())


def without_times(folder):
    results = json.loads((folder / "metrics.json").read_text())
    return {name: x for name, x in results.items() if name != "times"}


def test_a_killed_run_is_resumed_and_leaves_its_results_alone(finished, metrics):
    first, second = finished[0].split("resuming after epoch 1")
    assert len(metrics["history"]) == 2 and metrics["stopped_early"]
    assert sorted(path.name for path in finished[1].iterdir()) == RESULTS
    assert len(re.findall(r"^epoch 2: .*\(0:00:00\)", second, re.M)) == 1
    order = ["reading ", "making 540 extra codes", "k=4, m=2: 90", "computing", "\ntraining\n"]
    for said in (first, f"reading {second}"):
        places = [said.index(x) for x in order]
        assert places == sorted(places)


@pytest.fixture(scope="module")
def best(finished):
    return run5.load_trained(finished[1] / "best_model_run5.h5")


def test_an_import_leaves_the_float_type_of_the_caller_alone(home):
    code = "import keras, train_model_v5; assert keras.config.floatx() == 'float16'"
    env = os.environ | home | {"MPLBACKEND": "Agg"}  # Keras imports matplotlib.
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env)
    assert process.returncode == 0


LOAD_ELSEWHERE = """
import sys, numpy as np, tensorflow as tf
given = np.load("given.npz")
served = tf.saved_model.load("exported model")
inputs = [tf.constant(given[name]) for name in ("n", "k", "m", "P")]
np.save("heights.npy", served.serve(inputs).numpy())
assert not {"train_model_v5", "data"} & set(sys.modules)
"""


def test_another_process_loads_the_export_without_our_code(best, small, home, tmp_path):
    best.export(tmp_path / "exported model", verbose=False)
    P = small.P * (np.arange(360) % 8 > 0)[:, None]  # By P = 0 heights are infinite.
    codes = Codes(np.full(360, 9), small.k, small.m, P.astype("float64"))
    n, k, m = (x.astype("int32")[:, None] for x in codes[:3])
    np.savez(tmp_path / "given.npz", n=n, k=k, m=m, P=codes.P)
    command = [sys.executable, "-c", LOAD_ELSEWHERE]
    env = os.environ | home | {"MPLBACKEND": "Agg"}  # Keras imports matplotlib.
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    heights = np.load(tmp_path / "heights.npy")
    np.testing.assert_allclose(heights, run5.outputs_of(best, codes), rtol=1e-5)
    np.testing.assert_array_equal(np.isinf(heights[:, 0]), np.isinf(exact_heights(codes)))


def run_settings():
    return run5.parse_arguments(SETTINGS)[0]


@pytest.fixture(scope="module")
def sets(small):
    """The sets of the run, made again, and the low codes of the test set."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "stdout", None)
    sets = run5.add_extra_codes(run5.make_sets(small, run_settings()), run_settings())
    patch.undo()
    to_features = run5.feature_model("basis")
    sets["low codes"] = sets["test"].take(sets["test"].low)
    return {
        x: replace(data, features=run5.outputs_of(to_features, data)) for x, data in sets.items()
    }


def by_hand(sets, best, name):
    """log2 heights of a set by each way to predict, by other means than the script's."""
    train_set, data = sets["training"], sets[name]
    found = {way: np.empty(len(data)) for way in ("mean", "bound", "ridge")}
    found["network"] = np.log2(run5.outputs_of(best, data)[:, 0].astype(float))
    for i in range(9):
        fitted, rows = train_set.group == i, data.group == i
        x, y = train_set.features[fitted].astype(float), train_set.log2_height[fitted]
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        scaled, centre = (x - mean) / np.where(deviation > 0, deviation, 1), y.mean()
        weights = np.linalg.solve(scaled.T @ scaled + np.eye(252), scaled.T @ (y - centre))
        z = (data.features[rows] - mean) / np.where(deviation > 0, deviation, 1)
        found["ridge"][rows] = z @ weights + centre
        found["mean"][rows] = y[~train_set.low[fitted]].mean()
        found["bound"][rows] = data.features[rows, 0]
    return found


def test_metrics_are_those_of_the_saved_model_and_of_simple_ways(metrics, best, sets):
    counts = {"validation": 10, "test": 50, "low codes": 5}
    for name, n in counts.items():
        data, rows = sets[name], metrics["errors"][name]
        assert [(row["k"], row["m"], row["n"]) for row in rows] == [(*x, n) for x in run5.GROUPS]
        for way, predicted in by_hand(sets, best, name).items():
            squares = (predicted - data.log2_height) ** 2
            expected = [squares[data.group == i].mean() for i in range(9)]
            np.testing.assert_allclose([row[way] for row in rows], expected, rtol=1e-3, atol=1e-9)
    error = by_hand(sets, best, "test")["network"] - sets["test"].log2_height
    six = np.isin(sets["test"].group, [i for i, (k, m) in enumerate(run5.GROUPS) if k + m < 9])
    for name, part in (
        ("six", error[six]),
        ("all", error),
        ("6,3", error[sets["test"].group == 8]),
    ):
        found = metrics["test_statistics"][name]
        assert found["bias"] == pytest.approx(part.mean(), rel=1e-3, abs=1e-5)
        assert found["max"] == pytest.approx(2 ** np.abs(part).max(), rel=1e-4)


def test_metrics_say_what_the_run_was(metrics, sets, small):
    assert metrics["sets"] == {x: len(sets[x]) for x in ("training", "validation", "test")}
    assert metrics["sets"] == {"training": 810, "validation": 90, "test": 450}
    assert metrics["extra_codes"] == 540 and metrics["rows_per_epoch"] == 270
    settings = metrics["settings"]
    assert settings.pop("data") == small.about["sha256"] == metrics["dataset"]["sha256"]
    expected = json.loads(json.dumps(vars(run_settings()), default=str))
    assert settings == {x: expected[x] for x in expected if x not in ("data", "output")}
    losses = [row["val_loss"] for row in metrics["history"]]
    assert metrics["best_epoch"] == 1 + losses.index(min(losses)) and metrics["epochs_run"] == 2
    rows = pd.DataFrame(metrics["errors"]["validation"])
    assert min(losses) == pytest.approx(rows["network"].mean(), rel=1e-3)
    assert "less than 99.0 in 1 epochs after epoch 1" in metrics["ended"]
    assert 0 < metrics["times"]["seconds"] < 300


def numbers(line):
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line)]


def tables_of(metrics):
    tables = {x: pd.DataFrame(t).set_index(["k", "m"]) for x, t in metrics["errors"].items()}
    return {x: table.rename(columns={"network": "Run 5"}) for x, table in tables.items()}


def test_the_report_has_the_figures_the_best_way_first(finished, metrics):
    printed, output = finished
    report = (output / "detailed_comparison.txt").read_text()
    lines = report.splitlines()
    assert report.strip() in printed and len(lines) <= 66 and max(map(len, lines)) <= 100
    assert f"width {NARROW}" in " ".join(lines[1:3]) and r"sm\udce4ll data.npz" in report
    tables, shown = tables_of(metrics), metrics["test_statistics"]
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
        of_run = shown[f"{k},{m}"]
        expected = [of_run[x] for x in ("RMS factor", "95%", "max", "bias")]
        assert numbers(line)[4:8] == pytest.approx(expected, abs=6e-3)
        expected = low.loc[(k, m), ["ridge", "Run 5"]].tolist()
        assert numbers(line)[8:] == pytest.approx(expected, abs=6e-5)


def test_statistics_say_what_log2_errors_mean():
    error = np.log2(np.repeat([1, 1.04, 0.94, 0.5], [90, 4, 4, 2]))
    found = run5.error_statistics(error)
    assert np.log2(found["RMS factor"]) ** 2 == pytest.approx(np.mean(error**2))
    assert found["in 5%"] == 0.94 and found["bias"] == pytest.approx(error.mean())
    assert found["95%"] == pytest.approx(1 / 0.94) and found["max"] == pytest.approx(2)


@pytest.fixture(scope="module")
def shipped():
    """The metrics of the run in the repository."""
    return json.loads((ROOT / "run_5" / "metrics.json").read_text())


def report_of(metrics):
    return run5.make_report(metrics, *run5.read_baselines())


def test_the_report_compares_run_5_with_the_published_figures(shipped, metrics):
    report = report_of(shipped)
    lines = re.split(r"k,m +Run 2 +Run 4 +Run 5 +vs R2 +vs R4 +n\n", report)[1].splitlines()
    published, _ = run5.read_baselines()
    for row, line in zip(shipped["errors"]["validation"], lines, strict=False):
        run2, run4 = published.loc[row["k"], row["m"]]
        versus = [100 * (row["network"] / run - 1) for run in (run2, run4)]
        assert numbers(line)[:3] == pytest.approx([run2, run4, row["network"]], abs=1e-6)
        assert numbers(line)[3:] == pytest.approx(versus, abs=0.06)
        assert line.startswith(f"k={row['k']},m={row['m']} ") and line.endswith(f"n={row['n']}")
    assert "vs R2" not in report_of(metrics)  # Ten rows a group say nothing.


@pytest.mark.parametrize("error", [1e-9, 50.0, math.nan])
def test_targets_are_reported_as_met_or_missed(shipped, metrics, error):
    errors = {x: [row | {"network": error} for row in t] for x, t in shipped["errors"].items()}
    report = report_of(shipped | {"errors": errors})
    missed = re.search(r"Run 5 misses ([\w, ]+);", " ".join(report.split()))[1]
    assert missed == ("none" if error < 1 else ", ".join(run5.TARGETS))
    assert "misses" not in report_of(metrics)


def test_trainings_are_named_incomplete_where_they_are(shipped):
    published, rows = run5.read_baselines()
    rows.loc[rows["run"] == "Run 4", "ended"] = "--epochs 3"
    assert re.search(r"^Run 4, incomplete +42", run5.make_report(shipped, published, rows), re.M)


def test_the_curves_are_loss_and_val_loss(metrics):
    (panel,) = run5.plot_history(metrics).axes
    history = pd.DataFrame(metrics["history"])
    loss, val_loss, best, ridge = panel.lines
    for line, name in ((loss, "loss"), (val_loss, "val_loss")):
        assert line.get_label().startswith(f"{name}:")
        np.testing.assert_array_equal(line.get_xdata(), [1, 2])
        np.testing.assert_array_equal(line.get_ydata(), history[name])
    epoch = metrics["best_epoch"]
    assert best.get_xydata().tolist() == [[epoch, history["val_loss"][epoch - 1]]]
    rows = pd.DataFrame(metrics["errors"]["validation"])
    assert ridge.get_ydata()[0] == pytest.approx(np.average(rows["ridge"], weights=rows["n"]))
    assert panel.get_title().endswith(metrics["ended"])


def test_the_scatter_shows_every_code_of_the_six_groups(sets):
    data = sets["test"]
    predicted = data.log2_height + np.random.default_rng(0).normal(0.2, 1, len(data))
    figure = run5.plot_predictions(data, predicted)
    for panel in figure.axes:
        k, m = map(int, re.match(r"k=(\d), m=(\d)", panel.get_title()).groups())
        for low, points in enumerate(panel.collections):
            rows = (data.k == k) & (data.m == m) & (data.low == low)
            shown = np.stack([data.log2_height, predicted - data.log2_height], axis=1)[rows]
            np.testing.assert_array_equal(points.get_offsets(), shown)
        error = (predicted - data.log2_height)[(data.k == k) & (data.m == m)]
        assert f"bias {error.mean():+.3f}" in panel.get_title()
    hard = np.abs(predicted - data.log2_height)[data.k + data.m == N].max()
    assert len(figure.axes) == 6 and f"{hard:.2g}" in figure.get_suptitle()


def test_the_comparison_shows_every_way_and_run_2_on_validation_and_new_codes(shipped):
    published, rows = run5.read_baselines()
    left, right = run5.plot_comparison(shipped, published, rows).axes
    test = tables_of(shipped)["test"]
    six = run5.TIERS["easy"] + run5.TIERS["medium"]
    ways = [text.get_text() for text in left.texts]
    assert sorted(ways) == ["Run 5", "bound", "mean", "ridge"]
    for way, line, text in zip(ways, left.lines, left.texts, strict=True):
        by_name = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        expected = {f"{k},{m}": test.loc[(k, m), way] ** 0.5 for k, m in six}
        assert by_name == pytest.approx(expected) and text.xy[1] == line.get_ydata()[-1]
    mean = rows.groupby("run")[["log2_mse", "test_log2_mse"]].mean()
    expected = [*mean.loc["Run 2, rows split at random"], mean.loc["Run 2", "test_log2_mse"]]
    expected += [test["bound"].mean(), test["Run 5"].mean()]
    assert [bar.get_height() for bar in right.patches] == pytest.approx(expected)
    lines = [line.get_ydata()[0] for line in right.lines]
    assert lines == pytest.approx(published.mean().tolist())


def test_the_repository_holds_the_model_and_the_report_of_one_run(shipped):
    dataset = run5.load_dataset(*run5.Settings().data)
    assert shipped["settings"]["data"] == dataset.about["sha256"]
    rows = run5.split_dataset(dataset, seed=shipped["settings"]["seed"])[1]
    val_set = dataset.take(rows)
    heights = run5.outputs_of(run5.load_trained(run5.TRAINED), val_set)[:, 0].astype(float)
    squares = (np.log2(heights) - val_set.log2_height) ** 2
    expected = pd.DataFrame(shipped["errors"]["validation"])["network"]
    errors = [squares[val_set.group == i].mean() for i in range(9)]
    np.testing.assert_allclose(errors, expected, rtol=0.01)
    report = (ROOT / "run_5" / "detailed_comparison.txt").read_text()
    assert report_of(shipped) == report


def rows_of_the_readme(heading):
    """{first cell: numbers} of the README's table whose head begins with this."""
    lines = (ROOT / "README.md").read_text().split(f"| {heading}")[1].split("\n\n")[0].splitlines()
    cells = [line.strip("| ").split(" | ", 1) for line in lines[2:]]
    return {first: [float(x) for x in re.findall(r"\d[\d.]*", rest)] for first, rest in cells}


def test_the_readme_has_the_figures_of_the_runs(shipped):
    tables, rows = tables_of(shipped), run5.read_baselines()[1]
    six = list(run5.OPEN_GROUPS)
    ways = ["mean", "bound", "ridge", "Run 5"]
    both = tables["test"][ways].assign(low=tables["low codes"]["Run 5"])
    expected = {f"({k},{m})": both.loc[k, m] for k, m in six}
    expected |= {"these six": both.loc[six].mean(), "all nine": both.mean()}
    found = rows_of_the_readme("group")
    assert list(found) == list(expected)
    for name, figures in found.items():
        assert figures == pytest.approx(expected[name].tolist(), rel=2e-4, abs=6e-5), name

    by_run = rows.groupby(["run", "seed", "k", "m"])["test_log2_mse"].mean().unstack(["k", "m"])
    of_six = by_run[six].mean(axis=1)
    errors = dict(zip(ways, tables["test"].loc[six, ways].mean(), strict=True))
    order = [errors["mean"], of_six["Run 5 on raw P"].mean(), *list(errors.values())[1:]]
    for name, error in zip(found := rows_of_the_readme("way"), order, strict=True):
        factor, shown = found[name][-2:]
        assert factor == pytest.approx(2**error**0.5, abs=6e-3), name
        assert shown == pytest.approx(error, rel=2e-4, abs=6e-5), name

    text = " ".join((ROOT / "README.md").read_text().split())
    shown = text.split("Three runs each have ")[1].split("by default")[0]
    shown = [x.split(" to ") for x in re.findall(r"0\.\d+(?: to 0\.\d+)?", shown)]
    for found, run in zip(shown, ("without extra codes", "without dropout", ""), strict=True):
        seeds = of_six[f"Run 5 {run}".strip()]
        assert len(seeds) == 3
        assert float(found[0]) == pytest.approx(seeds.min(), abs=6e-5)
        assert float(found[-1]) == pytest.approx(seeds.max(), abs=6e-5)
    split = rows[rows["run"] == "Run 2, rows split at random"]
    for error in split[["log2_mse", "test_log2_mse"]].mean():
        assert f" {error:.3f} " in text


def short_run(small_npz, output, *more, epochs=1):
    """The exit status of a run on raw P in a narrow network."""
    arguments = ["--data", small_npz, "--output", output, "--width", NARROW, "--features", "raw"]
    arguments += ["--extra-codes", 0, "--test-codes", 10, "--epochs", epochs, *more]
    return run5.main([*map(str, arguments)])


def test_a_run_ended_by_epochs_goes_on_with_more_and_fresh_starts_anew(
    small_npz, small, tmp_path, eager, capsys
):
    start = run5.Batches.start_epoch

    def stopped(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt
        start(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run5.Batches, "start_epoch", stopped)
        assert short_run(small_npz, tmp_path, "--fresh", epochs=50) == 130
    assert "the same command without --fresh resumes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    assert short_run(small_npz, tmp_path, "--batch-size", 10) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert "batch_size 256, now 10" in refused
    for epochs, done in ((1, 2), (3, 3)):
        assert short_run(small_npz, tmp_path, epochs=epochs) == 0
        assert "resuming after epoch 2" in (said := capsys.readouterr().out)
        assert "ended by --epochs" in said and "goes on" in said
        assert without_times(tmp_path)["epochs_run"] == done
    network = run5.load_trained(tmp_path / "best_model_run5.h5").get_layer("log2_height")
    P = small.P[run5.split_dataset(small)[0]]
    mean = np.ravel(network.get_layer("scale").mean)
    np.testing.assert_allclose(mean, P.mean(axis=0), rtol=1e-4, atol=1e-4)

    (tmp_path / "unfinished" / "checkpoint.npz").write_text("damaged")
    assert short_run(small_npz, tmp_path) == 2
    capsys.readouterr()
    assert short_run(small_npz, tmp_path, "--fresh") == 0
    assert "has a finished run, which this new one will replace" in capsys.readouterr().out
    assert without_times(tmp_path)["epochs_run"] == 1


def test_a_run_needs_no_standard_output_and_no_folder_that_can_be_removed(
    small_npz, tmp_path, eager, monkeypatch
):
    def busy(*arguments, **options):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(os, "rmdir", busy)
    stopped = ["--stop-patience", 1, "--stop-min-delta", 99]
    assert short_run(small_npz, tmp_path, *stopped, epochs=9) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*RESULTS, "unfinished"]
    assert not [*(tmp_path / "unfinished").iterdir()]


def test_keras_shows_its_progress_where_output_is_a_terminal(
    small_npz, tmp_path, eager, monkeypatch, capsys
):
    monkeypatch.setattr(run5, "on_terminal", lambda: True)
    assert short_run(small_npz, tmp_path, epochs=2) == 0
    said = capsys.readouterr().out
    assert "Epoch 1/2" in said and "epoch 1: loss" not in said


def test_a_diverged_run_ends_with_one_line_and_its_epochs_can_be_reported(
    small_npz, tmp_path, eager, capsys, monkeypatch
):
    monkeypatch.setattr(run5, "lr_schedule", lambda epoch, lr, **_: lr if epoch < 1 else math.inf)
    assert short_run(small_npz, tmp_path, epochs=5) == 2
    problem = capsys.readouterr().err
    assert "epoch 2" in problem and problem.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    assert short_run(small_npz, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*RESULTS, "unfinished"]


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
        (["--model", "m.h5"], "--model: no effect without --predict"),
        (["--predict", "a", "--fresh", "--epochs", "3"], "--fresh, --epochs: no effect"),
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
    settings, typed = run5.parse_arguments([])
    assert settings == run5.Settings() and not typed
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
    command = [sys.executable, ROOT / "train_model_v5.py", "--data", small_npz, "--epochs", "150"]
    command += ["--stop-patience", "150", "--width", NARROW, "--test-codes", "10"]
    command += ["--extra-codes", "0", "--output"]
    command = [*map(str, command)]
    subprocess.run([*command, tmp_path / "unbroken"], check=True, stdout=subprocess.DEVNULL)
    for kill in range(21):
        pipes = {"stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([*command, tmp_path / "broken"], **pipes) as process:
            epochs = rng.integers(6)
            for line in process.stdout:
                done += re.findall(r"resuming after epoch (\d+)", line)
                epochs -= line.startswith("epoch")
                if epochs < 0 and kill < 20:
                    time.sleep(rng.uniform(0, 0.2))
                    process.kill()
        assert process.returncode == (-signal.SIGKILL if kill < 20 else 0)
    print(f"resumed after {done} epochs")
    done = [*map(int, done)]
    assert len(set(done)) > 5 and done == sorted(done)
    assert without_times(tmp_path / "unbroken") == without_times(tmp_path / "broken")
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [*RESULTS, "unfinished"]


@pytest.mark.slow
def test_the_lowest_versions_that_are_admitted_pass_the_tests(tmp_path):
    packages = (ROOT / "requirements.txt").read_text()
    lowest = re.sub(r">=(\d+\.\d+),.*", r"==\1.*", packages)
    lowest = re.sub(r">=(\d+\.\d+\.\d+),.*", r"==\1", lowest)
    assert lowest.count("==") == len(packages.split())
    (tmp_path / "lowest.txt").write_text(lowest)
    python = str(tmp_path / "venv" / "bin" / "python")
    files = ["-r", str(tmp_path / "lowest.txt"), "-r", str(ROOT / "tests" / "requirements.txt")]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *files], check=True)
    subprocess.run([python, "-m", "pytest", str(ROOT / "tests"), "-q"], check=True)
