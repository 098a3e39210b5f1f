"""A whole run: what it computes, its report and pictures, and what a user's command does."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from importlib.metadata import version
from types import SimpleNamespace
from unittest import mock

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT, interrupted, run_script, watch
from matplotlib.figure import Figure

import train_model_v5 as run5
from data.heights import GROUPS

# The design's: units of hidden layers, and rates of Dropout, in the order of the layers.
UNITS = [256, 512, 1024, 1024, 1024, 1024, 1024, 512, 256, 128]
RATES = [0.3, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1]
# Every setting is away from its default.
TYPED = "--val-fraction 0.25 --test-codes 50 --extra-codes 2 --epochs 9 --batch-size 144 --seed 7"
TYPED += f" --width {NARROW} --dropout 0.5 --learning-rate 0.002 --weight-decay 0.25"
TYPED += " --clipnorm 0.125 --constant-epochs 2 --decay 0.6 --plateau-factor 0.2"
TYPED += " --plateau-patience 8 --stop-patience 3 --stop-min-delta 99"
TYPED += " --group-weights 1 2 3 4 5 6 7 8 9"
TYPED = TYPED.split()
# Without features or extra codes, in one step an epoch; ended by early stopping after two epochs.
SHORT = f"--width {NARROW} --features raw --extra-codes 0 --test-codes 10 --batch-size 306".split()
STOPPED = ["--stop-patience", "1", "--stop-min-delta", "99"]
SCRIPT = str(ROOT / "train_model_v5.py")
RESULTS = ["best_model_run5.h5", "comparison.png", "detailed_comparison.txt", "metrics.json"]
RESULTS += ["predictions_scatter.png", "training_history.png"]
WAYS = ["mean", "bound", "ridge", "Run 5"]
SIX = [(4, 2), (4, 3), (4, 4), (5, 2), (5, 3), (6, 2)]
README = (ROOT / "README.md").read_text()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def without_times(folder):
    return {name: x for name, x in metrics_of(folder).items() if name != "times"}


def short_run(small_npz, output, *more, epochs=1):
    """The exit status of a run on raw P in a narrow network."""
    typed = ["--data", str(small_npz), "--output", str(output), "--epochs", str(epochs)]
    return run5.main([*typed, *SHORT, *more])


# --- what a run computes ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_npz):
    """A run, interrupted after two epochs and resumed: its folder, settings, figures, what it
    printed, and the objects that its results are made of."""
    run = SimpleNamespace(folder=tmp_path_factory.mktemp("run"), said=[])
    typed = [*TYPED, "--data", str(small_npz), "--output", str(run.folder)]
    run.settings = run5.parse_arguments(typed)[0]
    with (
        watch(run5, "require_disjoint") as disjoint,
        watch(run5, "results_of") as results,
        watch(Figure, "savefig") as saved,
    ):
        for status, stop in ((130, interrupted(2)), (0, contextlib.nullcontext())):
            with stop, contextlib.redirect_stdout(io.StringIO()) as said:
                assert run5.main(typed) == status
            run.said.append(said.getvalue())
    run.training, run.network, run.batches, run.sets = results.call_args.args
    test_set, low = run.sets["test"], run.sets["test"].low
    run.sets["low codes"] = replace(test_set.take(low), features=test_set.features[low])
    run.disjoint = {name: len(data) for name, data in disjoint.call_args.args[0].items()}
    figures = (call.args for call in saved.call_args_list)
    run.axes = {path.name.split("-")[-1]: figure.axes for figure, path in figures}
    run.metrics, run.date = metrics_of(run.folder), time.strftime("%Y-%m-%d")
    run.model = run5.load_trained(run.folder / "best_model_run5.h5")
    return run


def test_an_interrupted_run_ends_as_an_unbroken_one(finished, small_npz, tmp_path):
    with watch(keras.utils, "set_random_seed") as seeded:
        run5.main([*TYPED, "--data", str(small_npz), "--output", str(tmp_path)])
    assert seeded.call_args.args == (7,)
    assert without_times(tmp_path) == without_times(finished.folder)
    assert names_in(tmp_path) == names_in(finished.folder) == RESULTS


def test_each_step_of_a_run_is_announced(finished):
    steps = ["reading ", "making 540 extra codes", "k=4, m=2: 90", "computing", "\ntraining\n"]
    steps += ["Epoch 1/9", "Epoch 2/9", "resuming after epoch 2", "Epoch 3/9", "Epoch 4/9"]
    first, second = finished.said
    said = first + second.replace("reading", "").replace("computing", "")
    places = [said.index(x) for x in steps]
    assert places == sorted(places)
    assert f"val_loss: {finished.metrics['history'][0]['val_loss']:.4f}" in first


def test_settings_reach_what_they_name(finished):
    settings, training, optimizer = finished.settings, finished.training, finished.network.optimizer
    same = [x.name for x in fields(settings) if getattr(settings, x.name) == x.default]
    assert same == ["features"]
    assert type(optimizer) is keras.optimizers.AdamW
    assert (optimizer.weight_decay, optimizer.clipnorm) == (0.25, 0.125)
    assert (training.plateau.factor, training.plateau.patience) == (0.2, 8)
    assert (training.stopping.patience, abs(training.stopping.min_delta)) == (3, 99)
    rates = [row["learning_rate"] for row in finished.metrics["history"]]
    assert rates == pytest.approx([0.002, 0.002, 0.0012, 0.00072])
    layers = finished.network.layers
    rates = [layer.rate for layer in layers if isinstance(layer, run5.HashDropout)]
    units = [layer.units for layer in layers if isinstance(layer, keras.layers.Dense)]
    assert rates == pytest.approx(np.array(RATES) / 2)
    assert units == [max(4, x // 32) for x in UNITS] + [1]
    inputs, target, weights = finished.batches[0]
    groups = [GROUPS.index(x) for x in zip(*(inputs[y][:, 0].tolist() for y in "km"), strict=True)]
    assert weights.tolist() == [1 + i for i in groups] and len(target) == 144


def by_hand(run, name):
    """log2 heights of a set of a run by each way to predict, by other means than the script's."""
    train_set, data = run.sets["training"], run.sets[name]
    found = {way: np.empty(len(data)) for way in WAYS}
    found["Run 5"] = np.log2(run5.outputs_of(run.model, data)[:, 0].astype(float))
    for i in range(9):
        fitted, rows = train_set.group == i, data.group == i
        x, y = train_set.features[fitted].astype(float), train_set.log2_height[fitted]
        mean, deviation = x.mean(axis=0), np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
        scaled, z = ((features - mean) / deviation for features in (x, data.features[rows]))
        weights = np.linalg.solve(scaled.T @ scaled + np.eye(252), scaled.T @ (y - y.mean()))
        found["ridge"][rows] = z @ weights + y.mean()
        found["mean"][rows] = y[~train_set.low[fitted]].mean()
        found["bound"][rows] = data.features[rows, 0]
    return pd.DataFrame(found)


