"""The network as the design spells it out, its training configuration, and the saved file."""

import platform
import time

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

import train_model_v5 as run5
from data.prepare import Codes, label


@pytest.fixture(scope="module")
def dataset(small_npz):
    return run5.load_dataset(small_npz)


@pytest.fixture(scope="module")
def seen(dataset):
    return run5.see(dataset, "basis")


@pytest.fixture(autouse=True)
def float32_again():
    """A run sets Keras' policy for the whole process."""
    yield
    keras.config.set_dtype_policy("float32")


def built(seen, features="basis"):
    return run5.height_model(run5.build_network(seen.shape[1], run5.fit_scaler(seen, np.arange(len(seen)))), features)


@pytest.fixture(scope="module")
def model(seen):
    return built(seen)


@pytest.mark.parametrize(("features", "parameters"), [("raw", 5_630_369), ("basis", 5_630_369 + (612 - 20) * 256)])
def test_layers_are_those_of_the_design(dataset, features, parameters):
    whole = built(run5.see(dataset, features), features)
    assert sum(int(np.prod(v.shape)) for v in whole.trainable_variables) == parameters
    assert whole.count_params() == parameters
    assert [x.name for x in whole.inputs] == ["n", "k", "m", "P_matrix"]
    assert [x.name for x in whole.layers[4:]] == ["P_seen", "log2_height", "height"]
    model = whole.get_layer("log2_height")
    kinds = ("Dense", "Embedding", "HashDropout", "Add")
    of = {kind: [x for x in model.layers if type(x).__name__ == kind] for kind in kinds}
    assert [x.units for x in of["Dense"]] == [256, 512, 1024, 1024, 1024, 1024, 1024, 512, 256, 128, 1]
    assert {keras.activations.serialize(x.activation) for x in of["Dense"]} == {"linear"}
    named = [x.activation for x in model.layers if isinstance(x, keras.layers.Activation)]
    assert [keras.activations.serialize(x) for x in named[1:]] == ["gelu"] * 10 + ["softplus"]
    assert [(x.input_dim, x.output_dim) for x in of["Embedding"]] == [(7, 32), (6, 32)]
    assert [x.rate for x in of["HashDropout"]] == [0.3, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1]
    assert len(of["Add"]) == 2
    assert sum(isinstance(x, keras.layers.LayerNormalization) for x in model.layers) == 10
    assert not any(isinstance(x, keras.layers.Lambda) for x in model.layers)


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


@pytest.mark.parametrize("features", ["basis", "raw"])
def test_in_bfloat16_what_comes_in_and_what_goes_out_are_float32(dataset, features, tmp_path):
    seen = run5.see(dataset, features)
    rows = np.arange(0, len(dataset), 3)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        scaler = run5.fit_scaler(seen, np.arange(len(seen)))
        model = run5.height_model(run5.build_network(seen.shape[1], scaler), features)
        np.testing.assert_array_equal(run5.see(dataset, features), seen)
    finally:
        keras.config.set_dtype_policy("float32")
    network = model.get_layer("log2_height")
    of = {type(layer).__name__: layer for layer in network.layers}
    assert of["Add"].compute_dtype == of["HashDropout"].compute_dtype == "float32"
    assert {variable.dtype for variable in network.trainable_variables} == {"float32"}
    scaled = keras.Model(network.inputs, network.get_layer("P_scaled").output)
    expected = (seen[rows] - seen.mean(axis=0)) / np.maximum(seen.std(axis=0), 1e-7)
    found = scaled.predict(run5.network_inputs(dataset, seen, rows), verbose=0)
    varies = seen.std(axis=0) > 1e-3
    np.testing.assert_allclose(found[:, varies], expected[:, varies], rtol=1e-3, atol=1e-3)
    log2 = network.predict(run5.network_inputs(dataset, seen, rows), verbose=0)
    heights = model.predict(run5.model_inputs(dataset, rows), verbose=0)
    assert log2.dtype == heights.dtype == np.float32
    np.testing.assert_allclose(np.log2(heights), log2, atol=1e-4)
    model.save(tmp_path / "model.h5")
    again = run5.load_trained(tmp_path / "model.h5").predict(run5.model_inputs(dataset, rows), verbose=0)
    np.testing.assert_array_equal(again, heights)


