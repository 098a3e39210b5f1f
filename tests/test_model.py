"""The network as the design spells it out, its training, and what a resumed run restores."""

from dataclasses import replace
from itertools import combinations, count
from types import SimpleNamespace
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import NARROW, interrupted
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import erf

import train_model_v5 as run5


def by_numpy(network, k, m, features, fitted, kind):
    """log2 heights as the design spells them out, from the weights of the network.

    fitted: the features by which all are scaled.
    """
    of_kind = {kind: [] for kind in ("Dense", "LayerNormalization", "Embedding")}
    for layer in network.layers:
        of_kind.get(type(layer).__name__, []).append(layer.get_weights())
    dense, norms, ((of_k,), (of_m,)) = map(iter, of_kind.values())

    def block(x):
        weights, bias = next(dense)
        x = x @ weights + bias
        x = x * (1 + erf(x / np.sqrt(2))) / 2  # gelu
        factor, shift = next(norms)
        mean, variance = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-3) * factor + shift

    x = (features - fitted.mean(axis=0)) / np.fmax(fitted.std(axis=0), 1e-7)
    x = block(block(np.clip(x, -8, 8)))
    x = block(np.hstack([np.full((len(x), 1), 9), of_k[k], of_m[m], x]))
    for _ in range(2):
        x = x + block(block(x))
    x = block(block(block(x)))
    weights, bias = next(dense)
    return np.logaddexp(0, x @ weights + bias) + features[:, :1] * (kind == "basis")


@pytest.mark.parametrize("kind", ["raw", "basis"])
def test_heights_are_those_that_the_design_gives_for_the_weights(small, kind):
    settings = run5.Settings(width=NARROW, features=kind)
    features = run5.outputs_of(run5.feature_model(kind), small)
    fitted = features[small.k == 6]  # Some columns are constant in them, some others beyond 8.
    network, rng = run5.build_network(fitted, settings), np.random.default_rng(0)
    weights = [x + rng.normal(0, 0.3, x.shape) for x in network.get_weights()]
    scale = [x.shape == features.shape[1:] or not x.shape for x in weights]  # Mean and variance.
    before = zip(weights, network.get_weights(), scale, strict=True)
    network.set_weights([old if kept else new for new, old, kept in before])
    heights = run5.outputs_of(run5.height_model(network, kind), small)
    features, fitted = features.astype(float), fitted.astype(float)
    expected = by_numpy(network, small.k, small.m, features, fitted, kind)
    assert (heights >= 1).all() and heights.shape == (360, 1)
    assert_allclose(np.log2(heights), expected, rtol=1e-3, atol=1e-3)


def test_dropout_drops_at_its_rate_each_time_and_place_anew_and_in_training_alone(graphs):
    x = np.random.default_rng(0).normal(3, 1, size=(256, 512)).astype(np.float32)
    outputs = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        layer = run5.HashDropout(0.3)
        assert_array_equal(layer(x), x)
        outputs.append(np.asarray(layer(x, training=True)))
    assert_array_equal(outputs.pop(0), outputs[0])
    outputs.append(np.asarray(layer(x, training=True)))
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    outputs.append(np.asarray(compiled(x)))
    deviation, dropped = np.sqrt(0.3 * 0.7), np.equal(outputs, 0)
    for output, none in zip(outputs, dropped, strict=True):
        assert_allclose(output[~none], (x / 0.7)[~none], rtol=1e-6)
        assert abs(none.mean() - 0.3) < 5 * deviation / np.sqrt(x.size)
        for axis in (0, 1):
            expected = deviation / np.sqrt(x.shape[axis])
            assert 0.8 * expected < none.mean(axis=axis).std() < 1.2 * expected
    pairs = [*combinations(dropped, 2)]
    pairs += [x for none in dropped for x in ((none[1:], none[:-1]), (none[:, 1:], none[:, :-1]))]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(x.size)


def test_an_epoch_samples_all_rows_evenly_none_twice_each_with_its_weight(small):
    data = replace(small, features=np.arange(360)[:, None])
    settings = run5.Settings(batch_size=50)
    batches = run5.Batches(data, 120, settings)
    steps = [batches[i] for i in range(len(batches))]
    assert [len(target) for _, target, _ in steps] == [50, 50, 20]
    for inputs, target, weight in steps:
        rows = inputs["features"][:, 0]
        assert_array_equal(target[:, 0], data.log2_height[rows])
        expected = [settings.group_weights[i] for i in data.group[rows]]
        assert_array_equal(weight, np.array(expected, dtype=np.float32))
        assert (inputs["n"] == 9).all() and target.shape == weight[:, None].shape
        assert [*inputs["k"][:, 0], *inputs["m"][:, 0]] == [*data.k[rows], *data.m[rows]]
    epochs = []
    for epoch in range(60):
        batches.start_epoch(epoch)
        epochs.append(batches.order)
    first = np.concatenate([inputs["features"][:, 0] for inputs, _, _ in steps])
    assert_array_equal(first, epochs[0])
    assert all(len(epoch) == len(np.unique(epoch)) == 120 for epoch in epochs)
    assert len(np.unique(epochs)) == 360 and set(epochs[0]) != set(epochs[1])
    taken = np.bincount(small.group[np.concatenate(epochs)]) / 60 / 40
    assert_allclose(taken, 1 / 3, atol=0.04)
    assert (run5.Batches(data, 120, replace(settings, seed=1)).order != first).any()