def statistics_by_hand(error):
    size = np.sort(np.abs(error))
    within = (np.log2(0.95) <= error) & (error <= np.log2(1.05))
    shares = [2 ** np.sqrt(np.mean(error**2)), within.mean(), 2 ** np.quantile(size, 0.95)]
    return [*shares, 2 ** size[-1], error.mean()]


def tables_of(metrics):
    """The errors of each way to predict by k and m, of each set."""
    tables = {x: pd.DataFrame(t).set_index(["k", "m"]) for x, t in metrics["errors"].items()}
    return {x: table.rename(columns={"network": "Run 5"}) for x, table in tables.items()}


def test_errors_are_those_of_the_saved_model_and_of_ways_without_a_network(finished):
    tables = tables_of(finished.metrics)
    for name, n in {"validation": 10, "test": 50, "low codes": 5}.items():
        data, table = finished.sets[name], tables[name]
        squares = by_hand(finished, name).sub(data.log2_height, axis=0) ** 2
        assert [*table.index] == [*GROUPS] and set(table["n"]) == {n}
        expected = squares.groupby(data.group).mean()
        np.testing.assert_allclose(table[WAYS], expected[WAYS], rtol=1e-3, atol=1e-9)
    data, statistics = finished.sets["test"], finished.metrics["test_statistics"]
    error = (by_hand(finished, "test")["Run 5"] - data.log2_height).to_numpy()
    parts = {"six": [0, 1, 2, 4, 5, 7], "all": range(9), "easy": [0, 1, 4], "medium": [2, 5, 7]}
    parts |= {f"{k},{m}": [i] for i, (k, m) in enumerate(GROUPS)}
    for name, groups in parts.items():
        expected = statistics_by_hand(error[np.isin(data.group, [*groups])])
        assert [*statistics[name].values()] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_metrics_say_what_the_run_was(finished, small, tmp_path, monkeypatch):
    metrics, dataset = finished.metrics, small.about["sha256"]
    assert metrics["sets"] == {"training": 810, "validation": 90, "test": 450} == finished.disjoint
    held_out = run5.split_dataset(small, 0.25, 7)[1]
    np.testing.assert_array_equal(finished.sets["validation"].P, small.P[held_out])
    assert metrics["extra_codes"] == 540 and metrics["rows_per_epoch"] == 270
    expected = json.loads(json.dumps(vars(finished.settings) | {"data": dataset}, default=str))
    assert metrics["settings"] == {x: expected[x] for x in expected if x != "output"}
    assert metrics["dataset"]["sha256"] == dataset
    assert run5.best_epoch([{"loss": 2, "val_loss": 1}, {"loss": 1, "val_loss": 2}]) == 1
    losses = [row["val_loss"] for row in metrics["history"]]
    assert metrics["best_epoch"] == 1 + losses.index(min(losses)) and len(losses) == 4
    rows = pd.DataFrame(metrics["errors"]["validation"])
    assert min(losses) == pytest.approx(rows["network"].mean(), rel=1e-3)
    assert metrics["epochs_run"] == 4 and metrics["stopped_early"]
    assert numbers(metrics["ended"]) == [99, 3, 1]
    assert metrics["parameters"] == finished.network.count_params()
    assert metrics["versions"] == {x: version(x) for x in metrics["versions"]}
    assert str(os.cpu_count()) in metrics["machine"] and metrics["commit"] != "unknown"
    assert metrics["times"]["finished"] == finished.date
    for change in ((run5, "HERE", tmp_path), (os, "environ", {"PATH": ""})):
        with monkeypatch.context() as patch:
            patch.setattr(*change)  # The script is in no repository; Git is not installed.
            assert run5.commit() == "unknown"


