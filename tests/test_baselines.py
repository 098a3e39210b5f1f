"""Run 2 and Run 4 on the split of the script: their networks, weights, and rows of the csv."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT, interrupted, watch

import train_model_v5 as run5
from data import rerun_baselines as baselines


def test_networks_are_those_of_the_runs():
    counts = pd.read_csv(run5.BASELINES).groupby("run")["parameters"].max()
    rates = {"Run 2": [0.2, 0.4] + 4 * [0.4]}
    rates["Run 4"] = [0.25, 0.35, 0.4, 0.4, 0.45, 0.4, 0.4, 0.4, 0.3, 0.2]
    gates = {"Run 2": set(), "Run 4": {"softmax"}}
    attention = {"Run 2": [(8, 64, 0.1)]}
    attention["Run 4"] = [(4, 64, 0.15), (8, 64, 0.15), (16, 128, 0.15)]
    P = np.random.default_rng(0).normal(1, 5, size=(50, 20)).astype("float32")
    for run, build in (("Run 2", baselines.build_run2), ("Run 4", baselines.build_run4)):
        network = build(P)
        assert network.count_params() == counts[run]
        (scale,) = (x for x in network.layers if isinstance(x, keras.layers.Normalization))
        np.testing.assert_allclose([scale.mean[0], scale.variance[0]], [P.mean(0), P.var(0)])
        dropout = [x.rate for x in network.layers if isinstance(x, run5.HashDropout)]
        assert sorted(dropout) == sorted(rates[run])
        heads = [x for x in network.layers if isinstance(x, keras.layers.MultiHeadAttention)]
        assert [(x.num_heads, x.key_dim, x.dropout) for x in heads] == attention[run]
        kinds = {x.activation for x in network.layers if isinstance(x, keras.layers.Dense)}
        assert {kind.__name__ for kind in kinds} == {"gelu", "softplus"} | gates[run]


@pytest.fixture
def csv(tmp_path, monkeypatch):
    """A csv of the published figures alone, in place of data/baselines.csv."""
    rows = pd.read_csv(run5.BASELINES, dtype=str, keep_default_na=False)
    rows[rows["source"] == "published"].to_csv(tmp_path / "baselines.csv", index=False)
    monkeypatch.setattr(run5, "BASELINES", tmp_path / "baselines.csv")
    return tmp_path / "baselines.csv"


def test_runs_are_resumed_and_write_their_rows(small_npz, small, csv, tmp_path, monkeypatch):
    published, work = csv.read_text(), tmp_path / "work"
    narrow = run5.Settings(data=(small_npz,), width=NARROW, batch_size=306, test_codes=10)
    short = {x: (build, y | {"epochs": 2}, z) for x, (build, y, z) in baselines.RUNS.items()}
    monkeypatch.setattr(run5, "Settings", lambda: narrow)
    monkeypatch.setattr(baselines, "RUNS", short)
    options = ["--output", str(work), "--seed", "7"]
    with interrupted(1):
        for run in ("run2", "run4"):
            assert baselines.main([*options, "--runs", run]) == 130
    assert csv.read_text() == published and len([*work.iterdir()]) == 2  # To go on with.
    with watch(run5, "evaluate") as evaluate, watch(run5.Training, "fit") as fit:
        assert baselines.main(options) == 0 and not [*work.iterdir()]
    assert csv.read_text().startswith(published)  # Other lines stay as they are.
    rows = pd.read_csv(csv).query("source == 'measured'")
    assert [*rows["run"]] == ["Run 2"] * 9 + ["Run 4"] * 9
    dataset = small.about["sha256"]
    same = {"dataset": dataset, "epochs": 2, "seed": 7, "test_codes": 10}
    assert all(set(rows[column]) == {value} for column, value in same.items())
    for call, (_, part) in zip(evaluate.call_args_list, rows.groupby("run"), strict=True):
        network, sets, _ = call.args
        assert set(part["parameters"]) == {network.count_params()}
        predicted = network.predict(run5.network_inputs(sets["test"]), verbose=0)[:, 0]
        squares = pd.Series((predicted - sets["test"].log2_height) ** 2)
        expected = squares.groupby(sets["test"].group).mean().tolist()
        assert part["test_log2_mse"].tolist() == pytest.approx(expected, rel=1e-4)
    rates = {"run2": [5e-4] * 4, "run4": [7e-4, 5.2525e-4, 3.505e-4, 7e-4]}
    numbers = {"run2": (0.5, 20, 1e-6, 30), "run4": (0.5, 10, 1e-7, 25)}
    for call, run in zip(fit.call_args_list, rates, strict=True):
        training = call.args[0]
        optimizer, plateau, stopping = training.optimizer, training.plateau, training.stopping
        assert (optimizer.weight_decay, optimizer.clipnorm, stopping.min_delta) == (1e-3, None, 0)
        found = plateau.factor, plateau.patience, plateau.min_lr, stopping.patience
        assert found == numbers[run]
        schedule = [training.schedule.schedule(epoch, 5e-4) for epoch in (0, 10, 15, 30)]
        assert schedule == pytest.approx(rates[run])
        assert training.history[0]["learning_rate"] == pytest.approx(rates[run][0])
    assert training.identity == {"run": "run4", "data": dataset, "seed": 7}


def test_finished_runs_are_added_and_replace_their_own_rows_alone(csv, tmp_path, capsys):
    results = json.loads((ROOT / "run_5" / "metrics.json").read_text())
    metrics, before = tmp_path / "metrics.json", csv.read_text()
    command = ["--add", "Run 5", str(tmp_path)]
    for content in ("", "{}", json.dumps(results | {"stopped_early": False})):
        metrics.write_text(content)
        assert baselines.main(command) == 2
        problem = capsys.readouterr().err
        assert ("Run 5: was ended by --epochs" if len(content) > 2 else "metrics.json") in problem
        assert problem.count("\n") == 1 and csv.read_text() == before
    settings, dataset = results["settings"], results["dataset"]
    changes = [{"seed": 1}, {"test_codes": 10}, {"val_fraction": 0.5}]
    changes = [{}, *({"settings": settings | change} for change in changes), {}]
    for change in [*changes, {"dataset": dataset | {"sha256": "another"}}]:
        metrics.write_text(json.dumps(results | change))
        assert baselines.main(command) == 0
    rows = pd.read_csv(csv).query("source == 'measured'")
    assert len(rows) == len(run5.read_baselines()[1]) == 9 * 5
    own = rows[rows["dataset"] == dataset["sha256"]].tail(9)  # The last one that was written.
    for name, column in (("validation", "log2_mse"), ("test", "test_log2_mse")):
        expected = pd.DataFrame(results["errors"][name])
        assert [*own["k"], *own["m"]] == [*expected["k"], *expected["m"]]
        assert own[column].tolist() == pytest.approx(expected["network"].tolist())
    expected = {"epochs": results["epochs_run"], "seconds": round(results["times"]["seconds"])}
    expected |= {x: results[x] for x in ("best_epoch", "parameters")}
    expected |= {x: settings[x] for x in ("seed", "val_fraction", "test_codes")}
    assert all(set(own[column]) == {value} for column, value in expected.items())