@pytest.mark.slow
def test_the_trained_model_errs_as_little_in_bfloat16():
    path = ROOT / "run_5" / "best_model_run5.h5"
    if not path.exists():
        pytest.skip("no trained model: python train_model_v5.py makes it")
    trained = run5.load_trained(path).get_layer("log2_height")
    shipped = run5.load_dataset(*run5.Settings().data)
    rows = run5.split_dataset(shipped)[1]
    codes = Codes(shipped.k[rows], shipped.m[rows], shipped.P[rows])
    inputs = run5.network_inputs(codes, run5.see(codes, "basis"), np.arange(len(rows)))
    predicted, errors = {}, {}
    for precision, policy in run5.PRECISIONS.items():
        keras.config.set_dtype_policy(policy)
        try:
            network = run5.build_network(run5.BasisNorms.WIDTH, trained.get_layer("P_scaled"))
        finally:
            keras.config.set_dtype_policy("float32")
        network.set_weights(trained.get_weights())
        predicted[precision] = network.predict(inputs, batch_size=2048, verbose=0)[:, 0]
        table = run5.group_errors(codes.k, codes.m, shipped.log2_height[rows], predicted[precision])
        errors[precision] = table["log2_mse"]
        print(f"{precision}: {errors[precision].round(5).to_dict()}, mean {errors[precision].mean():.5f}")
    assert (predicted["bfloat16"] != predicted["float32"]).any()
    np.testing.assert_allclose(errors["bfloat16"], errors["float32"], atol=5e-4)


@pytest.mark.parametrize(
    ("flags", "seconds", "expected"),
    [
        (["avx2", "avx512f"], (), "float32"),
        (["avx512_bf16"], (2.0, 1.0), "bfloat16"),
        (["avx2", "amx_bf16"], (1.4, 1.0), "bfloat16"),
        (["avx512_bf16"], (1.3, 1.0), "float32"),
    ],
)
def test_bfloat16_is_chosen_only_where_the_processor_has_it_and_it_is_measured_faster(
    monkeypatch, flags, seconds, expected
):
    readings = iter([3.0, 3.0, *seconds] + [3.0] * 16)

    def timed(product, **_):
        assert product().shape == (1024, 1024)
        return next(readings)

    monkeypatch.setattr(run5, "processor", lambda: ([], flags))
    monkeypatch.setattr(run5.timeit, "timeit", timed)
    assert run5.faster_precision() == expected


def test_an_unfinished_run_keeps_the_precision_that_it_began_with(monkeypatch, tmp_path):
    monkeypatch.setattr(run5, "faster_precision", lambda: "float32")
    journal = tmp_path / "journal.npz"
    assert run5.precision_of_run("auto", journal) == "float32"
    np.savez(journal, journal=np.array('{"run": {"precision": "bfloat16"}}'))
    assert run5.precision_of_run("auto", journal) == "bfloat16"
    assert run5.precision_of_run("float32", journal) == "float32"
    np.savez(journal, journal=np.array('{"run": {"precision": "auto"}}'))
    assert run5.precision_of_run("auto", journal) == "float32"
    journal.write_bytes(b"torn")
    with pytest.raises(run5.InputError, match="cannot be read"):
        run5.precision_of_run("auto", journal)


def test_height_is_two_to_the_softplus(model, dataset, seen):
    rows = np.arange(50)
    heights = model.predict(run5.model_inputs(dataset, rows), verbose=0)
    log2 = model.get_layer("log2_height").predict(run5.network_inputs(dataset, seen, rows), verbose=0)
    assert heights.shape == (50, 1)
    assert (log2 >= 0).all() and (heights >= 1).all()
    np.testing.assert_allclose(np.log2(heights), log2, atol=1e-4)


def test_scaler_centres_what_it_was_fitted_on_and_leaves_constant_columns_finite():
    P = np.random.default_rng(0).normal(3, 50, (500, 20))
    P[:, 19] = 0
    scaled = np.asarray(run5.fit_scaler(np.vstack([P, P + 1000]), np.arange(500))(P))
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(axis=0)[:19], 1, atol=1e-4)