# --- report ---


def numbers(text):
    return [float(x.replace(",", "")) for x in re.findall(r"(?<![a-z])-?\d[\d,]*\.?\d*", text)]


@pytest.fixture(scope="module")
def shipped():
    """The metrics of the run in the repository."""
    return metrics_of(ROOT / "run_5")


def report_of(metrics):
    return run5.make_report(metrics, *run5.read_baselines())


def numbers_after(start, report):
    """The numbers in the one line that begins so, after that."""
    (line,) = (line for line in report.splitlines() if line.startswith(start))
    return numbers(line[len(start) :])


def assert_shown(found, expected, decimals=4):
    assert found == pytest.approx(expected, abs=0.6 * 10**-decimals)


@pytest.mark.parametrize("factor", [1, 10])
def test_the_report_has_the_errors_by_group_and_the_best_way_first(finished, factor):
    errors = finished.metrics["errors"].items()
    errors = {x: [y | {"network": factor * y["network"]} for y in rows] for x, rows in errors}
    report = report_of(metrics := finished.metrics | {"errors": errors})
    if factor == 1:
        assert report.strip() in finished.said[1]
        assert report == (finished.folder / "detailed_comparison.txt").read_text()
    lines = report.splitlines()
    assert len(lines) <= 66 and max(map(len, lines)) <= 100
    assert f"width {NARROW}" in report[:400] and "seed 7" in report[:400]
    tables, statistics = tables_of(metrics), metrics["test_statistics"]
    test, low = tables["test"], tables["low codes"]
    head = re.findall(r"^(Run 5|ridge|bound|mean) +(\d.*)", report, re.M)
    means = test.loc[SIX, WAYS].mean().sort_values()
    assert [way for way, _ in head] == [*means.index]
    assert (head[0][0] == "Run 5") == (factor == 1)
    for way, line in head:
        six, nine, of_low = means[way], test[way].mean(), low.loc[SIX, way].mean()
        assert_shown(numbers(line), [2**six**0.5, six, nine, of_low])
    parts = [(f"{k},{m}", [(k, m)]) for k, m in GROUPS] + [("six", SIX)]
    for name, groups in parts:
        found, shown = numbers_after(f"{name} ", report), statistics[name]
        assert_shown(found[:4], test.loc[groups, WAYS].mean().tolist())
        expected = [shown["RMS factor"], shown["95%"], shown["max"], shown["bias"]]
        assert_shown([found[4], *found[6:9]], expected, decimals=2)
        assert_shown(found[5], 100 * shown["in 5%"], decimals=0)
        assert_shown(found[9:], low.loc[groups, ["ridge", "Run 5"]].mean().tolist())


