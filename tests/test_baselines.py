"""Run 2 and Run 4 on the split of the script: their networks, weights, and rows of the csv."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT

import train_model_v5 as run5
from data import rerun_baselines as baselines


def test_networks_have_the_parameters_of_the_runs():
    """As their scripts had them, less the queries and keys that `attention` leaves out."""
    P = np.random.default_rng(0).normal(size=(50, 20))
    assert baselines.build_run2(P).count_params() == 10_875_041 - 2 * 513 * 8 * 64
    # Counted by hand from the description: embeddings and gate, P, three experts, trunk.
    experts = 0
    for heads, width, units in ((4, 64, 256), (8, 64, 512), (16, 128, 768)):
        inner = heads * width
        experts += (512 + 1) * inner + (inner + 1) * 512
        experts += (512 + 1) * units + (units + 1) * units + 8 * units + (units + 1) * 512
    trunk = (1 + 128 + 512 + 1) * 1024 + 4096 + 6 * (1025 * 1024 + 4096)
    trunk += 1025 * 512 + 2048 + 513 * 256 + 257
    expected = 13 * 64 + 129 * 3 + 21 * 512 + 2048 + experts + trunk
    assert baselines.build_run4(P).count_params() == expected


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


def test_run_4_starts_its_rate_anew_every_30_epochs():
    assert baselines.cosine(0, 1.0) == baselines.cosine(60, 1.0) == pytest.approx(7e-4)
    assert baselines.cosine(15, 1.0) == pytest.approx((7e-4 + 1e-6) / 2)


@pytest.fixture
def csv(tmp_path):
    """A csv of the published figures alone."""
    rows = pd.read_csv(run5.BASELINES, dtype=str, keep_default_na=False)
    rows[rows["source"] == "published"].to_csv(tmp_path / "baselines.csv", index=False)
    return tmp_path / "baselines.csv"


def test_runs_write_their_rows_and_the_report_shows_them(
    eager, small_npz, small, csv, tmp_path, capsys
):
    published, work = csv.read_text(), tmp_path / "work"
    narrow = run5.Settings(data=(small_npz,), width=NARROW, batch_size=306, test_codes=10)
    options = ["--runs", "run2", "run4", "--csv", str(csv), "--output", str(work)]
    short = {x: (build, y | {"epochs": 1}, z) for x, (build, y, z) in baselines.RUNS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run5, "Settings", lambda: narrow)
        assert baselines.main([*options, "--epochs", "1"]) == 0
        assert csv.read_text() == published and len([*work.iterdir()]) == 2  # To go on with.
        patch.setattr(baselines, "RUNS", short)
        assert baselines.main(options) == 0
    assert csv.read_text().startswith(published)  # Other lines stay as they are.
    rows = pd.read_csv(csv).query("source == 'measured'")
    assert list(rows["run"].unique()) == ["Run 2", "Run 4"] and len(rows) == 18
    assert set(rows["ended"]) == {"complete"} and not list(work.iterdir())
    assert (rows["log2_mse"] != rows["test_log2_mse"]).all()
    assert set(rows["dataset"]) == {small.about["sha256"]}

    output = tmp_path / "own"
    arguments = ["--data", str(small_npz), "--output", str(output), "--dropout", "0"]
    arguments += ["--width", str(NARROW), "--test-codes", "10", "--extra-codes", "0"]
    arguments += ["--stop-patience", "1", "--stop-min-delta", "99"]
    assert run5.main([*arguments, "--epochs", "1"]) == 0
    name, before = "Run 5 without dropout", csv.read_text()
    assert baselines.main(["--add", name, str(output), "--csv", str(csv)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "metrics.json" in error and "ended by --epochs after 1" in error
    assert csv.read_text() == before
    assert run5.main(arguments) == 0
    for _ in range(2):  # The second time in place of the first.
        assert baselines.main(["--add", name, str(output), "--csv", str(csv)]) == 0
    rows = pd.read_csv(csv).query("source == 'measured'")
    assert len(rows) == 27
    metrics = json.loads((output / "metrics.json").read_text())
    added = rows[rows["run"] == name].set_index(["k", "m"])["test_log2_mse"]
    for row in metrics["errors"]["test"]:
        assert added[row["k"], row["m"]] == pytest.approx(row["network"])

    report = run5.make_report(metrics, *run5.read_baselines(csv))
    for run, part in rows.groupby("run"):
        table = report.split("trained here")[1].splitlines()
        (line,) = (line for line in table if line.startswith(f"{run} "))
        assert float(line.split()[-1]) == pytest.approx(part["test_log2_mse"].mean(), rel=0.01)
    others = ({"dataset": metrics["dataset"] | {"sha256": "another"}},)
    others += ({"settings": metrics["settings"] | {"test_codes": 11}},)
    for other in others:  # Errors on other sets do not compare.
        assert name not in run5.make_report(metrics | other, *run5.read_baselines(csv))


def test_rows_of_own_data_go_beside_the_results(small_npz, tmp_path, monkeypatch):
    results = json.loads((ROOT / "run_5" / "metrics.json").read_text())
    results["dataset"]["sha256"] = "own"
    monkeypatch.setattr(baselines, "train_run", lambda *_: results)
    before = run5.BASELINES.read_bytes()
    arguments = ["--data", str(small_npz), "--output", str(tmp_path / "own"), "--runs", "run2"]
    assert baselines.main(arguments) == 0 == baselines.main(arguments)
    rows = pd.read_csv(tmp_path / "own" / "baselines.csv")
    assert run5.BASELINES.read_bytes() == before and (rows["dataset"] == "own").sum() == 9


def test_a_run_that_was_stopped_is_resumed(eager, small, tmp_path):
    settings = run5.Settings(epochs=3, width=NARROW, batch_size=306, test_codes=10)
    start = run5.Batches.start_epoch

    def stopped(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt
        start(self, epoch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run5.Batches, "start_epoch", stopped)
        baselines.train_run("run4", small, settings, tmp_path / "broken")
    broken, unbroken = (
        baselines.train_run("run4", small, settings, tmp_path / name)
        for name in ("broken", "unbroken")
    )
    assert broken["epochs_run"] == 3 and broken["errors"] == unbroken["errors"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"errors": {}}'])
def test_what_is_no_finished_run_is_refused_in_one_line(csv, tmp_path, capsys, content):
    before = csv.read_bytes()
    if content:
        (tmp_path / "metrics.json").write_text(content)
    assert baselines.main(["--add", "name", str(tmp_path), "--csv", str(csv)]) == 2
    problem = capsys.readouterr().err
    assert "metrics.json" in problem and problem.count("\n") == 1 and csv.read_bytes() == before


def test_bad_input_gets_one_line(tmp_path, capsys):
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
