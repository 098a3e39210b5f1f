"""A whole run: what it computes, its report and pictures, and what a user's command does."""

import contextlib
import io
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
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT, interrupted, run_script, watch
from matplotlib.figure import Figure

import train_model_v5 as run5
from data.dataset import Codes, exact_heights
from data.heights import GROUPS, N

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
SIX = [(4, 2), (4, 3), (4, 4), (5, 2), (5, 3), (6, 2)]
README = (ROOT / "README.md").read_text()


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
            if status:
                (checkpoint,) = (run.folder / "unfinished").iterdir()
                run.seconds = run5.Training(checkpoint, {}, run.settings).seconds
    run.training, run.network, run.batches, _ = results.call_args.args
    run.disjoint = {name: len(data) for name, data in disjoint.call_args.args[0].items()}
    figures = (call.args for call in saved.call_args_list)
    run.axes = {path.name.split("-")[-1]: figure.axes for figure, path in figures}
    run.metrics, run.date = metrics_of(run.folder), time.strftime("%Y-%m-%d")
    return run


@pytest.fixture(scope="module")
def sets(small, finished):
    """The sets of the run, made again, and the low codes of the test set."""
    with contextlib.redirect_stdout(None):
        sets = run5.make_sets(small, finished.settings)
        sets = run5.add_extra_codes(sets, finished.settings)
    sets["low codes"] = sets["test"].take(sets["test"].low)
    to_features = run5.feature_model("basis")
    return {x: replace(y, features=run5.outputs_of(to_features, y)) for x, y in sets.items()}


def test_an_interrupted_run_ends_as_an_unbroken_one(finished, small_npz, tmp_path):
    with watch(keras.utils, "set_random_seed") as seeded:
        run5.main([*TYPED, "--data", str(small_npz), "--output", str(tmp_path)])
    assert seeded.call_args.args == (7,)
    assert without_times(tmp_path) == without_times(finished.folder)
    for folder in (tmp_path, finished.folder):
        assert sorted(path.name for path in folder.iterdir()) == RESULTS
    assert 0 < finished.seconds < finished.metrics["times"]["seconds"] < 300