def test_the_report_says_what_was_done(finished):
    metrics, report = finished.metrics, report_of(finished.metrics)
    departures = re.search(r"Departures(.*)\nrun ", report, re.DOTALL)[1]
    assert {540, 270, 99, finished.network.count_params()} <= {*numbers(departures)}
    assert numbers_after("run  ", report)[:2] == [4, metrics["best_epoch"]]
    assert numbers_after("rows  ", report) == [810, 90, 450]
    assert numbers_after("dataset  ", report) == [360, 0]
    assert f"{metrics['times']['seconds']:.0f} s of training, seed 7, commit " in report
    said = [metrics["commit"], " 50 test codes of each group", "Errors on 450 new codes"]
    assert all(x in report for x in said)


def test_the_report_compares_run_5_with_the_published_figures(shipped, finished):
    lines = re.split(r"k,m +Run 2 +Run 4 +Run 5 +vs R2 +vs R4 +n\n", report_of(shipped))[1]
    published, rows = run5.read_baselines()[0], pd.DataFrame(shipped["errors"]["validation"])
    table = published.assign(run5=rows["network"].to_numpy(), n=rows["n"].to_numpy())
    table.index = [f"k={k},m={m} " for k, m in table.index]
    table.loc["mean "] = [*table.iloc[:, :3].mean(), table["n"].sum()]
    for (start, row), line in zip(table.iterrows(), lines.splitlines(), strict=False):
        versus = [100 * (row["run5"] / row[run] - 1) for run in ("Run 2", "Run 4")]
        assert line.startswith(start) and line.endswith(f"n={row['n']:.0f}")
        assert_shown(numbers(line[len(start) :])[:3], row.tolist()[:3], decimals=6)
        assert_shown(numbers(line[len(start) :])[3:5], versus, decimals=1)
    assert "vs R2" not in report_of(finished.metrics)  # Ten rows a group say nothing.


def test_the_report_has_the_test_errors_of_every_training_here(shipped):
    report, rows = report_of(shipped).split("trained here")[-1], run5.read_baselines()[1]
    tiers = {"easy": [(4, 2), (4, 3), (5, 2)], "medium": [(4, 4), (5, 3), (6, 2)]}
    tiers |= {"hard": [(4, 5), (5, 4), (6, 3)], "six": SIX, "all": [*GROUPS]}
    for run, part in rows.groupby("run"):
        by_seed = part.pivot(index=["k", "m"], columns="seed", values="test_log2_mse")
        means = pd.DataFrame({x: by_seed.loc[y].mean() for x, y in tiers.items()})
        least, most = means["all"].min(), means["all"].max()
        found = numbers_after(f"{run}  ", report.replace("-", " "))
        expected = [*by_seed, *means.mean(), *([least, most] if most > least else [])]
        assert_shown(found, expected)
    others = [shipped | {"dataset": shipped["dataset"] | {"sha256": "another"}}]
    others += [shipped | {"settings": shipped["settings"] | {x: 0.5}} for x in run5.SAME_SETS]
    for other in map(report_of, others):
        assert "trained here, test" not in other and "Empty" not in other


@pytest.mark.parametrize("error", [1e-9, 0.5, 50.0, math.nan])
def test_targets_are_reported_as_met_or_missed(shipped, finished, error):
    errors = {x: [row | {"network": error} for row in t] for x, t in shipped["errors"].items()}
    for row in errors["test"] if error == 0.5 else []:
        del row["bound"]  # As with --features raw.
    report = report_of(shipped | {"errors": errors})
    missed = re.search(r"missed: Run 5 ([\w, ]+);", " ".join(report.split()))[1]
    assert missed == {1e-9: "none", 0.5: "easy, medium, all"}.get(error, "easy, medium, hard, all")
    assert "missed" not in report_of(finished.metrics)