def test_saved_file_needs_nothing_but_the_import(model, dataset, tmp_path):
    model.save(tmp_path / "model.h5")
    rows = np.arange(30)
    inputs = run5.model_inputs(dataset, rows)
    flat = {name: x if name == "P_matrix" else x[:, 0] for name, x in inputs.items()}
    expected = model.predict(inputs, verbose=0)
    for given in (inputs, flat):
        again = keras.models.load_model(tmp_path / "model.h5")
        np.testing.assert_array_equal(again.predict(given, verbose=0), expected)


def test_rate_falls_from_the_eleventh_epoch_on():
    rate, rates = 1e-3, []
    for epoch in range(13):
        rate = run5.lr_schedule(epoch, rate)
        rates.append(rate)
    np.testing.assert_allclose(rates, [1e-3] * 10 + [0.95e-3, 0.95**2 * 1e-3, 0.95**3 * 1e-3])


def test_defaults_are_the_design():
    settings, asked = run5.parse_arguments([])
    weights = [settings.group_weights[group] for group in run5.GROUPS]
    assert weights == [1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.5, 1.2, 1.5]
    assert (settings.epochs, settings.batch_size, settings.seed, settings.val_fraction) == (250, 256, 42, 0.15)
    assert (settings.learning_rate, settings.weight_decay, settings.clipnorm) == (1e-3, 1e-4, 1.0)
    assert (settings.plateau_factor, settings.plateau_patience, settings.stop_patience) == (0.7, 15, 40)
    assert settings.stop_min_delta == 0.002
    assert (settings.constant_epochs, settings.decay) == (10, 0.95)
    assert (settings.features, settings.drawn, settings.precision) == ("basis", 4, "auto")
    assert not (asked.fresh or asked.trust_labels or asked.predict)


@pytest.mark.parametrize("ahead", [3, 32])
def test_an_epoch_has_every_training_row_once_with_its_weight(dataset, ahead, monkeypatch):
    monkeypatch.setattr(run5, "SEEN_AHEAD", ahead)
    settings = run5.Settings(batch_size=50)
    rows = np.arange(0, len(dataset), 2)
    seen = dataset.P + 0.5
    stream = run5.batches(dataset, seen, rows, len(rows), settings)
    first = [next(stream) for _ in range(4)]
    assert [len(target) for _, target, _ in first] == [50, 50, 50, 30]
    P = np.concatenate([inputs["P_seen"] for inputs, _, _ in first])
    np.testing.assert_array_equal(np.unique(P, axis=0), np.unique(seen[rows], axis=0))
    for inputs, target, weight in first:
        expected = [settings.group_weights[group] for group in zip(inputs["k"][:, 0], inputs["m"][:, 0], strict=True)]
        np.testing.assert_array_equal(weight, np.array(expected, dtype=np.float32))
        assert (inputs["n"] == 9).all() and target.shape == weight[:, None].shape
    second, resumed = next(stream), next(run5.batches(dataset, seen, rows, len(rows), settings, first_epoch=1))
    np.testing.assert_array_equal(second[0]["P_seen"], resumed[0]["P_seen"])
    assert (second[0]["P_seen"] != first[0][0]["P_seen"]).any()


def test_an_epoch_of_fewer_rows_takes_others_each_time_and_none_twice(dataset):
    settings = run5.Settings(batch_size=50)
    seen = np.arange(len(dataset))[:, None]
    rows = np.arange(len(dataset))
    stream = run5.batches(dataset, seen, rows, 120, settings)
    epochs = [np.concatenate([next(stream)[0]["P_seen"] for _ in range(3)]) for _ in range(60)]
    assert all(len(epoch) == len(np.unique(epoch)) == 120 for epoch in epochs)
    assert len(np.unique(epochs)) == len(rows) and set(epochs[0].flat) != set(epochs[1].flat)

    taken = np.bincount(dataset.group[np.concatenate(epochs).ravel()]) / np.bincount(dataset.group) / 60
    share = np.array([settings.group_shares[group] for group in run5.GROUPS])
    assert (np.diff(taken[np.argsort(share, kind="stable")])[np.diff(np.sort(share)) >= 0.5] > 0).all()
    within = taken[share == 1]
    assert np.ptp(within) < 0.1 < within.mean() - taken[share == 0.5].mean()


