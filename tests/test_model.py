"""The network as the design spells it out, its training configuration, the checkpoint, and the saved file."""

import functools
import json
from dataclasses import replace

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import NARROW

import train_model_v5 as run5
from data import files
from data.heights import GROUPS


@pytest.fixture(scope="module")
def featured(small):
    """The small dataset with P as its features."""
    return replace(small, features=small.P.astype("float32"))


def build(features, width=NARROW, kind="raw"):
    """The network for these features, small unless told otherwise."""
    return run5.build_network(features, run5.Settings(width=width, features=kind))


@pytest.mark.parametrize(("features", "width"), [("raw", 20), ("basis", 252)])
def test_layers_are_those_of_the_design(features, width):
    network = build(np.random.default_rng(0).normal(size=(50, width)), 1.0, features)
    whole = run5.height_model(network, features)
    # 5,630,369 with P as 20 numbers.
    assert whole.count_params() == network.count_params() == 5_630_369 + (width - 20) * 256
    assert [x.name for x in whole.inputs] == ["n", "k", "m", "P_matrix"]
    kinds = ("Dense", "Embedding", "HashDropout", "Add")
    of = {kind: [x for x in network.layers if type(x).__name__ == kind] for kind in kinds}
    assert [x.units for x in of["Dense"]] == [256, 512, 1024, 1024, 1024, 1024, 1024, 512, 256, 128, 1]
    assert {keras.activations.serialize(x.activation) for x in of["Dense"]} == {"linear"}
    named = [x.activation for x in network.layers if isinstance(x, keras.layers.Activation)]
    assert [keras.activations.serialize(x) for x in named] == ["hard_tanh"] + ["gelu"] * 10 + ["softplus"]
    assert [(x.input_dim, x.output_dim) for x in of["Embedding"]] == [(7, 32), (6, 32)]
    assert [x.rate for x in of["HashDropout"]] == [0.3, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1]
    assert len(of["Add"]) == (2 if features == "raw" else 3)
    assert sum(isinstance(x, keras.layers.LayerNormalization) for x in network.layers) == 10
    assert not any(isinstance(x, keras.layers.Lambda) for x in whole.layers)


def test_dropout_drops_at_its_rate_and_each_time_and_place_anew():
    keras.utils.set_random_seed(3)
    first, second = run5.HashDropout(0.3), run5.HashDropout(0.3)
    x = np.random.default_rng(0).normal(3, 1, size=(256, 512)).astype(np.float32)
    outputs = [np.asarray(layer(x, training=True)) for layer in (first, first, second)]
    compiled = tf.function(lambda x: second(x, training=True), jit_compile=True)
    outputs.append(np.asarray(compiled(x)))
    deviation = np.sqrt(0.3 * 0.7)
    for output in outputs:
        dropped = output == 0
        np.testing.assert_allclose(output[~dropped], (x / 0.7)[~dropped], rtol=1e-6)
        assert abs(dropped.mean() - 0.3) < 5 * deviation / np.sqrt(x.size)
        for axis in (0, 1):
            expected = deviation / np.sqrt(x.shape[axis])
            assert 0.8 * expected < dropped.mean(axis=axis).std() < 1.2 * expected
        for one, other in ((dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1])):
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(x.size)
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 3)):
        assert abs(np.corrcoef(outputs[i].ravel() == 0, outputs[j].ravel() == 0)[0, 1]) < 5 / np.sqrt(x.size)


def test_dropout_is_there_in_training_alone_and_follows_from_the_seed():
    x = np.ones((64, 32), np.float32)
    masks = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        layer = run5.HashDropout(0.2)
        np.testing.assert_array_equal(layer(x), x)
        masks.append(np.asarray(layer(x, training=True)))
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()
    np.testing.assert_array_equal(run5.HashDropout(0.0)(x, training=True), x)