# --- pictures ---


def test_the_curves_are_loss_and_val_loss(finished):
    metrics = finished.metrics
    rows, history = pd.DataFrame(metrics["errors"]["validation"]), pd.DataFrame(metrics["history"])
    rows["n"] = range(1, 10)  # Of groups of different sizes.
    errors = metrics["errors"] | {"validation": rows.to_dict("records")}
    (of_others,) = run5.plot_history(metrics | {"errors": errors}).axes
    (of_run,) = finished.axes["training_history.png"]
    for panel, sizes in ((of_run, None), (of_others, rows["n"])):
        loss, val_loss, best, ridge = panel.lines
        for line, name in ((loss, "loss"), (val_loss, "val_loss")):
            assert line.get_label().startswith(f"{name}:")
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
            np.testing.assert_array_equal(line.get_ydata(), history[name])
        lowest = [metrics["best_epoch"], history["val_loss"].min()]
        assert best.get_xydata().tolist() == [lowest]
        assert_shown(numbers(best.get_label()), lowest)
        expected = np.average(rows["ridge"], weights=sizes)
        assert ridge.get_ydata()[0] == pytest.approx(expected)
        assert_shown(numbers(ridge.get_label()), [expected])
        assert panel.get_title().endswith(metrics["ended"]) and panel.get_yscale() == "log"


def test_the_scatter_shows_the_error_of_every_code_of_the_six_groups(finished):
    data, panels = finished.sets["test"], finished.axes["predictions_scatter.png"]
    error = (by_hand(finished, "test")["Run 5"] - data.log2_height).to_numpy()
    for (k, m), panel in zip(SIX, panels, strict=True):
        group = (data.k == k) & (data.m == m)
        for low, points in enumerate(panel.collections):
            rows = group & (data.low == low)
            shown = np.stack([data.log2_height, error], axis=1)[rows]
            np.testing.assert_allclose(points.get_offsets(), shown, atol=1e-5)
            assert points.get_label().startswith(("random", "low")[low])
        assert panel.get_title() == f"k={k}, m={m}" and low == 1
    assert panels[0].figure.get_supxlabel().startswith("true")


def test_the_comparison_shows_every_way_and_run_2_on_validation_and_new_codes(finished, shipped):
    published, rows = run5.read_baselines()
    mean = rows.groupby("run")[["log2_mse", "test_log2_mse"]].mean()
    run2 = [*mean.loc["Run 2, rows split at random"], mean.loc["Run 2", "test_log2_mse"]]
    of_shipped = run5.plot_comparison(shipped, published, rows).axes
    # Another dataset than the one on which Run 2 was trained, then the same.
    drawn = ((finished.metrics, finished.axes["comparison.png"], []), (shipped, of_shipped, run2))
    for results, (left, right), others in drawn:
        test = tables_of(results)["test"]
        assert sorted(text.get_text() for text in left.texts) == sorted(WAYS)
        for line, text in zip(left.lines, left.texts, strict=True):
            by_name = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
            expected = test.loc[SIX, text.get_text()] ** 0.5
            assert by_name == pytest.approx({f"{k},{m}": x for (k, m), x in expected.items()})
            assert text.xy[1] == line.get_ydata()[-1]
        expected = [*others, test["bound"].mean(), test["Run 5"].mean()]
        assert [bar.get_width() for bar in right.patches] == pytest.approx(expected)
        ticks = zip(left.get_yticks(), left.get_yticklabels(), strict=True)
        assert all(2**y == pytest.approx(float(label.get_text())) for y, label in ticks)
        assert left.get_yscale() == right.get_xscale() == "log"
        labels = [label.get_text() for label in right.get_yticklabels()]
        where = (["validation", "new", "new"] if others else []) + ["bound", "Run 5"]
        assert all(x in label for x, label in zip(where, labels, strict=True))
        for run, line in zip(published, right.lines, strict=True):
            assert line.get_xdata()[0] == pytest.approx(published[run].mean())
            assert run in line.get_label() and f"{published[run].mean():.3f}" in line.get_label()


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