RAW = {"features": "raw", "extra_codes": 0, "test_codes": 10, "width": NARROW, "batch_size": 306}


def trained(dataset, folder, kind=run5.Training, **changes):
    """Train on raw P without extra codes, small; returns the Training and the network."""
    settings = run5.Settings(**RAW | changes)
    keras.utils.set_random_seed(settings.seed)
    sets = run5.make_sets(dataset, settings)
    sets = {x: replace(data, features=data.P.astype("float32")) for x, data in sets.items()}
    network = run5.build_network(sets["training"].features, settings)
    same = {"seed": settings.seed, "data": dataset.about["sha256"]}
    training = kind(folder / "checkpoint.npz", same, settings)
    batches = run5.Batches(sets["training"], len(sets["training"]), settings)
    training.fit(network, batches, sets["validation"])
    return training, network


def test_a_run_that_is_stopped_again_and_again_is_an_unbroken_one(small, tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=count(0, 30).__next__)  # An epoch takes 30 seconds.
    monkeypatch.setattr(run5, "time", clock)
    # At a rate of 1e-12 val_loss stands still: cut after 2 epochs, decay from the second on, stop
    # after 4.
    slow = {"learning_rate": 1e-12, "constant_epochs": 1, "decay": 0.5, "plateau_patience": 2}
    slow |= {"plateau_factor": 0.1, "stop_patience": 4}
    unbroken, first = trained(small, tmp_path, epochs=20, **slow)
    rates = [row["learning_rate"] for row in unbroken.history]
    assert_allclose(np.array(rates) / 1e-12, [1, 0.5, 0.25, 0.0125, 0.00625], rtol=1e-5)
    (tmp_path / "broken").mkdir()
    with interrupted(2), pytest.raises(KeyboardInterrupt):
        trained(small, tmp_path / "broken", epochs=20, **slow)
    for epochs in (2, 4, 20, 20):
        broken, second = trained(small, tmp_path / "broken", epochs=epochs, **slow)
        assert len(broken.history) == min(epochs, 5)
    assert broken.history == unbroken.history and broken.stopped_early
    assert broken.seconds == unbroken.seconds == 150
    for weight, other in zip(first.get_weights(), second.get_weights(), strict=True):
        assert_array_equal(weight, other)


def test_a_damaged_checkpoint_or_one_of_another_network_is_refused(small, tmp_path):
    training, _ = trained(small, tmp_path, epochs=1)
    with pytest.raises(run5.InputError, match="another network"):
        trained(small, tmp_path, epochs=2, width=2 * NARROW)
    content = training.path.read_bytes()
    for damaged in (content[:50_000], b"", b"text"):
        training.path.write_bytes(damaged)
        with pytest.raises(run5.InputError, match=r"checkpoint\.npz: .*delete it.*\Z"):
            run5.Training(training.path, {}, run5.Settings())


def another_goes_on(training):
    other = run5.Training(training.path, training.identity, training.settings)
    other.save(other.variables)


def another_drops_it(training):
    training.path.unlink()


def another_removes_what_is_being_written(training):
    gone = mock.Mock(side_effect=FileNotFoundError)
    training.save = mock.patch("os.replace", gone)(training.save)


DISTURB = [another_goes_on, another_drops_it, another_removes_what_is_being_written]


@pytest.mark.parametrize("disturb", DISTURB)
def test_a_training_ends_where_another_has_changed_its_checkpoint(small, tmp_path, disturb):
    class Disturbed(run5.Training):
        def on_epoch_begin(self, epoch, logs=None):
            super().on_epoch_begin(epoch, logs)
            if epoch == 2:
                disturb(self)

    with pytest.raises(run5.InputError, match="another training"):
        trained(small, tmp_path, Disturbed, epochs=9)
    left = [run5.Training(path, {}, run5.Settings()).history for path in tmp_path.iterdir()]
    assert {len(history) for history in left} == ({2} if disturb != another_drops_it else set())