def test_each_step_of_a_run_is_announced(finished):
    steps = ["reading ", "making 540 extra codes", "k=4, m=2: 90", "computing", "\ntraining\n"]
    steps += ["epoch 1: loss", "epoch 2: loss", "resuming after epoch 2", "epoch 3: ", "epoch 4: "]
    first, second = finished.said
    said = first + second.replace("reading", "").replace("computing", "")
    places = [said.index(x) for x in steps]
    assert places == sorted(places) and "(0:00:00)" in said.split("epoch 4: ")[1].split("\n")[0]
    row = finished.metrics["history"][0]
    assert f"loss {row['loss']:.4f}, val_loss {row['val_loss']:.4f}" in first


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
    kinds = {"Dense": "D", "LayerNormalization": "N", "HashDropout": "H", "Add": "+"}
    order = "".join(kinds.get(type(layer).__name__, "") for layer in layers)
    assert order == 3 * "DNH" + 2 * "DNHDN+" + 3 * "DNH" + "D+"
    rates = [layer.rate for layer in layers if isinstance(layer, run5.HashDropout)]
    units = [layer.units for layer in layers if isinstance(layer, keras.layers.Dense)]
    assert rates == pytest.approx(np.array(RATES) / 2)
    assert units == [max(4, x // 32) for x in UNITS] + [1]
    inputs, target, weights = finished.batches[0]
    groups = [GROUPS.index(x) for x in zip(*(inputs[y][:, 0].tolist() for y in "km"), strict=True)]
    assert weights.tolist() == [1 + i for i in groups] and len(target) == 144


def by_hand(sets, model, name):
    """log2 heights of a set by each way to predict, by other means than the script's."""
    train_set, data = sets["training"], sets[name]
    found = {way: np.empty(len(data)) for way in ("mean", "bound", "ridge")}
    found["network"] = np.log2(run5.outputs_of(model, data)[:, 0].astype(float))
    for i in range(9):
        fitted, rows = train_set.group == i, data.group == i
        x, y = train_set.features[fitted].astype(float), train_set.log2_height[fitted]
        mean, deviation = x.mean(axis=0), np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
        scaled, z = ((features - mean) / deviation for features in (x, data.features[rows]))
        weights = np.linalg.solve(scaled.T @ scaled + np.eye(252), scaled.T @ (y - y.mean()))
        found["ridge"][rows] = z @ weights + y.mean()
        found["mean"][rows] = y[~train_set.low[fitted]].mean()
        found["bound"][rows] = data.features[rows, 0]
    return found


def statistics_by_hand(error):
    size = np.sort(np.abs(error))
    within = (np.log2(0.95) <= error) & (error <= np.log2(1.05))
    shares = [2 ** np.sqrt(np.mean(error**2)), within.mean(), 2 ** np.quantile(size, 0.95)]
    return [*shares, 2 ** size[-1], error.mean()]


def test_errors_are_those_of_the_saved_model_and_of_ways_without_a_network(finished, sets):
    model, metrics = run5.load_trained(finished.folder / "best_model_run5.h5"), finished.metrics
    for name, n in {"validation": 10, "test": 50, "low codes": 5}.items():
        data, rows = sets[name], metrics["errors"][name]
        assert [(row["k"], row["m"], row["n"]) for row in rows] == [(*x, n) for x in GROUPS]
        for way, predicted in by_hand(sets, model, name).items():
            squares = (predicted - data.log2_height) ** 2
            expected = [squares[data.group == i].mean() for i in range(9)]
            np.testing.assert_allclose([row[way] for row in rows], expected, rtol=1e-3, atol=1e-9)
    error = by_hand(sets, model, "test")["network"] - sets["test"].log2_height
    group = sets["test"].group
    parts = {"six": np.isin(group, [0, 1, 2, 4, 5, 7]), "all": group >= 0}
    parts |= {"easy": np.isin(group, [0, 1, 4]), "medium": np.isin(group, [2, 5, 7])}
    parts |= {f"{k},{m}": group == i for i, (k, m) in enumerate(GROUPS)}
    for name, rows in parts.items():
        found = [*metrics["test_statistics"][name].values()]
        assert found == pytest.approx(statistics_by_hand(error[rows]), rel=1e-3, abs=1e-5)


def test_metrics_say_what_the_run_was(finished, sets, small, tmp_path, monkeypatch):
    metrics = finished.metrics
    assert metrics["sets"] == {x: len(sets[x]) for x in ("training", "validation", "test")}
    assert metrics["sets"] == {"training": 810, "validation": 90, "test": 450} == finished.disjoint
    assert metrics["extra_codes"] == 540 and metrics["rows_per_epoch"] == 270
    settings = metrics["settings"] | {"data": None}
    assert metrics["settings"]["data"] == small.about["sha256"] == metrics["dataset"]["sha256"]
    expected = json.loads(json.dumps(vars(finished.settings) | {"data": None}, default=str))
    assert settings == {x: expected[x] for x in expected if x != "output"}
    assert run5.best_epoch([{"loss": 2, "val_loss": 1}, {"loss": 1, "val_loss": 2}]) == 1
    losses = [row["val_loss"] for row in metrics["history"]]
    assert metrics["best_epoch"] == 1 + losses.index(min(losses)) and len(losses) == 4
    rows = pd.DataFrame(metrics["errors"]["validation"])
    assert min(losses) == pytest.approx(rows["network"].mean(), rel=1e-3)
    assert metrics["epochs_run"] == 4 and metrics["stopped_early"]
    assert integers(metrics["ended"]) == [99, 0, 3, 1]
    assert metrics["parameters"] == finished.network.count_params()
    assert metrics["versions"] == {x: version(x) for x in metrics["versions"]}
    assert str(os.cpu_count()) in metrics["machine"] and metrics["commit"] != "unknown"
    assert metrics["times"]["finished"] == finished.date
    monkeypatch.chdir(tmp_path)  # Where there is no repository.
    assert run5.commit() == metrics["commit"]
    for change in ((run5, "HERE", tmp_path), (os, "environ", {"PATH": ""})):
        with monkeypatch.context() as patch:
            patch.setattr(*change)  # The script is in no repository; Git is not installed.
            assert run5.commit() == "unknown"


# --- report ---


def integers(text):
    return [int(x.replace(",", "")) for x in re.findall(r"\d[\d,]*", text)]


def decimals(line):
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line)]