def test_the_readme_has_the_figures_of_the_run(shipped):
    rows = re.findall(r"^\| (\(\d, \d\)|all nine groups) \|(.*)", README, re.MULTILINE)
    test = tables_of(shipped)["test"][WAYS]
    expected = {f"({k}, {m})": test.loc[(k, m)] for k, m in SIX} | {"all nine groups": test.mean()}
    assert [name for name, _ in rows] == [*expected]
    for name, shown in rows:
        assert numbers(shown) == pytest.approx(expected[name].tolist(), rel=2e-4, abs=6e-5)
    (of_run5,) = re.findall(r"^\| \*\*Run 5\*\*.*", README, re.MULTILINE)
    error, largest = test.loc[SIX, "Run 5"].mean(), shipped["test_statistics"]["six"]["max"]
    assert numbers(of_run5)[-3:] == pytest.approx([largest, 2**error**0.5, error], rel=6e-3)


# --- surroundings ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Environment variables of a user of a notebook: keras.json names another backend and float
    type, MPLBACKEND is one that is not installed, and the locale is ASCII's."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "keras.json").write_text(json.dumps({"backend": "jax", "floatx": "float16"}))
    variables = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    variables |= {"KERAS_HOME": str(folder), "KERAS_BACKEND": "torch"}
    return variables | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_run_ends_by_sigterm_and_is_resumed_whatever_is_around_it(home, small_npz, tmp_path):
    """Without docstrings and a safe path, from another folder, with a space and letters outside
    ASCII and UTF-8 in the paths; what a killed process has left goes."""
    data, output = tmp_path / os.fsdecode(b"sm\xe4ll data.npz"), tmp_path / "rün"
    shutil.copy(small_npz, data)
    with interrupted(1):
        assert short_run(data, output, *STOPPED, epochs=9) == 130
    (output / "metrics.json").write_text("earlier")
    (output / ".m-height-1-checkpoint.npz").write_text("left by a kill")
    safe = ["-P", "-OO"] if version("tensorflow") >= "2.21" else ["-P"]  # It needed docstrings.
    command = [*safe, SCRIPT, "--data", str(data), "--output", str(output), *SHORT, *STOPPED]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    how |= {"cwd": tmp_path, "env": os.environ | home}
    process = subprocess.Popen([sys.executable, *command], **how)
    next(line for line in process.stdout if "resuming after epoch 1" in line)
    process.terminate()
    assert process.communicate()[1].splitlines()[-1].endswith("the same command resumes training")
    assert process.returncode == 130 and (output / "metrics.json").read_text() == "earlier"
    assert names_in(output) == ["checkpoint.npz", "metrics.json"]
    resumed = run_script(*command, cwd=tmp_path, **home)
    assert resumed.returncode == 0 and "Traceback" not in resumed.stderr, resumed.stderr
    assert "resuming after epoch 1" in resumed.stdout
    assert names_in(output) == RESULTS
    assert r"sm\udce4ll data.npz" in (output / "detailed_comparison.txt").read_text()
    network = run5.load_trained(output / "best_model_run5.h5").get_layer("log2_height")
    assert {weight.dtype for weight in network.weights} == {"float32"}


@pytest.mark.parametrize(
    "command", ["data/prepare.py --label none --output new", "data/rerun_baselines.py --data none"]
)
def test_a_command_that_cannot_be_done_says_so_in_one_line(home, tmp_path, command):
    script, *options = command.split()
    ended = run_script("-P", ROOT / script, *options, cwd=tmp_path, **home)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and "none" in last and last.startswith(script.split("/")[1])
    assert not [*tmp_path.iterdir()] and "Traceback" not in ended.stderr


def test_an_import_leaves_the_float_type_of_the_caller_alone(home):
    code = "import train_model_v5, keras; assert keras.config.floatx() == 'float16'"
    home = home | {"MPLBACKEND": "Agg"}  # Keras imports matplotlib.
    assert run_script("-c", code, cwd=ROOT, **home).returncode == 0


# --- the command ---