@pytest.fixture
def small_network(monkeypatch):
    """The network at a 32nd of its width and without a graph to trace, where only what is around it is tested."""
    full = run5.dense_block
    monkeypatch.setattr(run5, "dense_block", lambda x, units, dropout=0.0: full(x, max(4, units // 32), dropout))
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def trained(dataset, tmp_path, **changes):
    settings = run5.Settings(output=tmp_path, **changes)
    train_rows, val_rows = run5.split_dataset(dataset)
    seen = dataset.P.astype(np.float32)
    model = run5.height_model(run5.build_network(20, run5.fit_scaler(seen, train_rows)), "raw")
    return run5.train(model, dataset, seen, train_rows, len(train_rows), val_rows, settings, tmp_path)


def test_plateau_cuts_stay_and_the_run_stops_early(dataset, tmp_path, small_network):
    # At a rate of 1e-12 val_loss stands still: cut after 2 epochs, decay from the second on, stop after 5.
    journal = trained(
        dataset,
        tmp_path,
        learning_rate=1e-12,
        constant_epochs=1,
        decay=0.5,
        plateau_patience=2,
        plateau_factor=0.1,
        stop_patience=5,
        epochs=20,
    )
    rates = [row["learning_rate"] for row in journal.history]
    assert journal.finished and journal.best_epoch == 1 and len(rates) == 6
    np.testing.assert_allclose(np.array(rates) / 1e-12, [1, 0.5, 0.25, 0.0125, 0.00625, 0.0003125], rtol=1e-5)


@pytest.mark.parametrize("way", [{}, {"jit_compile": True}])
def test_the_optimizers_kernels_compute_keras_adamw(way):
    """Three steps with gradients of norms below and above the one they are clipped to, one of them sparse."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape).astype(np.float32) for shape in ((30, 20), (20,), (7, 4))]
    scales, rows = (0.001, 3.0, 0.3), np.array([0, 5, 2])
    gradients = [
        [(rng.normal(size=v.shape) * s).astype(np.float32) for v, s in zip(start, scales, strict=True)]
        for _ in range(3)
    ]

    def stepper(optimizer, variables):
        @tf.function(**way)
        def step(dense, sparse):
            last = tf.IndexedSlices(sparse, tf.constant(rows), tf.constant(start[2].shape))
            optimizer.apply([*dense, last], variables)

        return step

    ends = []
    for kind in (run5.AdamW, keras.optimizers.AdamW):
        variables = [keras.Variable(v) for v in start]
        optimizer = kind(0.01, weight_decay=0.1, clipnorm=1.0)
        optimizer.build(variables)
        step = stepper(optimizer, variables)
        for *dense, last in gradients:
            step([tf.constant(g) for g in dense], tf.constant(last[rows]))
        ends.append([np.asarray(v) for v in (*variables, *optimizer.variables)])
    assert all(np.abs(v - v0).max() > 0.01 for v, v0 in zip(ends[0][:3], start, strict=True))
    for ours, theirs in zip(*ends, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_optimizer_is_the_designs_and_steps_are_compiled(dataset, tmp_path, small_network):
    journal = trained(dataset, tmp_path, epochs=1)
    optimizer = journal.model.optimizer
    assert journal.model.jit_compile
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert float(optimizer.learning_rate) == pytest.approx(1e-3)
    assert (optimizer.weight_decay, optimizer.clipnorm) == (1e-4, 1.0)
    with h5py.File(tmp_path / "best_model.h5") as file:
        assert "optimizer_weights" not in file and "training_config" not in file.attrs


@pytest.mark.parametrize(
    ("policy", "gpu", "several", "expected"),
    [
        ("float32", False, 1, "all"),
        ("mixed_bfloat16", False, 1, "between"),
        ("mixed_bfloat16", True, 1, "nothing"),
        ("mixed_bfloat16", False, 2, "nothing"),
    ],
)
def test_xla_leaves_bfloat16s_products_alone_and_only_while_training(monkeypatch, policy, gpu, several, expected):
    monkeypatch.setattr(run5, "has_gpu", lambda: gpu)
    monkeypatch.setattr(run5, "devices", lambda: (0, several))
    keras.config.set_dtype_policy(policy)
    assert run5.compiled_by_xla() == expected
    with pytest.raises(InterruptedError), run5.compiled_between_products():
        assert bool(tf.config.optimizer.get_jit()) == (expected == "between")
        raise InterruptedError
    assert not tf.config.optimizer.get_jit()


def test_freed_memory_is_kept_for_the_next_step():
    resource = pytest.importorskip("resource")
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc is told to")
    run5.keep_freed_memory()
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert len(b"x" * 30_000_000) == 30_000_000
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 700, "a tenth of its pages or more came from the system"


@pytest.mark.parametrize("library", [lambda name: object(), lambda name: len(name)])
def test_another_c_library_keeps_what_it_likes(library, monkeypatch):
    monkeypatch.setattr(run5.ctypes, "CDLL", library)
    run5.keep_freed_memory()


def test_a_loss_that_is_no_number_ends_the_run(dataset, tmp_path, small_network):
    journal = trained(dataset, tmp_path, epochs=3, learning_rate=float("inf"))
    assert journal.diverged and not journal.finished and not journal.history


def test_a_run_of_another_dataset_or_network_is_not_gone_on_with(dataset, tmp_path, small_network, monkeypatch):
    trained(dataset, tmp_path, epochs=1)
    other = run5.Dataset(dataset.k, dataset.m, dataset.P, dataset.height, "other", "another hash")
    with pytest.raises(run5.InputError, match=r"other settings: data \(.* there, another hash now\)"):
        trained(other, tmp_path, epochs=1)
    with pytest.raises(run5.InputError, match=r"seed \(42 there, 7 now\)"):
        trained(dataset, tmp_path, epochs=1, seed=7)
    monkeypatch.setattr(run5, "residual_block", lambda x, units, dropout: x)
    with pytest.raises(run5.InputError, match=r"is of another network; --fresh"):
        trained(dataset, tmp_path, epochs=1)


def test_a_torn_journal_is_refused(dataset, tmp_path, small_network):
    journal = trained(dataset, tmp_path, epochs=1).path
    for content in (journal.read_bytes()[:50_000], b"", b"text"):
        journal.write_bytes(content)
        with pytest.raises(run5.InputError, match=r"journal\.npz: cannot be read .*; --fresh"):
            trained(dataset, tmp_path, epochs=1)


def test_fresh_drops_an_unfinished_run(dataset, small_npz, tmp_path, small_network, capsys):
    work = tmp_path / "unfinished"
    work.mkdir()
    trained(dataset, work, epochs=2)
    arguments = ["--data", str(small_npz), "--output", str(tmp_path), "--epochs", "1"]
    assert run5.main(arguments) == 2
    assert "epochs (2 there, 1 now)" in capsys.readouterr().err
    assert run5.main([*arguments, "--fresh"]) == 0
    assert "complete; 1 of at most 1 epochs" in (tmp_path / "detailed_comparison.txt").read_text()
    assert not work.exists()


def test_a_diverged_run_says_what_to_try_and_keeps_the_best_model(
    small_npz, tmp_path, small_network, monkeypatch, capsys
):
    monkeypatch.setattr(run5, "lr_schedule", lambda epoch, lr, **rest: lr if epoch < 1 else float("inf"))
    assert run5.main(["--data", str(small_npz), "--output", str(tmp_path), "--epochs", "5"]) == 1
    err = capsys.readouterr().err
    assert "became NaN or infinite in epoch 2" in err and "try another --seed" in err
    best = run5.load_trained(tmp_path / "unfinished" / "best_model.h5")
    assert all(np.isfinite(weight).all() for weight in best.get_weights())
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]


@pytest.mark.slow
def test_exact_heights_are_faster_than_the_network(model):
    """Codes a second over all nine groups, in turn, the best of five readings; the labeller in one process."""
    shipped = run5.load_dataset(ROOT / "data" / "augmented.npz")
    rows = np.arange(0, len(shipped), 4)
    codes = Codes(shipped.k[rows], shipped.m[rows], shipped.P[rows])
    ways = {"exact": lambda: label(codes, workers=1), "network": lambda: run5.predict_heights(model, shipped, rows)}
    rates = dict.fromkeys(ways, 0.0)
    for _ in range(5):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            rates[name] = max(rates[name], len(rows) / (time.perf_counter() - start))
    print(", ".join(f"{name}: {rate:,.0f} codes a second" for name, rate in rates.items()))
    assert rates["exact"] > rates["network"]