def tables_of(metrics):
    """The errors of each way to predict by k and m, of each set."""
    tables = {x: pd.DataFrame(t).set_index(["k", "m"]) for x, t in metrics["errors"].items()}
    return {x: table.rename(columns={"network": "Run 5"}) for x, table in tables.items()}


@pytest.fixture(scope="module")
def shipped():
    """The metrics of the run in the repository."""
    return metrics_of(ROOT / "run_5")


def report_of(metrics):
    return run5.make_report(metrics, *run5.read_baselines())


def line_of(report, start):
    (line,) = (line for line in report.splitlines() if line.startswith(start))
    return line[len(start) :]


@pytest.mark.parametrize("factor", [1, 10])
def test_the_report_has_the_errors_by_group_and_the_best_way_first(finished, factor):
    errors = finished.metrics["errors"].items()
    errors = {x: [y | {"network": factor * y["network"]} for y in rows] for x, rows in errors}
    metrics = finished.metrics | {"errors": errors}
    lines = (report := report_of(metrics)).splitlines()
    if factor == 1:
        assert report.strip() in finished.said[1]
        assert report == (finished.folder / "detailed_comparison.txt").read_text()
    assert len(lines) <= 66 and max(map(len, lines)) <= 100
    assert f"width {NARROW}" in " ".join(lines[1:4]) and "seed 7" in " ".join(lines[1:4])
    tables, shown = tables_of(metrics), metrics["test_statistics"]
    test, low = tables["test"], tables["low codes"]
    first = [line for line in lines if re.match(r"(Run 5|ridge|bound|mean) +\d", line)][:4]
    ways = [line.split("  ")[0] for line in first]
    means = test.loc[SIX, ways].mean()
    assert means.tolist() == sorted(means) and (ways[0] == "Run 5") == (factor == 1)
    for line, way in zip(first, ways, strict=True):
        six, nine, of_low = means[way], test[way].mean(), low.loc[SIX, way].mean()
        assert decimals(line) == pytest.approx([2**six**0.5, six, nine, of_low], abs=6e-5)
    parts = [(f"{k},{m}", [(k, m)]) for k, m in GROUPS] + [("six", SIX)]
    for name, groups in parts:
        found = decimals(line := line_of(report, f"{name} "))
        expected = test.loc[groups, ["mean", "bound", "ridge", "Run 5"]].mean().tolist()
        assert found[:4] == pytest.approx(expected, abs=6e-5)
        expected = [shown[name][x] for x in ("RMS factor", "95%", "max", "bias")]
        assert found[4:8] == pytest.approx(expected, abs=6e-3)
        assert f" {shown[name]['in 5%']:.0%} " in line
        expected = low.loc[groups, ["ridge", "Run 5"]].mean().tolist()
        assert found[8:] == pytest.approx(expected, abs=6e-5)


def test_the_report_says_what_was_done(finished):
    metrics = finished.metrics
    report = (finished.folder / "detailed_comparison.txt").read_text()
    parameters = finished.network.count_params()
    departures = re.search(r"Departures(.*)\nrun ", report, re.DOTALL)[1].replace("5", "", 1)
    assert {540, 270, 99, parameters} <= {*integers(departures)}
    assert integers(line_of(report, "run  "))[:2] == [4, metrics["best_epoch"]]
    assert integers(line_of(report, "rows  ")) == [810, 90, 450]
    assert integers(line_of(report, "dataset  ").replace("small.npz", "")) == [360, 0]
    made = line_of(report, "made  ")
    assert metrics["commit"] in made and integers(made)[4] == 7
    assert integers(made)[3] == round(metrics["times"]["seconds"])
    assert re.search(r" 50 test codes of each group", report)