def test_a_run_ended_by_epochs_goes_on_with_more_and_another_one_does_not(
    small_npz, small, tmp_path, capsys
):
    with interrupted(2):
        assert short_run(small_npz, tmp_path, epochs=50) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert names_in(tmp_path) == ["checkpoint.npz"]
    assert short_run(small_npz, tmp_path, "--batch-size", "10") == 2
    assert "batch_size 306, now 10" in capsys.readouterr().err.splitlines()[-1]
    for epochs, done in ((1, 2), (3, 3)):
        assert short_run(small_npz, tmp_path, epochs=epochs) == 0
        assert "resuming after epoch 2" in (said := capsys.readouterr().out)
        assert "ended by --epochs" in said and "goes on" in said
        assert without_times(tmp_path)["epochs_run"] == done
        assert ("Epoch 3/3" in said) == (done == 3)
    assert "bound" not in metrics_of(tmp_path)["errors"]["test"][0]  # Of raw P.
    network = run5.load_trained(tmp_path / "best_model_run5.h5").get_layer("log2_height")
    P = small.P[run5.split_dataset(small)[0]]
    mean = np.ravel(network.get_layer("scale").mean)
    np.testing.assert_allclose(mean, P.mean(axis=0), rtol=1e-4, atol=1e-4)
    (tmp_path / "checkpoint.npz").unlink()
    assert short_run(small_npz, tmp_path) == 0
    assert "has a finished run, which this new one will replace" in capsys.readouterr().out
    assert without_times(tmp_path)["epochs_run"] == 1


def test_a_diverged_run_ends_with_one_line_and_its_epochs_can_be_reported(
    small_npz, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run5, "lr_schedule", lambda epoch, lr, **_: lr if epoch < 1 else math.inf)
    assert short_run(small_npz, tmp_path, epochs=5) == 2
    problem = capsys.readouterr().err
    assert "epoch 2" in problem and problem.count("\n") == 1
    assert names_in(tmp_path) == ["checkpoint.npz"]
    monkeypatch.setattr(sys, "stdout", None)  # As where a caller has closed it.
    assert short_run(small_npz, tmp_path) == 0
    assert names_in(tmp_path) == sorted([*RESULTS, "checkpoint.npz"])


def test_results_are_not_replaced_where_another_training_has_begun_or_the_disk_is_full(
    small_npz, tmp_path, capsys, monkeypatch
):
    def evaluate(*arguments):
        (tmp_path / "checkpoint.npz").unlink()
        return results_of(*arguments)

    results_of = run5.results_of
    with monkeypatch.context() as patch:
        patch.setattr(run5, "results_of", evaluate)
        assert short_run(small_npz, tmp_path) == 2 and "another" in capsys.readouterr().err
    assert not names_in(tmp_path)
    (tmp_path / "best_model_run5.h5").write_text("earlier")
    with monkeypatch.context() as patch:  # A write that ends in the middle.
        patch.setattr(os, "fsync", mock.Mock(side_effect=OSError("the disk is full")))
        patch.setattr(run5.Training, "save", lambda self, variables: None)
        assert short_run(small_npz, tmp_path) == 2
    assert (tmp_path / "best_model_run5.h5").read_text() == "earlier"


def test_a_terminal_has_the_progress_bar_of_keras(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert run5.verbosity() == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--batch-size", "2.5"], "--batch-size"),
        (["--seed", "-1"], "--seed"),
        (["--dropout", "4"], "--dropout"),
        (["--val-fraction", "nan"], "--val-fraction"),
        (["--group-weights", "1", "2"], "--group-weights"),
        (["--features", "minors"], "minors"),
        (["--model", "m.h5"], "--model: no effect without --predict"),
        (["--predict", "a", "--epochs", "3", "--seed", "2"], "--epochs, --seed: no effect"),
        (["--data", "none.npz"], "none.npz"),
        (["--data", "a", "b", "c"], "3 paths"),
        (["--output", str(ROOT / "README.md")], "README.md"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, arguments, word
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run5, "make_sets", None)  # Nothing is trained.
    try:
        status = run5.main(["--output", "out", *arguments])
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and word in err.splitlines()[-1] and len(err.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_without_options_the_settings_are_the_defaults_which_the_help_shows(capsys):
    assert run5.parse_arguments([]) == (run5.Settings(), {})
    with pytest.raises(SystemExit):
        run5.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "validation set, 0.01 to 0.9 (default: 0.15)" in said and "1 1 1 2 1 1 1.5" in said
