"""Run 2 and Run 4 on the split of the script: their networks, weights, and rows of the csv."""

import json
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT, interrupted, watch

import train_model_v5 as run5
from data import rerun_baselines as baselines


def test_networks_are_those_of_the_runs():
    """By the parameters in the csv, less the queries and keys that `attention` leaves out."""
    left_out = {"Run 2": 8 * 64, "Run 4": 4 * 64 + 8 * 64 + 16 * 128}
    counts = pd.read_csv(run5.BASELINES).groupby("run")["parameters"].max()
    rates = {"Run 2": [0.2, 0.4] + 4 * [0.4]}
    rates["Run 4"] = [0.25, 0.35, 0.4, 0.4, 0.45, 0.4, 0.4, 0.4, 0.3, 0.2]
    P = np.random.default_rng(0).normal(1, 5, size=(50, 20)).astype("float32")
    for run, build in (("Run 2", baselines.build_run2), ("Run 4", baselines.build_run4)):
        network = build(P)
        assert network.count_params() == counts[run] - 2 * 513 * left_out[run]
        (scale,) = (x for x in network.layers if isinstance(x, keras.layers.Normalization))
        np.testing.assert_allclose([scale.mean[0], scale.variance[0]], [P.mean(0), P.var(0)])
        dropout = [x.rate for x in network.layers if isinstance(x, run5.HashDropout)]
        assert sorted(dropout) == sorted(rates[run])
    (gate,) = (x for x in network.layers if getattr(x, "units", 0) == 3)  # Of Run 4's experts.
    shares = keras.Model(network.inputs, gate.output)([np.full((1, 1), 4)] * 3 + [P[:1]])
    assert float(shares.numpy().sum()) == pytest.approx(1)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_that_of_keras_over_a_sequence_of_length_1(heads):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 10)).astype("float32")
    of_keras = keras.layers.MultiHeadAttention(heads, key_dim=4)
    of_keras(x[:, None], x[:, None])  # Builds it.
    weights = {x.path: rng.normal(size=x.shape).astype("float32") for x in of_keras.weights}
    of_keras.set_weights([*weights.values()])
    expected = of_keras(x[:, None], x[:, None]).numpy()[:, 0]

    inputs = keras.layers.Input((10,))
    network = keras.Model(inputs, baselines.attention(inputs, heads, 4, 0.5))
    kept = [path for path in weights if "query" not in path and "key" not in path]
    network.set_weights([weights[path] for path in kept])
    np.testing.assert_allclose(network(x), expected, rtol=1e-4, atol=1e-5)
    if heads == 1:  # In training a head is dropped as a whole, or doubled.
        bias, trained = network.get_weights()[-1], network(x, training=True)
        dropped = np.isclose(trained, bias).all(axis=1)
        doubled = np.isclose(trained, 2 * expected - bias, rtol=1e-3, atol=1e-4).all(axis=1)
        assert dropped.any() and doubled.any() and (dropped ^ doubled).all()


@pytest.fixture
def csv(tmp_path):
    """A csv of the published figures alone."""
    rows = pd.read_csv(run5.BASELINES, dtype=str, keep_default_na=False)
    rows[rows["source"] == "published"].to_csv(tmp_path / "baselines.csv", index=False)
    return tmp_path / "baselines.csv"


def test_runs_write_their_rows_in_the_csv_that_is_named(small_npz, small, csv, tmp_path):
    published, work = csv.read_text(), tmp_path / "work"
    narrow = run5.Settings(data=(small_npz,), width=NARROW, batch_size=306, test_codes=10)
    options = ["--csv", str(csv), "--output", str(work)]
    short = {x: (build, y | {"epochs": 2}, z) for x, (build, y, z) in baselines.RUNS.items()}
    with pytest.MonkeyPatch.context() as patch, watch(run5, "evaluate") as evaluate:
        patch.setattr(run5, "Settings", lambda: narrow)
        assert baselines.main([*options, "--epochs", "1"]) == 0
        assert csv.read_text() == published and len([*work.iterdir()]) == 2  # To go on with.
        patch.setattr(baselines, "RUNS", short)
        (work / "own").mkdir()
        assert baselines.main(options) == 0
    assert csv.read_text().startswith(published)  # Other lines stay as they are.
    rows = pd.read_csv(csv).query("source == 'measured'")
    assert [*rows["run"]] == ["Run 2"] * 9 + ["Run 4"] * 9 and [*work.iterdir()] == [work / "own"]
    assert set(rows["dataset"]) == {small.about["sha256"]} and set(rows["epochs"]) == {2}
    for (network, sets, _), (run, part) in zip(
        [call.args for call in evaluate.call_args_list[2:]], rows.groupby("run"), strict=True
    ):
        assert set(part["parameters"]) == {network.count_params()}
        for column, name in (("log2_mse", "validation"), ("test_log2_mse", "test")):
            predicted = network.predict(run5.network_inputs(sets[name]), verbose=0)[:, 0]
            squares = (predicted - sets[name].log2_height) ** 2
            expected = [squares[sets[name].group == i].mean() for i in range(9)]
            assert part[column].tolist() == pytest.approx(expected, rel=1e-4), run