def test_the_report_compares_run_5_with_the_published_figures(shipped, finished):
    lines = re.split(r"k,m +Run 2 +Run 4 +Run 5 +vs R2 +vs R4 +n\n", report_of(shipped))[1]
    published, rows = run5.read_baselines()[0], pd.DataFrame(shipped["errors"]["validation"])
    table = published.assign(run5=rows["network"].to_numpy(), n=rows["n"].to_numpy())
    table.index = [f"k={k},m={m} " for k, m in table.index]
    mean = table.mean()
    table.loc["mean "] = [*mean[:3], table["n"].sum()]
    for (start, row), line in zip(table.iterrows(), lines.splitlines(), strict=False):
        versus = [100 * (row["run5"] / row[run] - 1) for run in ("Run 2", "Run 4")]
        assert decimals(line)[:3] == pytest.approx(row.tolist()[:3], abs=1e-6)
        assert decimals(line)[3:] == pytest.approx(versus, abs=0.06)
        assert line.startswith(start) and line.endswith(f"n={row['n']:.0f}")
    assert "vs R2" not in report_of(finished.metrics)  # Ten rows a group say nothing.


def test_the_report_has_the_test_errors_of_every_training_here(shipped):
    report, rows = report_of(shipped).split("trained here")[-1], run5.read_baselines()[1]
    tiers = {"easy": [(4, 2), (4, 3), (5, 2)], "medium": [(4, 4), (5, 3), (6, 2)]}
    tiers |= {"hard": [(4, 5), (5, 4), (6, 3)], "six": SIX, "all": [*GROUPS]}
    by_seed = rows.set_index(["k", "m"]).groupby(["run", "seed"])["test_log2_mse"]
    means = by_seed.apply(
        lambda x: pd.Series({y: x[x.index.isin(z)].mean() for y, z in tiers.items()})
    ).unstack()
    for run, part in means.groupby("run"):
        seeds = [*map(str, part.index.get_level_values("seed"))]
        start = re.compile(rf"{re.escape(run)} +{' '.join(seeds)} ")
        (line,) = (line for line in report.splitlines() if start.match(line))
        spread = [part["all"].min(), part["all"].max()] if len(seeds) > 1 else []
        expected = [*part[[*tiers]].mean(), *spread]
        assert decimals(line.replace("-", " ")) == pytest.approx(expected, abs=6e-5)
    others = [shipped | {"dataset": shipped["dataset"] | {"sha256": "another"}}]
    others += [shipped | {"settings": shipped["settings"] | {x: 0.5}} for x in run5.SAME_SETS]
    assert not any("trained here, test" in report_of(other) for other in others)


@pytest.mark.parametrize("error", [1e-9, 0.5, 50.0, math.nan])
def test_targets_are_reported_as_met_or_missed(shipped, finished, error):
    errors = {x: [row | {"network": error} for row in t] for x, t in shipped["errors"].items()}
    report = report_of(shipped | {"errors": errors})
    missed = re.search(r"missed: Run 5 ([\w, ]+);", " ".join(report.split()))[1]
    assert missed == {1e-9: "none", 0.5: "easy, medium, all"}.get(error, "easy, medium, hard, all")
    assert "missed" not in report_of(finished.metrics)


# --- pictures ---


def test_the_curves_are_loss_and_val_loss(finished):
    metrics = finished.metrics
    (panel,) = finished.axes["training_history.png"]
    history, epoch = pd.DataFrame(metrics["history"]), metrics["best_epoch"]
    loss, val_loss, best, ridge = panel.lines
    for line, name in ((loss, "loss"), (val_loss, "val_loss")):
        assert line.get_label().startswith(f"{name}:")
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
        np.testing.assert_array_equal(line.get_ydata(), history[name])
    assert best.get_xydata().tolist() == [[epoch, history["val_loss"][epoch - 1]]]
    rows = pd.DataFrame(metrics["errors"]["validation"])
    assert ridge.get_ydata()[0] == pytest.approx(np.average(rows["ridge"], weights=rows["n"]))
    assert decimals(best.get_label())[0] == pytest.approx(history["val_loss"].min(), abs=6e-5)
    rows["n"] = range(1, 10)  # Of groups of different sizes.
    errors = metrics["errors"] | {"validation": rows.to_dict("records")}
    settings = metrics["settings"] | {"dropout": 0.0}
    (panel_of_others,) = run5.plot_history(metrics | {"errors": errors, "settings": settings}).axes
    assert "dropout" in loss.get_label()
    assert "dropout" not in panel_of_others.lines[0].get_label()
    of_others = panel_of_others.lines[3].get_ydata()[0]
    assert of_others == pytest.approx(np.average(rows["ridge"], weights=range(1, 10)))
    assert decimals(ridge.get_label())[0] == pytest.approx(ridge.get_ydata()[0], abs=6e-5)
    assert panel.get_title().endswith(metrics["ended"]) and panel.get_yscale() == "log"


