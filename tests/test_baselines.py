"""Run 2, Run 4 and Run 5 raw on the split of the script: their networks, recipes, rows of the csv, and the report."""

import re
import shutil

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import train_model_v5 as run5
from data import rerun_baselines as baselines
from data.prepare import GROUPS

CSV = run5.HERE / "data" / "baselines.csv"


def scaler():
    return keras.layers.Normalization(mean=[0.0] * 20, variance=[1.0] * 20)


def test_networks_have_the_parameters_of_the_runs():
    assert baselines.build_run2(scaler()).count_params() == 10_875_041
    # Counted by hand from the description: embeddings and gate, P, three experts, trunk of 1024, 512, 256, 1.
    experts = 0
    for heads, width, units in ((4, 64, 256), (8, 64, 512), (16, 128, 768)):
        inner = heads * width
        experts += 3 * (512 + 1) * inner + (inner + 1) * 512
        experts += (512 + 1) * units + (units + 1) * units + 8 * units + (units + 1) * 512
    trunk = (1 + 128 + 512 + 1) * 1024 + 4096 + 6 * (1025 * 1024 + 4096) + 1025 * 512 + 2048 + 513 * 256 + 257
    expected = 13 * 64 + 129 * 3 + 21 * 512 + 2048 + experts + trunk
    assert baselines.build_run4(scaler()).count_params() == expected == 15_940_548


def test_lone_attention_is_keras_attention_over_one_vector():
    """Without dropout: outputs, and gradients, where what query and key get from Keras is rounding."""
    results = []
    x = keras.random.normal((5, 1, 10), seed=1)
    for kind in (keras.layers.MultiHeadAttention, baselines.LoneAttention):
        layer = kind(4, 6)
        layer(x, x)
        learned = {variable.path.split("/", 1)[1]: variable for variable in layer.weights}
        for i, name in enumerate(sorted(learned)):
            learned[name].assign(keras.random.normal(learned[name].shape, seed=i))
        with tf.GradientTape() as tape:
            y = layer(x, x, training=True)
            loss = tf.reduce_sum(y**3)
        gradients = tape.gradient(loss, {name: v.value for name, v in learned.items()}, unconnected_gradients="zero")
        results.append({"output": y} | gradients)
    assert sorted(results[0]) == sorted(results[1]) and len(results[0]) == 9
    largest = max(np.abs(x).max() for x in results[0].values())
    for name, expected in results[0].items():
        np.testing.assert_allclose(results[1][name], expected, atol=1e-5 * largest, err_msg=name)


def test_lone_attention_drops_whole_heads_as_often_as_it_is_to():
    layer = baselines.LoneAttention(4, 6, dropout=0.25)
    x = keras.random.normal((2000, 1, 10), seed=1)
    layer(x, x)
    layer.output_dense.kernel.assign(keras.ops.reshape(keras.ops.eye(24, 10), (4, 6, 10)))
    layer.output_dense.bias.assign(keras.ops.zeros(10))
    whole = np.asarray(layer(x, x))[:, 0]
    ratio = np.asarray(layer(x, x, training=True))[:, 0] / whole
    first, second = ratio[:, :6], ratio[:, 6:]
    for head in (first, second):
        np.testing.assert_allclose(head, np.repeat(head[:, :1], head.shape[1], axis=1), rtol=1e-3)
        assert 0.22 < (head[:, 0] == 0).mean() < 0.28
        np.testing.assert_allclose(head[head != 0], 1 / 0.75, rtol=1e-3)


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


def test_curriculum_reaches_the_batches(small_npz):
    dataset = run5.load_dataset(small_npz)
    rows = np.arange(len(dataset))
    recipe = baselines.RECIPES["run4-curriculum"]
    stream = baselines.weighted_batches(dataset, dataset.P, rows, recipe, run5.Settings(batch_size=200), 2, 29)
    for epoch in (29, 29, 30, 30):
        inputs, _, weights = next(stream)
        groups = zip(inputs["k"][:, 0], inputs["m"][:, 0], strict=True)
        np.testing.assert_allclose(weights, [baselines.curriculum(epoch)[group] for group in groups], rtol=1e-6)


