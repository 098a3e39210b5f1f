"""Run 2, Run 4 and Run 5 raw on the split of the script: their networks, recipes, rows of the csv, and the report."""

import re
import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT

import train_model_v5 as run5
from data import comparison
from data import rerun_baselines as baselines
from data.heights import GROUPS


def test_networks_have_the_parameters_of_the_runs():
    P = np.random.default_rng(0).normal(size=(50, 20))
    assert baselines.parameters_as_built(baselines.build_run2(P)) == 10_875_041
    # Counted by hand from the description: embeddings and gate, P, three experts, trunk of 1024, 512, 256, 1.
    experts = 0
    for heads, width, units in ((4, 64, 256), (8, 64, 512), (16, 128, 768)):
        inner = heads * width
        experts += 3 * (512 + 1) * inner + (inner + 1) * 512
        experts += (512 + 1) * units + (units + 1) * units + 8 * units + (units + 1) * 512
    trunk = (1 + 128 + 512 + 1) * 1024 + 4096 + 6 * (1025 * 1024 + 4096) + 1025 * 512 + 2048 + 513 * 256 + 257
    expected = 13 * 64 + 129 * 3 + 21 * 512 + 2048 + experts + trunk
    assert baselines.parameters_as_built(baselines.build_run4(P)) == expected == 15_940_548


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_that_of_keras_over_a_sequence_of_length_1(heads):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 10)).astype("float32")
    of_keras = keras.layers.MultiHeadAttention(heads, key_dim=4)
    of_keras(x[:, None], x[:, None])  # Builds it.
    weights = {weight.path: rng.normal(size=weight.shape).astype("float32") for weight in of_keras.weights}
    of_keras.set_weights([*weights.values()])
    expected = of_keras(x[:, None], x[:, None]).numpy()[:, 0]

    inputs = keras.layers.Input((10,))
    network = keras.Model(inputs, baselines.attention(inputs, heads, 4, 0.5))
    network.set_weights([weight for path, weight in weights.items() if "query" not in path and "key" not in path])
    np.testing.assert_allclose(network(x), expected, rtol=1e-4, atol=1e-5)
    if heads == 1:  # In training a head is dropped as a whole, or doubled.
        bias, trained = network.get_weights()[-1], network(x, training=True)
        dropped = np.isclose(trained, bias).all(axis=1)
        doubled = np.isclose(trained, 2 * expected - bias, rtol=1e-3, atol=1e-4).all(axis=1)
        assert dropped.any() and doubled.any() and (dropped ^ doubled).all()


def test_recipes_are_those_of_the_runs():
    run2, run4 = baselines.RUN2, baselines.RUN4
    assert (run2.rate, run2.weight_decay, run2.stop_patience, run2.plateau) == (5e-4, 1e-3, 30, (0.5, 20, 1e-6))
    assert (run4.rate, run4.weight_decay, run4.stop_patience, run4.plateau) == (7e-4, 1e-3, 25, (0.5, 10, 1e-7))
    assert run2.epochs == run4.epochs == 200
    assert [baselines.RUN2_WEIGHTS[group] for group in GROUPS] == [1, 1, 1.5, 5, 1, 1.5, 3, 2, 3]
    assert set(run4.weights(7).values()) == {1.0} and run4.schedule is baselines.cosine
    assert baselines.cosine(0, 1.0) == baselines.cosine(60, 1.0) == pytest.approx(7e-4)
    assert baselines.cosine(15, 1.0) == pytest.approx((7e-4 + 1e-6) / 2)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, [1, 1, 0.4, 0.2, 1, 0.4, 0.2, 0.4, 0.2]),
        (29, [1, 1, 0.4, 0.2, 1, 0.4, 0.2, 0.4, 0.2]),
        (30, [1, 1, 1, 0.5, 1, 1, 0.5, 1, 0.5]),
        (60, [1, 1, 1.5, 2.6, 1, 1.5, 2, 1.5, 2.2]),
        (150, [1, 1, 1.5, 6.5, 1, 1.5, 5, 1.5, 5.5]),
    ],
)
def test_curriculum_by_epoch(epoch, expected):
    weights = baselines.curriculum(epoch)
    assert [weights[group] for group in GROUPS] == pytest.approx(expected)