def test_features_are_scaled_by_the_training_set_and_kept_within_8_deviations():
    train = np.random.default_rng(0).normal(3, 50, (500, 20)).astype(np.float32)
    train[:, 19] = 0
    network = build(train)
    before_dense = next(x for x in network.layers if isinstance(x, keras.layers.Dense)).input
    scaled = keras.Model(network.inputs, before_dense)
    n = np.full((500, 1), 9)
    found = scaled.predict([n, n // 2, n // 4, train], verbose=0)
    np.testing.assert_allclose(found, np.clip((train - train.mean(0)) / np.fmax(train.std(0), 1e-7), -8, 8), atol=1e-4)
    far = scaled.predict([n, n // 2, n // 4, 100 * train], verbose=0)
    assert np.isfinite(far).all() and (far.min(), far.max()) == (-8, 8)


def test_height_is_two_to_the_softplus(featured):
    model = run5.height_model(build(featured.features), "raw")
    heights = run5.predict_all(model, featured)
    log2 = model.get_layer("log2_height").predict(run5.network_inputs(featured), verbose=0)
    assert heights.shape == (360, 1)
    assert (log2 >= 0).all() and (heights >= 1).all()
    np.testing.assert_allclose(np.log2(heights), log2, atol=1e-4)


def test_no_prediction_is_below_the_largest_bound(small):
    model = run5.feature_model("basis")
    bound = run5.predict_all(model, small)[:, :1]
    network = build(run5.predict_all(model, small), kind="basis")
    heights = run5.predict_all(run5.height_model(network, "basis"), small)
    assert (np.log2(heights) >= bound - 1e-5).all()
    # What is added is the softplus of the last dense layer.
    last = [x for x in network.layers if isinstance(x, keras.layers.Dense)][-1].output
    inputs = run5.network_inputs(replace(small, features=run5.predict_all(model, small)))
    softplus = np.logaddexp(0, keras.Model(network.inputs, last).predict(inputs, verbose=0))
    np.testing.assert_allclose(np.log2(heights) - bound, softplus, atol=1e-4)


def test_in_bfloat16_what_comes_in_and_what_goes_out_are_float32(featured, tmp_path):
    data = featured
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = run5.height_model(build(data.features), "raw")
    keras.config.set_dtype_policy("float32")
    network = model.get_layer("log2_height")
    of = {type(layer).__name__: layer for layer in network.layers}
    assert of["Add"].compute_dtype == of["HashDropout"].compute_dtype == "float32"
    assert {variable.dtype for variable in network.trainable_variables} == {"float32"}
    assert network.get_layer("scale").compute_dtype == "float32"
    log2 = network.predict(run5.network_inputs(data), verbose=0)
    heights = run5.predict_all(model, data)
    assert log2.dtype == heights.dtype == np.float32
    np.testing.assert_allclose(np.log2(heights), log2, atol=1e-4)
    model.save(tmp_path / "model.h5")
    np.testing.assert_array_equal(run5.predict_all(run5.load_trained(tmp_path / "model.h5"), data), heights)


def test_rate_falls_from_the_eleventh_epoch_on():
    rate, rates = 1e-3, []
    for epoch in range(13):
        rate = run5.lr_schedule(epoch, rate)
        rates.append(rate)
    np.testing.assert_allclose(rates, [1e-3] * 10 + [0.95e-3, 0.95**2 * 1e-3, 0.95**3 * 1e-3])


def test_defaults_are_the_design():
    settings, asked = run5.parse_arguments([])
    assert settings == run5.Settings()
    weights = [settings.group_weights[group] for group in GROUPS]
    assert weights == [1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.5, 1.2, 1.5]
    assert (settings.epochs, settings.batch_size, settings.seed, settings.val_fraction) == (250, 256, 42, 0.15)
    assert (settings.learning_rate, settings.weight_decay, settings.clipnorm) == (1e-3, 1e-4, 1.0)
    assert (settings.plateau_factor, settings.plateau_patience, settings.stop_patience) == (0.7, 15, 40)
    assert settings.stop_min_delta == 0.002
    assert (settings.constant_epochs, settings.decay) == (10, 0.95)
    assert (settings.features, settings.extra_codes, settings.precision, settings.width) == ("basis", 4, "auto", 1.0)
    assert settings.test_codes == 2000
    assert asked.labels == "check" and not (asked.fresh or asked.predict or asked.report)


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        (["avx2", "avx512f"], [], "float32"),
        (["AMD EPYC", "avx512_bf16"], [], "bfloat16"),
        (["amx_bf16"], [], "bfloat16"),
        (["avx512_bf16"], ["GPU:0"], "float32"),
        ([], [], "float32"),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_has_it_and_there_is_no_gpu(monkeypatch, flags, gpus, expected):
    monkeypatch.setattr(run5, "processor", lambda: flags)
    monkeypatch.setattr(run5, "GPUS", gpus)
    assert run5.precision_for("auto") == expected
    assert [run5.precision_for(asked) for asked in ("float32", "bfloat16")] == ["float32", "bfloat16"]


def test_an_epoch_has_every_training_row_once_with_its_weight(small):
    settings = run5.Settings(batch_size=50, extra_codes=0)
    data = replace(small.take(np.arange(0, 360, 2)), features=np.arange(180)[:, None])
    batches = run5.Batches(data, settings)
    assert len(batches) == 4
    first = [batches[i] for i in range(4)]
    assert [len(target) for _, target, _ in first] == [50, 50, 50, 30]
    rows = np.concatenate([inputs["features"][:, 0] for inputs, _, _ in first])
    assert sorted(rows) == list(range(180))
    for inputs, target, weight in first:
        np.testing.assert_array_equal(target[:, 0], data.log2_height[inputs["features"][:, 0]])
        expected = [settings.group_weights[group] for group in zip(inputs["k"][:, 0], inputs["m"][:, 0], strict=True)]
        np.testing.assert_array_equal(weight, np.array(expected, dtype=np.float32))
        assert (inputs["n"] == 9).all() and target.shape == weight[:, None].shape
    batches.start_epoch(1)
    assert (batches[0][0]["features"] != first[0][0]["features"]).any()
    batches.start_epoch(0)
    np.testing.assert_array_equal(batches[0][0]["features"], first[0][0]["features"])
    other = run5.Batches(data, replace(settings, seed=1))
    assert (other[0][0]["features"] != first[0][0]["features"]).any()


def test_an_epoch_with_extra_codes_takes_other_rows_each_time_none_twice_and_all_groups_evenly(small):
    batches = run5.Batches(replace(small, features=np.arange(360)[:, None]), run5.Settings(extra_codes=2))
    epochs = []
    for epoch in range(60):
        batches.start_epoch(epoch)
        epochs.append(batches.order)
    assert all(len(epoch) == len(np.unique(epoch)) == 120 for epoch in epochs)
    assert len(np.unique(epochs)) == 360 and set(epochs[0]) != set(epochs[1])
    taken = np.bincount(small.group[np.concatenate(epochs)]) / 60 / 40
    np.testing.assert_allclose(taken, 1 / 3, atol=0.04)


RAW = {"features": "raw", "extra_codes": 0, "test_codes": 10, "width": NARROW}


@functools.cache
def three_sets(dataset, seed):
    return run5.three_sets(dataset, run5.Settings(**RAW, seed=seed))


def trained(dataset, folder, **changes):
    """Train on raw P without extra codes, small; returns the checkpoint."""
    settings = run5.Settings(**RAW | changes)
    keras.utils.set_random_seed(settings.seed)
    sets = three_sets(dataset, settings.seed)
    model = run5.height_model(run5.build_network(sets["training"].features, settings), "raw")
    checkpoint = run5.Checkpoint(folder, {"seed": settings.seed, "data": dataset.sha256})
    run5.train(model, sets["training"], sets["validation"], settings, checkpoint)
    return checkpoint


def test_xla_compiles_a_step_in_float32_alone_and_it_computes_what_an_eager_one_does():
    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    losses = []
    for eagerly in (True, False):
        tf.config.run_functions_eagerly(eagerly)
        keras.utils.set_random_seed(1)
        inputs = keras.Input((5,))
        network = keras.Model(inputs, keras.layers.Dense(1)(run5.dense_block(inputs, 16, dropout=0.3)))
        run5.compile_network(network, keras.optimizers.AdamW(0.01, weight_decay=0.1, clipnorm=1.0))
        losses.append(network.fit(x, x[:, :1], epochs=3, verbose=0, shuffle=False).history["loss"])
        assert network.jit_compile
    np.testing.assert_allclose(*losses, rtol=1e-4)
    keras.config.set_dtype_policy("mixed_bfloat16")
    run5.compile_network(network, keras.optimizers.AdamW())
    assert not network.jit_compile


def test_rates_and_early_stop_are_those_of_an_unbroken_run_however_often_it_is_stopped(small, tmp_path, eager):
    # At a rate of 1e-12 val_loss stands still: cut after 2 epochs, decay from the second on, stop after 4.
    slow = {"learning_rate": 1e-12, "constant_epochs": 1, "decay": 0.5, "plateau_patience": 2, "plateau_factor": 0.1}
    slow |= {"stop_patience": 4, "batch_size": 306}
    unbroken = trained(small, tmp_path, epochs=20, **slow)
    rates = [row["learning_rate"] for row in unbroken.history]
    assert unbroken.early_stop and len(rates) == 5
    np.testing.assert_allclose(np.array(rates) / 1e-12, [1, 0.5, 0.25, 0.0125, 0.00625], rtol=1e-5)
    (tmp_path / "broken").mkdir()
    for epochs in (2, 20, 20):
        broken = trained(small, tmp_path / "broken", epochs=epochs, **slow)
        assert len(broken.history) == min(epochs, 5)
    assert broken.history == unbroken.history and broken.early_stop
    first, second = (run5.load_trained(folder / "best_model.h5") for folder in (tmp_path, tmp_path / "broken"))
    for weight, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)


@pytest.fixture(scope="module")
def after_one_epoch(small, tmp_path_factory):
    """(checkpoint, folder) of a run of one epoch, to be copied where it is changed."""
    tf.config.run_functions_eagerly(True)
    folder = tmp_path_factory.mktemp("one epoch")
    checkpoint = trained(small, folder, epochs=1, batch_size=306)
    tf.config.run_functions_eagerly(False)
    return checkpoint, folder


def test_the_history_has_the_error_of_training_rows_without_dropout(after_one_epoch, small):
    checkpoint, folder = after_one_epoch
    rows, _ = run5.split_dataset(small)
    heights = run5.predict_all(run5.load_trained(folder / "best_model.h5"), small.take(rows))[:, 0]
    expected = np.mean((np.log2(heights) - small.log2_height[rows]) ** 2)
    assert checkpoint.history[0]["train_mse"] == pytest.approx(expected, rel=1e-4)
    assert checkpoint.history[0]["train_mse"] != pytest.approx(checkpoint.history[0]["loss"], rel=0.01)


def test_the_optimizer_is_the_designs_and_the_best_model_has_none(after_one_epoch):
    checkpoint, folder = after_one_epoch
    optimizer = checkpoint.model.optimizer
    assert type(optimizer) is keras.optimizers.AdamW
    assert float(optimizer.learning_rate) == pytest.approx(1e-3)
    assert (optimizer.weight_decay, optimizer.clipnorm) == (1e-4, 1.0)
    with h5py.File(folder / "best_model.h5") as file:
        assert "optimizer_weights" not in file and "training_config" not in file.attrs


def test_a_loss_that_is_no_number_ends_the_run(small, tmp_path, eager):
    checkpoint = trained(small, tmp_path, epochs=3, batch_size=306, learning_rate=float("inf"))
    assert checkpoint.diverged and not checkpoint.history


def test_a_run_of_another_dataset_seed_or_network_is_not_gone_on_with(small, after_one_epoch, eager):
    _, folder = after_one_epoch
    with pytest.raises(run5.InputError, match=r"other settings: data \(.* there, another hash now\)"):
        trained(replace(small, sha256="another hash"), folder, epochs=1)
    with pytest.raises(run5.InputError, match=r"seed \(42 there, 7 now\)"):
        trained(small, folder, epochs=1, seed=7)
    with pytest.raises(run5.InputError, match=r"is of another network; --fresh"):
        trained(small, folder, epochs=2, width=2 * NARROW)


def test_a_torn_checkpoint_is_refused(after_one_epoch, tmp_path):
    content, path = after_one_epoch[0].path.read_bytes(), tmp_path / "checkpoint.npz"
    for torn in (content[:50_000], b"", b"text"):
        path.write_bytes(torn)
        with pytest.raises(run5.InputError, match=r"checkpoint\.npz: cannot be read .*; --fresh"):
            run5.Checkpoint(tmp_path, {})


def test_a_run_whose_folder_another_one_has_taken_ends_with_one_line(small, tmp_path, eager):
    """There is no lock: what another run has written is found at the end of an epoch."""

    class Taken(run5.Checkpoint):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.change(self.path)

    def gone(path):
        path.unlink()

    def others(path):
        files.write_checkpoint(path, {"run": {"seed": 7}}, [])

    settings = run5.Settings(**RAW, epochs=3, batch_size=306)
    sets = three_sets(small, settings.seed)
    model = run5.height_model(run5.build_network(sets["training"].features, settings), "raw")
    for change, problem in ((gone, "cannot be read"), (others, r"seed \(7 there, 42 now\)")):
        checkpoint = Taken(tmp_path, {"seed": 42})
        checkpoint.change = change
        with pytest.raises(run5.InputError, match=problem):
            run5.train(model, sets["training"], sets["validation"], settings, checkpoint)


def test_a_disk_that_fills_up_leaves_what_was_there_whole(after_one_epoch):
    resource = pytest.importorskip("resource")
    checkpoint, folder = after_one_epoch
    best = folder / "best_model.h5"
    before = {path: path.read_bytes() for path in (best, checkpoint.path)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = run5.BestModel(best, run5.load_trained(best))
    saver.set_model(None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        for path, write in (
            (best, lambda: saver.on_epoch_end(1, {"val_loss": 0.0})),
            (checkpoint.path, checkpoint.save),
        ):
            with pytest.raises(run5.InputError, match=f"{path.name}: cannot be written: File too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in folder.iterdir()) == ["best_model.h5", "checkpoint.npz"]


def test_the_checkpoint_is_one_file_of_json_and_arrays(after_one_epoch):
    checkpoint, _ = after_one_epoch
    with np.load(checkpoint.path, allow_pickle=False) as file:
        kept = json.loads(str(file["kept"]))
        assert len(file.files) == 1 + len(checkpoint.variables())
    assert len(kept["history"]) == 1 and kept["run"]["seed"] == 42 and not kept["early_stop"]