def test_finished_runs_are_added_and_replace_their_own_rows_alone(csv, tmp_path, capsys):
    results = json.loads((ROOT / "run_5" / "metrics.json").read_text())
    metrics, before = tmp_path / "metrics.json", csv.read_text()
    command = ["--add", "Run 5", str(tmp_path), "--csv", str(csv)]
    broken = ["", "{", "[]", "{}", json.dumps(results | {"stopped_early": False})]
    for content in broken:
        metrics.write_text(content)
        assert baselines.main(command) == 2
        problem = capsys.readouterr().err
        assert ("Run 5: was ended by --epochs" if len(content) > 2 else "metrics.json") in problem
        assert problem.count("\n") == 1 and csv.read_text() == before
    settings, dataset = results["settings"], results["dataset"]
    others = [{}, {"seed": 1}, {"test_codes": 10}, {"val_fraction": 0.5}]
    for changes in (*others, {}):
        metrics.write_text(json.dumps(results | {"settings": settings | changes}))
        assert baselines.main(command) == 0
    metrics.write_text(json.dumps(results | {"dataset": dataset | {"sha256": "another"}}))
    assert baselines.main(command) == 0
    rows = pd.read_csv(csv).query("source == 'measured'")
    assert len(rows) == len(run5.read_baselines(csv)[1]) == 9 * 5
    own = rows[rows["dataset"] == dataset["sha256"]].tail(9)  # The last one that was written.
    for name, column in (("validation", "log2_mse"), ("test", "test_log2_mse")):
        expected = pd.DataFrame(results["errors"][name])
        assert [*own["k"], *own["m"]] == [*expected["k"], *expected["m"]]
        assert own[column].tolist() == pytest.approx(expected["network"].tolist())
    for column in ("epochs_run", "best_epoch", "parameters"):
        assert set(own[column.removesuffix("_run")]) == {results[column]}
    for column in ("seed", "val_fraction", "test_codes"):
        assert set(own[column]) == {settings[column]}
    assert set(own["seconds"]) == {round(results["times"]["seconds"])}


def test_rows_of_own_data_go_beside_the_results(small, small_npz, tmp_path, monkeypatch):
    results, folders = json.loads((ROOT / "run_5" / "metrics.json").read_text()), set()

    def fake(run, dataset, settings, work):
        folders.add(work)
        about = results["settings"] | {"seed": settings.seed}
        return results | {"dataset": dataset.about, "settings": about}

    monkeypatch.setattr(baselines, "train_run", fake)
    before = run5.BASELINES.read_bytes()
    arguments = ["--data", str(small_npz), "--output", str(tmp_path), "--runs", "run2"]
    for seed in (1, 2):
        assert baselines.main([*arguments, "--seed", str(seed)]) == 0
    rows = pd.read_csv(tmp_path / "baselines.csv")
    assert run5.BASELINES.read_bytes() == before and len(folders) == 2
    assert sorted(rows[rows["dataset"] == small.about["sha256"]]["seed"]) == [1] * 9 + [2] * 9


def cosine(epoch):
    """Run 4's rate: along a cosine, anew every 30 epochs."""
    return 1e-6 + (7e-4 - 1e-6) * (1 + np.cos(np.pi * (epoch % 30) / 30)) / 2


@pytest.mark.parametrize(("run", "rate"), [("run2", lambda _: 5e-4), ("run4", cosine)])
def test_a_run_that_was_stopped_is_resumed_at_its_rate(small, tmp_path, run, rate):
    settings = run5.Settings(epochs=3, width=NARROW, batch_size=306, test_codes=10)
    with interrupted(1), pytest.raises(KeyboardInterrupt):
        baselines.train_run(run, small, settings, tmp_path / "broken")
    with watch(run5.Training, "fit") as fit:
        broken, unbroken = (
            baselines.train_run(run, small, settings, tmp_path / name)
            for name in ("broken", "unbroken")
        )
    training = fit.call_args.args[0]
    optimizer, plateau, stopping = training.optimizer, training.plateau, training.stopping
    assert (optimizer.weight_decay, optimizer.clipnorm, stopping.min_delta) == (1e-3, None, 0)
    found = (plateau.factor, plateau.patience, plateau.min_lr, stopping.patience)
    assert found == (0.5, *((20, 1e-6, 30) if run == "run2" else (10, 1e-7, 25)))
    schedule = training.schedule.schedule
    expected = [rate(epoch) for epoch in range(99)]
    assert [schedule(x, 5e-4) for x in range(99)] == pytest.approx(expected)
    assert broken["epochs_run"] == 3 and broken["errors"] == unbroken["errors"]
    training = run5.Training(tmp_path / "broken" / "checkpoint.npz", {}, settings)
    rates = [row["learning_rate"] for row in training.history]
    assert rates == pytest.approx([rate(epoch) for epoch in range(3)])
    other = replace(small, about=small.about | {"sha256": "another"})
    for dataset, changes in ((other, {}), (small, {"seed": 1})):
        with pytest.raises(run5.InputError, match=r"is of a run with"):
            baselines.train_run(run, dataset, replace(settings, **changes), tmp_path / "broken")


def test_bad_input_gets_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baselines, "train_run", None)  # Nothing is trained.
    for options in (["--data", "none.npz"], ["--data", "a", "b", "c"], ["--csv", "none.csv"]):
        assert baselines.main([*options, "--output", str(tmp_path / "work")]) == 2
        problem = capsys.readouterr().err
        assert problem.startswith("rerun_baselines.py: ") and problem.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_csv_of_runs_is_refused(tmp_path):
    path = tmp_path / "baselines.csv"
    header = "run,source,k,m,log2_mse,seed\n"
    for content in ("", "run,source\nRun 2,published\n", header + "Run 2,published,4,2,x,\n"):
        path.write_text(content)
        with pytest.raises(run5.InputError, match=r"baselines\.csv: .*Run 2"):
            run5.read_baselines(path)
    for missing in ("Run 4,published,6,3", "published,6,3"):
        path.write_text(run5.BASELINES.read_text().replace(missing, missing.replace("p", "q")))
        with pytest.raises(run5.InputError, match=r"baselines\.csv: .*Run 4"):
            run5.read_baselines(path)