def test_the_curriculum_reaches_the_batches(small):
    settings = run5.Settings(batch_size=200, extra_codes=0, features="raw")
    data = small.take(np.arange(360))
    data = replace(data, features=data.P)
    batches = baselines.WeightedBatches(data, settings, baselines.RECIPES["run4-curriculum"])
    for epoch in (29, 30):
        batches.start_epoch(epoch)
        for step in range(2):
            inputs, _, weights = batches[step]
            groups = zip(inputs["k"][:, 0], inputs["m"][:, 0], strict=True)
            np.testing.assert_allclose(weights, [baselines.curriculum(epoch)[group] for group in groups], rtol=1e-6)


def test_shared_codes_are_a_third_three_times_and_validation_codes_mostly_in_training(small):
    train_set, val_set = baselines.with_shared_codes(small, 42)
    keys = np.concatenate([train_set.key, val_set.key])
    assert set(np.unique(keys, return_counts=True)[1]) == {3}
    assert len(keys) == 9 * 3 * (40 // 3) and len(np.unique(keys)) == 9 * (40 // 3)
    assert np.isin(val_set.key, train_set.key).mean() > 0.9
    assert len(val_set) == pytest.approx(0.15 * len(keys), abs=1) and set(val_set.group) == set(range(9))


def test_runs_write_their_rows_and_the_report_shows_them(eager, small_npz, small, tmp_path):
    csv = tmp_path / "baselines.csv"
    published = pd.read_csv(comparison.BASELINES).query("source == 'published'")
    published.to_csv(csv, index=False)
    settings = run5.Settings(data=(small_npz,), epochs=1, width=NARROW, batch_size=306, test_codes=10)
    runs = ["run2", "run4", "run5-raw-weights-5", "run2-shared"]
    baselines.train_runs(runs, settings, tmp_path / "work", csv)
    rows = pd.read_csv(csv)
    pd.testing.assert_frame_equal(rows.query("source == 'published'"), published, check_dtype=False)
    measured = rows.query("source == 'measured'")
    names = ["Run 2", "Run 4", "raw P, weight 5", "Run 2, shared"]
    assert list(measured["run"].unique()) == names
    assert len(measured) == 36 and set(measured["ended"]) == {"--epochs 1"} and set(measured["epochs"]) == {1}
    assert measured[["log2_mse", "test_log2_mse"]].stack().between(0.1, 1000).all()
    assert (measured["log2_mse"] != measured["test_log2_mse"]).all() and list((tmp_path / "work").iterdir()) == []
    assert set(measured["dataset"]) == {small.sha256}

    tables = comparison.measured_errors(comparison.read_baselines(small.sha256, csv)[1], 42)
    assert list(tables["validation"]) == names[:3] and list(tables["test"]) == names
    ours = pd.DataFrame({"run5": 0.5, "n": 6}, tables["test"].index)
    text = run5.same_split_text(dict.fromkeys(("validation", "test", "low codes"), ours), tables)
    for column, shown in (("log2_mse", names[:3]), ("test_log2_mse", names)):
        for run in shown:
            figures = measured.query("run == @run")[column]
            assert len(re.findall(rf" {run} +{figures.iloc[0]:.3f} .* {figures.mean():.3f}$", text, re.M)) == 1
    for sha256, seed in ((small.sha256, 43), ("another", 42)):
        assert comparison.measured_errors(comparison.read_baselines(sha256, csv)[1], seed)["test"].empty


def test_every_run_has_its_words_and_the_changes_are_between_runs_that_are_trained():
    names = [recipe.name for recipe in baselines.RECIPES.values()] + [name for name, _ in baselines.VARIANTS.values()]
    assert sorted(names) == sorted(comparison.RUNS)
    assert all({run, base} <= {*comparison.RUNS, comparison.RUN5} for _, base, run in comparison.CHANGES)
    assert max(map(len, comparison.RUNS)) <= 15  # So that the lines of the report's tables are not broken.
    changed = {name: changes for name, changes in baselines.VARIANTS.values()}
    for what, base, run in comparison.CHANGES:
        if run in changed and base in changed:
            differs = {
                name for name in changed[run] | changed[base] if changed[run].get(name) != changed[base].get(name)
            }
            assert len(differs) == 1, what


@pytest.fixture
def own():
    """Rows of a measured run: log2-MSE of 1 on the test set, as published for Run 4 on the validation set."""
    published = pd.read_csv(comparison.BASELINES).query("run == 'Run 4' and source == 'published'")
    return published.assign(
        source="measured", ended="complete", epochs=7, best_epoch=5, parameters=9, test_log2_mse=1.0, seed=42
    )


RUN5_ERRORS = pd.DataFrame({"run5": 1.0, "ridge": 0.25}, pd.MultiIndex.from_tuples(GROUPS, names=["k", "m"]))


def settings(seed=42, features="basis", extra_codes=4):
    return {"seed": seed, "features": features, "extra_codes": extra_codes}


def test_the_report_says_what_a_change_does_for_each_tier_and_seed(own):
    factor = own.apply(lambda row: 2.0 if (row["k"], row["m"]) in comparison.TIERS["hard"] else 0.5, axis=1)
    rows = pd.concat(
        [
            own.assign(run="raw P, weight 1"),
            own.assign(run="raw P, weight 1", seed=1, test_log2_mse=0.8),
            own.assign(run="raw P, weight 5", test_log2_mse=factor),
            own.assign(run="raw P, weight 5", seed=1, test_log2_mse=0.88, ended="--epochs 7"),
            own.assign(run="no dropout", test_log2_mse=0.9),
            own.assign(run="no dropout", seed=1, test_log2_mse=0.7),
        ]
    )
    earlier = comparison.read_baselines("any")[0]
    text = comparison.runs_text(rows, settings(), RUN5_ERRORS, earlier)
    for seed, hard in ((1, "0.8000 -> 0.8800"), (42, "1.0000 -> 2.0000")):
        others = "0.8000 -> 0.8800" if seed == 1 else "1.0000 -> 0.5000"
        assert re.search(rf"^ *raw P: equal weights -> 1 to 5 +{seed} {others} {others} {hard}$", text, re.M)
    assert re.search(r"^ *features: dropout -> no dropout +42( 1\.0000 -> 0\.9000){3}$", text, re.M)
    assert "0.7000" not in text  # Run 5 itself has not been trained with seed 1.
    assert "error by -50.0% to +10.0% (easy), -50.0% to +10.0% (medium), +10.0% to +100.0% (hard), in 2 seeds." in text
    assert "equal weights, it differs by 25.0% (easy), 25.0% (medium), 25.0% (hard) between these seeds." in text
    assert all(absent not in text for absent in ("divided by", "published", "epoch 61", "JAX"))
    assert "raw P, weight 5 " in text and "(9 parameters, 7 epochs)" in text and "stopped by" not in text
    assert "in place of equal" not in comparison.runs_text(rows.query("seed == 42"), settings(), RUN5_ERRORS, earlier)
    for other in (settings(extra_codes=0), settings(features="raw")):  # The present run is not Run 5 then.
        assert "dropout -> no dropout" not in comparison.runs_text(rows, other, RUN5_ERRORS, earlier)
    assert "stopped by --epochs 7" in comparison.runs_text(rows, settings(1), RUN5_ERRORS, earlier)
    assert comparison.runs_text(rows, settings(2), RUN5_ERRORS, earlier) == "not trained with this dataset and seed."


def test_the_report_says_what_each_departure_and_what_shared_codes_do(own):
    earlier = comparison.read_baselines("any")[0]
    rows = pd.concat(
        [
            own.assign(run="Run 2", log2_mse=own["log2_mse"].to_numpy() + 1),
            own.assign(run="Run 2, shared", log2_mse=own["log2_mse"].to_numpy()),
            own.assign(run="Run 5, raw P"),
            own.assign(run="raw P, extra", test_log2_mse=0.8),
            own.assign(run="Run 5, no extra", test_log2_mse=0.0005),
            own.assign(run="Run 4", test_log2_mse=1.1),
            own.assign(run="Run 4, weighted", epochs=99, best_epoch=60, backend="jax"),
        ]
    )
    published = earlier.assign(**{"Run 2": pd.Series({group: 0.1 for group in comparison.TIERS["easy"]})}).fillna(1.0)
    text = comparison.runs_text(rows, settings(), RUN5_ERRORS, published)
    over = "over 1000 (easy), over 1000 (medium), over 1000 (hard)"
    assert f"is divided by {over} by the features, with the largest bound added" in text
    assert "on the features divides it by 4 (easy), 4 (medium), 4 (hard). Extra codes alone divide it by 1.25" in text
    # Run 4's published means are 0.144667, 0.313667 and 1.134667.
    assert "Run 4, against Run 2: +44.7% (easy), -68.6% (medium), +13.5% (hard)." in text
    assert (
        "one run each, the test errors of Run 4 against Run 2: +10.0% (easy), +10.0% (medium), +10.0% (hard)." in text
    )
    assert "1.145 to 0.145 in easy (0.100), 1.314 to 0.314 in medium (1.000), 2.135 to 1.135 in hard (1.000)" in text
    assert "below the published one in medium. This run" in text and "its best epoch is 5 of 7." in text
    assert "it has 1.000 overall, the run on all codes without sharing 1.000." in text
    assert "after 99 epochs. Its best epoch is 60, before hard groups have the large weights." in text
    assert "(9 parameters, 99 epochs, JAX)" in text and "JAX: trained on a GPU" in text
    rows.loc[rows["run"] == "Run 4, weighted", "best_epoch"] = 61
    assert "is 61, when hard groups have the" in comparison.runs_text(rows, settings(), RUN5_ERRORS, earlier)
    assert "ridge" not in comparison.runs_text(rows, settings(features="raw"), RUN5_ERRORS, earlier)


def test_a_run_that_was_stopped_goes_on_and_other_rows_stay(eager, small_npz, tmp_path):
    csv = tmp_path / "baselines.csv"
    pd.read_csv(comparison.BASELINES).query("source == 'published'").to_csv(csv, index=False)
    settings = run5.Settings(data=(small_npz,), epochs=3, width=NARROW, batch_size=306)
    recipe = replace(baselines.RUN2, epochs=3)
    start = baselines.WeightedBatches.start_epoch

    def stopped(self, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        start(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(baselines.RECIPES, "run2", recipe)
        with pytest.MonkeyPatch.context() as inner, pytest.raises(KeyboardInterrupt):
            inner.setattr(baselines.WeightedBatches, "start_epoch", stopped)
            baselines.train_runs(["run2"], settings, tmp_path, csv)
        assert set(pd.read_csv(csv)["source"]) == {"published"}
        baselines.train_runs(["run2"], settings, tmp_path, csv)
    before = pd.read_csv(csv)
    rows = before.query("source == 'measured'")
    assert len(rows) == 9 and set(rows["ended"]) == {"complete"} and set(rows["epochs"]) == {3}
    baselines.write_rows(rows.assign(seed=43, log2_mse=1.0), csv)
    after = pd.read_csv(csv)
    pd.testing.assert_frame_equal(after[: len(before)], before, check_dtype=False)
    assert list(after["seed"][len(before) :]) == [43] * 9


def test_bad_input_gets_one_line(tmp_path, capsys):
    for options in (["--data", tmp_path / "none.npz"], ["--data", "a", "b", "c"], ["--csv", tmp_path / "none.csv"]):
        assert baselines.main([*map(str, options)]) == 2
        problem = capsys.readouterr().err
        assert problem.startswith("rerun_baselines.py: ") and problem.count("\n") == 1


def test_on_jax_the_trainings_on_features_are_refused():
    """Where there is no JAX, as in the tests' environment, all are."""
    command = [sys.executable, ROOT / "data" / "rerun_on_jax.py", "--runs", "run5-without-extra"]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("rerun_on_jax.py: ") and ended.stderr.count("\n") == 1