def test_shared_codes_are_thrice_a_third_and_mostly_on_both_sides(small_npz):
    dataset = run5.load_dataset(small_npz)
    shared, train_rows, val_rows = baselines.with_shared_codes(dataset, 42)
    assert set(np.unique(shared.code, return_counts=True)[1]) == {3}
    assert len(shared) == 9 * 3 * (40 // 3) and len(np.unique(shared.code)) == 9 * (40 // 3)
    np.testing.assert_array_equal(np.sort(np.concatenate([train_rows, val_rows])), np.arange(len(shared)))
    assert np.isin(shared.code[val_rows], shared.code[train_rows]).mean() > 0.9
    run5.check_labels(shared)


@pytest.fixture
def narrow(monkeypatch):
    """Networks at a 32nd of their widths and without a graph to trace."""
    for module, name in ((baselines, "dense"), (run5, "dense_block")):
        full = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, u, *rest, f=full, **more: f(x, max(4, u // 32), *rest, **more))
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def test_runs_write_their_rows_and_the_report_shows_them(narrow, small_npz, tmp_path, monkeypatch):
    csv = tmp_path / "data" / "baselines.csv"
    csv.parent.mkdir()
    shutil.copy(CSV, csv)
    published = pd.read_csv(csv).query("source == 'published'")
    options = ["--data", small_npz, "--output", tmp_path / "work", "--csv", csv, "--epochs", 1]
    fit, policies = run5.fit_resumably, []
    monkeypatch.setattr(run5, "faster_precision", lambda: "bfloat16")
    monkeypatch.setattr(
        run5, "fit_resumably", lambda *rest: (policies.append(keras.config.dtype_policy().name), fit(*rest))
    )
    for _ in range(2):
        assert baselines.main([*map(str, options)]) == 0
    keras.config.set_dtype_policy("float32")
    assert policies == 2 * [*3 * ["float32"], "mixed_bfloat16", "float32"]
    rows = pd.read_csv(csv)
    pd.testing.assert_frame_equal(rows.query("source == 'published'"), published, check_dtype=False)
    dataset = run5.load_dataset(small_npz)
    rows = rows[rows["dataset"] == dataset.sha256]
    assert list(rows["run"].unique()) == [
        "Run 2",
        "Run 4",
        "Run 4, curriculum in force",
        "Run 5, raw P",
        "Run 2, codes shared",
    ]
    assert len(rows) == 45 and set(rows["ended"]) == {"complete"} and set(rows["epochs"]) == {1}
    assert rows["log2_mse"].between(0.1, 1000).all() and list((tmp_path / "work").iterdir()) == []

    monkeypatch.setattr(run5, "HERE", tmp_path)
    _, measured, runs = run5.read_baselines(dataset.sha256, 42)
    compared = ["Run 2", "Run 4", "Run 4, curriculum in force", "Run 5, raw P"]
    assert list(measured.columns) == [*compared, "Run 2, codes shared"]
    table = run5.compare_measured([{"run5": 0.5}] * 9, measured)
    assert [row["name"] for row in table][9:] == ["easy", "medium", "hard", "overall"]
    assert table[-1]["Run 2"] == pytest.approx(rows.query("run == 'Run 2'")["log2_mse"].mean())
    assert table[0]["change"]["Run 4"] == pytest.approx(0.5 / measured["Run 4"].iloc[0] - 1)
    assert list(table[0]["change"]) == compared
    text = run5.measured_text(table, runs.to_dict("index"))
    assert f"k=4,m=2  {measured['Run 2'].iloc[0]:.6f}" in text and "vs R5 raw" in text
    assert re.search(r"R2 +Run 2: [\d,]+ parameters, 1 epochs, best epoch 1$", text, re.MULTILINE)
    runs.loc["Run 4", "ended"] = "interrupted"
    text = run5.measured_text(table, runs.to_dict("index"))
    assert re.search(r"Run 4: [\d,]+ parameters, 1 epochs, best epoch 1; interrupted", text)
    for other, seed in ((dataset.sha256, 43), ("another", 42)):
        assert run5.compare_measured([{"run5": 0.5}] * 9, run5.read_baselines(other, seed)[1]) == []
    assert "Left out" in run5.measured_text([], {})


def test_an_interrupted_run_writes_what_it_reached_and_goes_on(narrow, small_npz, tmp_path, monkeypatch):
    csv = tmp_path / "baselines.csv"
    pd.read_csv(CSV).query("source == 'published'").to_csv(csv, index=False)
    options = [*map(str, ["--runs", "run2", "--data", small_npz, "--output", tmp_path, "--csv", csv, "--epochs", 3])]
    begin = run5.Journal.on_train_begin

    def interrupted_at_once(journal, logs=None):
        begin(journal, logs)
        journal.stop_asked = True

    with monkeypatch.context() as patch:
        patch.setattr(run5.Journal, "on_train_begin", interrupted_at_once)
        assert baselines.main(options) == run5.INTERRUPTED
    rows = pd.read_csv(csv).query("source == 'measured'")
    assert set(rows["ended"]) == {"interrupted"} and set(rows["epochs"]) == {1}
    assert baselines.main(options) == 0
    rows = pd.read_csv(csv).query("source == 'measured'")
    assert len(rows) == 9 and set(rows["ended"]) == {"complete"} and set(rows["epochs"]) == {3}
    before = pd.read_csv(csv)
    assert baselines.main([*options, "--seed", "43"]) == 0
    after = pd.read_csv(csv)
    pd.testing.assert_frame_equal(after[: len(before)], before, check_dtype=False)
    assert list(after["seed"][len(before) :]) == [43] * 9


def test_bad_input_gets_one_line(tmp_path, capsys):
    for options in (["--data", tmp_path / "none.npz"], ["--data", "a", "b", "c"], ["--csv", tmp_path / "none.csv"]):
        assert baselines.main([*map(str, options)]) == 2
        problem = capsys.readouterr().err
        assert problem.startswith("rerun_baselines.py: ") and problem.count("\n") == 1