def test_the_scatter_shows_the_error_of_every_code_of_the_six_groups(finished, sets):
    data, panels = sets["test"], finished.axes["predictions_scatter.png"]
    model = run5.load_trained(finished.folder / "best_model_run5.h5")
    error = np.log2(run5.outputs_of(model, data)[:, 0].astype(float)) - data.log2_height
    assert [re.match(r"k=(\d), m=(\d)", x.get_title()).groups() for x in panels] == [
        (str(k), str(m)) for k, m in SIX
    ]
    for (k, m), panel in zip(SIX, panels, strict=True):
        group = (data.k == k) & (data.m == m)
        for low, (points, name) in enumerate(
            zip(panel.collections, ("random", "low"), strict=True)
        ):
            rows = group & (data.low == low)
            shown = np.stack([data.log2_height, error], axis=1)[rows]
            np.testing.assert_allclose(points.get_offsets(), shown, atol=1e-5)
            assert points.get_label().startswith(name)
        of_group = statistics_by_hand(error[group])
        assert decimals(panel.get_title()) == pytest.approx([of_group[2], of_group[4]], abs=6e-3)
    too_low = -1 - np.arange(len(data)) / 1000
    title = run5.plot_predictions(data, data.log2_height + too_low).get_suptitle()
    largest = np.abs(too_low)[data.k + data.m == N].max()
    assert float(title.split()[-1]) == pytest.approx(largest, rel=0.06)


def test_the_comparison_shows_every_way_and_run_2_on_validation_and_new_codes(finished, shipped):
    published, rows = run5.read_baselines()
    mean = rows.groupby("run")[["log2_mse", "test_log2_mse"]].mean()
    run2 = [*mean.loc["Run 2, rows split at random"], mean.loc["Run 2", "test_log2_mse"]]
    of_shipped = run5.plot_comparison(shipped, published, rows).axes
    # Another dataset than the one on which Run 2 was trained, then the same.
    drawn = ((finished.metrics, finished.axes["comparison.png"], []), (shipped, of_shipped, run2))
    for results, (left, right), others in drawn:
        test = tables_of(results)["test"]
        ways = [text.get_text() for text in left.texts]
        assert sorted(ways) == ["Run 5", "bound", "mean", "ridge"]
        for way, line, text in zip(ways, left.lines, left.texts, strict=True):
            by_name = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
            expected = {f"{k},{m}": test.loc[(k, m), way] ** 0.5 for k, m in SIX}
            assert by_name == pytest.approx(expected) and text.xy[1] == line.get_ydata()[-1]
        expected = [*others, test["bound"].mean(), test["Run 5"].mean()]
        assert [bar.get_width() for bar in right.patches] == pytest.approx(expected)
        ticks = zip(left.get_yticks(), left.get_yticklabels(), strict=True)
        assert all(2**y == pytest.approx(float(label.get_text())) for y, label in ticks)
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
    test = tables_of(shipped)["test"][["mean", "bound", "ridge", "Run 5"]]
    expected = {f"({k}, {m})": test.loc[(k, m)] for k, m in SIX} | {"all nine groups": test.mean()}
    assert [name for name, _ in rows] == [*expected]
    for name, shown in rows:
        assert decimals(shown) == pytest.approx(expected[name].tolist(), rel=2e-4, abs=6e-5)
    (six,) = re.findall(
        r"^\| \*\*Run 5.*within a factor of (.*)\) \| \*\*(.*)\*\* .* \*\*(.*)\*\*", README, re.M
    )
    error = test.loc[SIX, "Run 5"].mean()
    expected = [shipped["test_statistics"]["six"]["max"], 2**error**0.5, error]
    assert [*map(float, six)] == pytest.approx(expected, rel=6e-3)


# --- surroundings ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Environment variables of a user of a notebook on a network file system.

    keras.json names another backend and float type, the home is read-only (for all but root),
    MPLBACKEND is one that is not installed, files cannot be locked, and the locale is ASCII's.
    """
    folder = tmp_path_factory.mktemp("home")
    (folder / ".keras").mkdir()
    config = {"backend": "jax", "floatx": "float16", "image_data_format": "channels_first"}
    (folder / ".keras" / "keras.json").write_text(json.dumps(config))
    variables = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "HOME": str(folder)}
    variables |= {"KERAS_HOME": str(folder / ".keras"), "MPLCONFIGDIR": "/nowhere/to/be/made"}
    variables |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    variables["KERAS_BACKEND"] = "torch"
    if shutil.which("gcc") and sys.platform == "linux":
        source = "#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }"
        (folder / "no_locks.c").write_text(source)
        command = ["gcc", "-shared", "-fPIC", "-o", folder / "no_locks.so", folder / "no_locks.c"]
        subprocess.run(command, check=True)
        variables["LD_PRELOAD"] = str(folder / "no_locks.so")
    folder.chmod(0o500)
    return variables


def test_a_run_ends_by_sigterm_and_is_resumed_whatever_is_around_it(home, small_npz, tmp_path):
    """Without docstrings and a safe path, from another folder, with a space and letters outside
    ASCII and UTF-8 in the paths; what a killed process has left goes."""
    data, output = tmp_path / os.fsdecode(b"sm\xe4ll data.npz"), tmp_path / "rün"
    shutil.copy(small_npz, data)
    with interrupted(1):
        assert short_run(data, output, *STOPPED, epochs=9) == 130
    (output / "metrics.json").write_text("earlier")
    (output / "unfinished" / ".tmp-1-checkpoint.npz").write_text("left by a kill")
    safe = ["-P", "-OO"] if version("tensorflow") >= "2.21" else ["-P"]  # It needed docstrings.
    command = [*safe, SCRIPT, "--data", str(data), "--output", str(output), *SHORT, *STOPPED]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    how |= {"cwd": tmp_path, "env": os.environ | home}
    process = subprocess.Popen([sys.executable, *command], **how)
    next(line for line in process.stdout if "resuming after epoch 1" in line)
    process.terminate()
    assert process.communicate()[1].splitlines()[-1].endswith("the same command resumes training")
    assert process.returncode == 130 and (output / "metrics.json").read_text() == "earlier"
    assert [path.name for path in (output / "unfinished").iterdir()] == ["checkpoint.npz"]
    resumed = run_script(*command, cwd=tmp_path, **home)
    assert resumed.returncode == 0 and "Traceback" not in resumed.stderr, resumed.stderr
    assert "resuming after epoch 1" in resumed.stdout
    assert sorted(path.name for path in output.iterdir()) == RESULTS
    assert r"sm\udce4ll data.npz" in (output / "detailed_comparison.txt").read_text()
    network = run5.load_trained(output / "best_model_run5.h5").get_layer("log2_height")
    assert {weight.dtype for weight in network.weights} == {"float32"}


ELSEWHERE = """
import sys, numpy as np, tensorflow as tf
given = np.load("given.npz")
served = tf.saved_model.load("exported model")
inputs = [tf.constant(given[name]) for name in ("n", "k", "m", "P")]
np.save("heights.npy", served.serve(inputs).numpy())
assert not {"train_model_v5", "data"} & set(sys.modules)
"""


def test_another_process_loads_the_export_without_our_code(finished, small, tmp_path, graphs):
    model = run5.load_trained(finished.folder / "best_model_run5.h5")
    model.export(tmp_path / "exported model", verbose=False)
    P = small.P * (np.arange(360) % 8 > 0)[:, None]  # By P = 0 heights are infinite.
    codes = Codes(np.full(360, 9), small.k, small.m, P.astype("float64"))
    n, k, m = (x.astype("int32")[:, None] for x in codes[:3])
    np.savez(tmp_path / "given.npz", n=n, k=k, m=m, P=codes.P)
    assert run_script("-c", ELSEWHERE, cwd=tmp_path).returncode == 0
    heights = np.load(tmp_path / "heights.npy")
    np.testing.assert_allclose(heights, run5.outputs_of(model, codes), rtol=1e-5)
    np.testing.assert_array_equal(np.isinf(heights[:, 0]), np.isinf(exact_heights(codes)))


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


def test_a_run_ended_by_epochs_goes_on_with_more_and_fresh_starts_anew(
    small_npz, small, tmp_path, capsys, monkeypatch
):
    with interrupted(2):
        assert short_run(small_npz, tmp_path, "--fresh", epochs=50) == 130
    assert "the same command without --fresh resumes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    assert short_run(small_npz, tmp_path, "--batch-size", "10") == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert "batch_size 306, now 10" in refused
    for epochs, done in ((1, 2), (3, 3)):
        assert short_run(small_npz, tmp_path, epochs=epochs) == 0
        assert "resuming after epoch 2" in (said := capsys.readouterr().out)
        assert "ended by --epochs" in said and "goes on" in said
        assert without_times(tmp_path)["epochs_run"] == done
        assert ("epoch 3: loss" in said) == (done == 3)
    monkeypatch.setattr(run5, "on_terminal", lambda: True)
    assert short_run(small_npz, tmp_path, epochs=4) == 0
    assert "Epoch 4/4" in (said := capsys.readouterr().out) and "epoch 4: loss" not in said
    network = run5.load_trained(tmp_path / "best_model_run5.h5").get_layer("log2_height")
    P = small.P[run5.split_dataset(small)[0]]
    mean = np.ravel(network.get_layer("scale").mean)
    np.testing.assert_allclose(mean, P.mean(axis=0), rtol=1e-4, atol=1e-4)

    (tmp_path / "unfinished" / "checkpoint.npz").write_text("damaged")
    assert short_run(small_npz, tmp_path, "--fresh") == 0
    assert "has a finished run, which this new one will replace" in capsys.readouterr().out
    assert without_times(tmp_path)["epochs_run"] == 1


def test_a_run_needs_no_standard_output_and_no_folder_that_can_be_removed(
    small_npz, tmp_path, monkeypatch
):
    def busy(*arguments, **options):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(os, "rmdir", busy)
    assert short_run(small_npz, tmp_path, *STOPPED, epochs=9) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*RESULTS, "unfinished"]
    assert not [*(tmp_path / "unfinished").iterdir()]


def test_a_diverged_run_ends_with_one_line_and_its_epochs_can_be_reported(
    small_npz, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run5, "lr_schedule", lambda epoch, lr, **_: lr if epoch < 1 else math.inf)
    assert short_run(small_npz, tmp_path, epochs=5) == 2
    problem = capsys.readouterr().err
    assert "epoch 2" in problem and problem.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    assert short_run(small_npz, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*RESULTS, "unfinished"]


def test_results_are_not_replaced_where_another_training_has_begun(
    small_npz, tmp_path, capsys, monkeypatch
):
    def evaluate(*arguments):
        (tmp_path / "unfinished" / "checkpoint.npz").unlink()
        return results_of(*arguments)

    results_of = run5.results_of
    monkeypatch.setattr(run5, "results_of", evaluate)
    assert short_run(small_npz, tmp_path) == 2 and "another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]


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


def test_without_options_the_settings_are_the_defaults():
    assert run5.parse_arguments([]) == (run5.Settings(), {})


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
    command = [sys.executable, SCRIPT, "--data", str(small_npz), "--epochs", "150", *SHORT]
    command += ["--stop-patience", "150", "--output"]
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
