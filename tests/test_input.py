"""Files from users and strangers: course files, hostile and torn ones, prediction."""

import gzip
import io
import os
import pickle
import re
import shutil
from fractions import Fraction
from functools import partial
from unittest import mock

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, ROOT
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from numpy.testing import assert_allclose, assert_array_equal

import train_model_v5 as run5
from data import prepare
from data.dataset import InputError, load_dataset, read_codes, read_heights, unflatten
from data.heights import GROUPS, N, m_heights

P = np.arange(20).reshape(4, 5)
TEXTS = [path.read_text() for path in (ROOT / "README.md", ROOT / "data" / "README.md")]
SNIPPETS = re.findall(r"```python\n(.*?)```", "".join(TEXTS), re.DOTALL)


def dump(path, value, protocol=None):
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


def npz(**arrays):
    np.savez(content := io.BytesIO(), **arrays)
    return content.getvalue()


@pytest.fixture
def rows(small):
    """The small dataset as the course's list of [n, k, m, P]."""
    numbers = zip(small.k.tolist(), small.m.tolist(), small.P, strict=True)
    return [[N, k, m, unflatten(flat[None], k)[0]] for k, m, flat in numbers]


@pytest.fixture
def course(tmp_path, rows, small):
    """(codes file, heights file) in the course's format, the small dataset in them."""
    (tmp_path / "course").mkdir()
    codes = dump(tmp_path / "course" / "DS-1-n_k_m_P", rows)
    return codes, dump(codes.with_name("DS-1-mHeights"), small.height.tolist())


@pytest.fixture
def call(tmp_path, capsys):
    """Calls a main with an --output in tmp_path; returns what it prints, or its one-line error."""

    def call(main, *arguments, output="out", status=0):
        found = main([*map(str, arguments), "--output", str(tmp_path / output)])
        out, err = capsys.readouterr()
        assert found == status, err
        assert not status or (err.count("\n") == 1 and not (tmp_path / output).exists())
        return err if status else out

    return call


# --- course files ---


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_course_files_of_every_protocol_give_the_dataset(tmp_path, rows, small, protocol):
    rows[0] = [*map(np.int64, rows[0][:3]), np.asfortranarray(rows[0][3])]
    forms = [np.ndarray.tolist, np.ravel, lambda x: x.ravel().tolist(), lambda x: (*x,), np.float64]
    forms += [lambda x: x.astype(">i8"), lambda x: x.astype("i1"), lambda x: x.astype(">f4")]
    for row, form in zip(rows[1:], forms, strict=False):
        row[:] = [*map(float, row[:3]), form(row[3])]
    packed = gzip.compress if protocol % 2 else bytes
    for name, value in (("codes", rows), ("heights", [*small.height])):
        content = pickle.dumps(value, protocol)  # NumPy 1 wrote numpy.core.
        content = content if protocol > 3 else content.replace(b"numpy._core", b"numpy.core")
        dump(tmp_path / name, packed(content))
    read = load_dataset(tmp_path / "codes", tmp_path / "heights")
    for name in ("k", "m", "P", "height"):
        assert_array_equal(getattr(read, name), getattr(small, name))
    assert "; 0 of 360" in read.about["labels"]


def test_appended_lists_and_columns_are_read_as_one_list(tmp_path, rows, small):
    parts, cut = (rows[:10], rows[10:250], rows[250:]), np.split(small.height, [10, 250])
    appended = b"".join(map(pickle.dumps, parts))
    labels = b"".join(pickle.dumps(part.tolist()) for part in cut)
    columns = npz(k=small.k[:, None], m=small.m[:, None], P=small.P, height=small.height[:, None])
    forms = [(appended, labels), (columns, columns), (rows, small.height[:, None].tolist())]
    for codes, heights in forms:
        codes, heights = dump(tmp_path / "codes", codes), dump(tmp_path / "heights", heights)
        read = load_dataset(codes, heights)
        assert_array_equal(read.height, small.height)
        assert "0 of 360" in read.about["labels"]
    with pytest.raises(InputError, match=r"codes: cannot be read"):
        read_codes(dump(codes, appended + b"more"))


def test_duplicates_and_infinite_heights_are_counted(tmp_path, course, rows, small, call):
    """There are 25 codes twice, one of them also with another m, and two of infinite height."""
    others = [[N, k, m, -P[::-1]] for _, k, m, P in rows[:25]] + [[N, 4, 3, rows[0][3]]]
    others += [[N, 4, m, P * 0] for m in (2, 4)]
    height = [*small.height, *small.height[:25], m_heights(rows[0][3][None], 3)[0, 0], 1e8, np.inf]
    dump(course[0], rows + others), dump(course[1], np.array(height))
    about = load_dataset(*course).about
    counts = [about[x] for x in ("rows", "duplicates", "infinite")]
    assert counts == [386, 25, 2] and " 1 of 388" in about["labels"]
    assert about["file"] == "DS-1-n_k_m_P + DS-1-mHeights"
    assert run5.main(["--predict", str(course[0])]) == 0
    beside = pd.read_csv(f"{course[0]}_predicted.csv")
    assert "2 of them infinite" in call(prepare.main, "--label", course[0], output="exact")
    for exact in (read_heights(tmp_path / "exact"), beside["exact"]):
        assert_allclose(exact, [*height[:-2], np.inf, np.inf], rtol=1e-14)


def test_a_dataset_is_known_by_both_of_its_files(course, rows, small):
    hashes = [load_dataset(*course).about["sha256"]]
    for file, value in ((1, 2 * small.height), (0, rows[::-1])):
        dump(course[file], value)
        hashes.append(load_dataset(*course).about["sha256"])
    assert len({*hashes}) == 3


@pytest.mark.parametrize("key", [lambda *x: x, lambda *x: str([*x]), "[{},{},{}]".format])
@pytest.mark.parametrize("single", [True, False])
def test_submissions_of_the_course_are_checked(tmp_path, rows, small, call, key, single):
    step = 40 if single else 1
    chosen = [[12, 4, 2, np.ones((4, 8))], *rows[::step]]
    heights, codes, labels = [np.inf, *small.height[::step]], {}, {}
    for (*numbers, matrix), height in zip(chosen, heights, strict=True):
        codes.setdefault(key(*numbers), []).append(matrix)
        labels.setdefault(key(*numbers), []).append(float(height))
    labels[key(9, 5, 3)][0] *= 1.1
    labels = dict(reversed(labels.items()))  # Heights belong to keys, whatever their order.
    others = [{x: y for x, y in labels.items() if x != key(9, 4, 2)}]
    if single:
        codes, labels = ({name: x[0] for name, x in y.items()} for y in (codes, labels))
    else:  # As many heights, of other keys.
        others += [labels | {key(9, 4, 2): [2.0] * 39, key(9, 4, 3): [2.0] * 41}]
    dump(tmp_path / "codes.pkl", codes), dump(tmp_path / "heights.pkl", labels)
    arguments = ["--label", tmp_path / "codes.pkl", "--heights", tmp_path / "heights.pkl"]
    out = call(prepare.main, *arguments, output="exact.npz")
    wrong = [row[:3] for row in chosen].index([9, 5, 3])
    assert f"heights.pkl: 1 of {len(chosen)} heights are wrong\nrow {wrong}: found" in out
    exact = read_heights(tmp_path / "exact.npz")
    assert_array_equal(exact, heights)  # In the order of the codes.
    for other in others:
        dump(tmp_path / "heights.pkl", other)
        assert "heights.pkl: found" in call(prepare.main, *arguments, status=2)


# What people write where they have no height; other wrong ones; right ones, within a tolerance.
LABELS = dict.fromkeys([np.nan, None, 0, -1, "failed", 1e10, 1.0, np.inf], 1)
LABELS |= {"times 0.9999": 1, "times 1.0001": 1, "times 0.99995": 0, "times 1.00005": 0}


@pytest.mark.parametrize(("label", "wrong"), LABELS.items())
def test_wrong_heights_are_counted_and_exact_ones_are_taken(
    course, rows, small, call, label, wrong
):
    if isinstance(label, str) and label.startswith("times"):
        label = small.height[5] * float(label.split()[1])
    dump(course[1], [*small.height[:5], label, *small.height[6:]])
    arguments = ["--label", course[0], "--heights", course[1]]
    out = call(prepare.main, *arguments, output="exact.csv")
    assert f"mHeights: {wrong} of 360 heights are wrong\n" in out
    assert ("\nrow 5: found" in out) == wrong
    read = load_dataset(*course)
    assert_array_equal(read.height, small.height)
    assert f" {wrong} of 360" in read.about["labels"]


# --- what is refused ---


def changed(**arrays):
    """An npz of two codes, but for these arrays; None for one that is left out."""
    good = {"k": [4, 5], "m": [2, 2], "P": np.ones((2, 20)), "height": [2.0, 3.0]} | arrays
    return npz(**{name: x for name, x in good.items() if x is not None})


NUMBERS = [(8, 4, 2), (9, 4.5, 2), (9, 4, None), (9, 10**5000, 2), (9, 4, 6)]
TALL = np.pad(P.reshape(5, 4), ((0, 1), (0, 1)))  # With zeros below and beside it.
MATRICES = [P.ravel()[1:], np.ones((4, 6)), [P.tolist()], [[1, 2], [3]], None, "text", {}, P.T]
MATRICES += [np.hstack([np.eye(4), P]), np.pad(P, ((0, 1), (0, 0)))]
MATRICES += [np.where(P == 3, x, 2.0) for x in (np.nan, np.inf, 1e60, 1e-60)]
BAD_ROWS = ["text", [9, 4, 2], [9, 4, 2, P, P], *([*x, P] for x in NUMBERS)]
BAD_ROWS += [[9, 4, 2, x] for x in MATRICES]
LENGTHS = [(13, 4, 2, 9), (10, 10, 1, 0), (10, 4, 7, 6), (10, 4, 0, 6)]
any_length = partial(read_codes, trained=False)
REFUSED = [
    *((read_codes, [[9, 4, 2, P], row], "row 1: ") for row in BAD_ROWS),
    *((any_length, [[9, 4, 2, P], [*x, np.ones((x[1], y))]], "row 1: ") for *x, y in LENGTHS),
    *((any_length, changed(n=[9, n]), "row 1: ") for n in (10, 9.5)),
    *((any_length, changed(m=[2, m]), "row 1: ") for m in (2.5, 0)),
    (any_length, changed(k=[4, 5.5]), "row 1: "),
    *((read_codes, x, "") for x in ({"n": 9}, [], None)),
    *((read_heights, x, "") for x in ("text", {"a": 2.0}, b"height\n2.0", b"")),
    (load_dataset, npz(k=[4], m=[2], P=np.zeros((1, 20)), height=[np.inf]), "found infinite"),
    (load_dataset, changed(height=None), "has no array height"),
    (load_dataset, changed(k=[4]), r".*shape \(1,\)"),
    (load_dataset, changed(height=["2", "3"]), ".*array height"),
    (load_dataset, changed(P=np.ones((2, 20), dtype=object)), "cannot be read"),
    (load_dataset, changed(k=[4, 3]), r"row 1: .* \(9, 3, 2\)"),
    (load_dataset, changed(P=np.float64(2)), ""),
    (load_dataset, changed(P=np.ones((2, 19))), "row 0: found P of another size"),
    (load_dataset, changed(P=np.full((2, 20), np.inf, "f4")), "row 0: .* finite"),
    (load_dataset, changed(k=[4, 6], P=np.ones((2, 20)) * (np.arange(20) < 19)), "row 1: .* zeros"),
    (read_codes, b"]r\xff\xff\xff\x7f.", "cannot be read.* damaged"),  # It claims memory.
    *((load_dataset, x, "cannot be read as npz") for x in (b"", b"text", b"PK\x03\x04 torn")),
    # What people bring, and what they are told to do.
    (read_codes, [[9, 5, 2, TALL]], r".*\[I \| P\] take G\[:, k:\].*P\[:k, :n - k\]"),
    (read_codes, npz(k=[5], m=[2], P=TALL.reshape(1, -1)), r"row 0: .*P\[:k, :n - k\]"),
    (read_codes, npz(k=[4], m=[2], P=TALL[None]), r".*P\[:k, :n - k\]"),
    (read_codes, pd.DataFrame({"P": [P]}), "cannot be read.* pandas.*savez"),
    (read_codes, b"SQLite format 3\0 and more", ".*SQLite .*README"),
    (read_codes, b'{"n": 9}', ".*JSON"),
    (read_codes, pickle.dumps([[9, 4, 2, P]]) + pickle.dumps({(9, 4, 2): P}), ".*2 objects"),
    (read_codes, {0: {"n": 9, "k": 4, "m": 2, "GeneratorMatrix": P}}, ".*GeneratorMatrix.*README"),
    (read_codes, [{"n": 9, "k": 4, "P_matrix": P, "m_heights": 2.0}], ".*P_matrix.*README"),
    (read_codes, {(9, 4, np.inf): P}, ".*the key"),
    (read_codes, {(9, 4, 10**30): 2.0}, ".*the key"),
    (read_codes, {(9, 4, 2): 7}, "row 0: found"),
]


@pytest.mark.parametrize(("read", "value", "problem"), REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, read, value, problem):
    path = dump(tmp_path / "file", value)
    with pytest.raises(InputError, match=rf"^{path}: {problem}.*\Z"):
        read(path)


@pytest.mark.parametrize("call", ["os system touch {}", "numpy save {}", "builtins eval 1+1"])
@pytest.mark.parametrize("read", [read_codes, read_heights])
def test_a_hostile_pickle_is_refused_by_name_before_it_runs(tmp_path, call, read):
    module, name, argument = call.format(tmp_path / "ran").split(maxsplit=2)
    call = f"c{module}\n{name}\n(V{argument}\ntR."
    with pytest.raises(InputError, match=rf"file: .*\b{module}\.{name}\b"):
        read(dump(tmp_path / "file", call.encode()))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("field", [("O", 0), ("f8", 10**9)])
def test_a_dtype_that_crashes_numpy_is_refused(tmp_path, field):
    """A field of objects that is not said to be one, and a field that lies outside."""
    state = (3, "|", None, ("a",), {"a": (np.dtype(field[0]), field[1])}, 8, 1, 0)
    crash = type("", (), {"__reduce__": lambda _: (np.dtype, ("V8", False, True), state)})()
    state_of_array = (1, (2,), crash, False, b"\0" * 16)
    empty = (np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state_of_array)
    array = type("", (), {"__reduce__": lambda _: empty})()
    with pytest.raises(InputError, match=r"file: .* dtype 'V8'"):
        read_codes(dump(tmp_path / "file", [[9, 4, 2, array]]))


whole = [[[9, 4, 2, P], [9, 4, 3, P.tolist()]], {(9, 4, 2): [P, P], "[9,5,2]": P.T}]
whole += [{(9, 4, 2): [2.0, None]}, changed(), gzip.compress(changed())]
changes = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4)


@given(st.sampled_from(whole), st.integers(0, 5), changes, st.none() | st.integers(0, 2000))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, value, protocol, changes, length):
    content = bytearray(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    for place, byte in changes:
        content[place % len(content)] = byte
    path = dump(tmp_path_factory.getbasetemp() / "any.pkl", bytes(content[:length]))
    for read in (load_dataset, read_codes, read_heights):
        try:
            read(path)
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


# --- prepare.py ---


def test_codes_of_other_lengths_are_labelled_and_not_trained_on(tmp_path, call):
    numbers = [(9, 4, 2), (10, 5, 3), (12, 6, 6), (2, 1, 1), (10, 4, 6), (12, 11, 1), (9, 1, 8)]
    rng = np.random.default_rng(0)
    rows = [[n, k, m, rng.integers(1, 100, (k, n - k))] for n, k, m in numbers] + [[9, 4, 2, P * 0]]
    dump(tmp_path / "codes.pkl", rows)
    outputs = ("codes.npz", "heights.csv", "heights.pkl")
    for name, output in zip(("codes.pkl", "codes.npz", "codes.npz"), outputs, strict=True):
        assert "1 of them inf" in call(prepare.main, "--label", tmp_path / name, output=output)
        with pytest.raises(InputError, match=rf"{name}: row 1: .*\(10, 5, 3\)"):
            read_codes(tmp_path / name)
    expected = [m_heights(matrix[None], [m])[0, 0] for _, _, m, matrix in rows]
    assert pickle.loads((tmp_path / "heights.pkl").read_bytes()) == expected
    table = pd.read_csv(tmp_path / "heights.csv")
    assert [*table] == ["row", "n", "k", "m", "height"]
    columns = [range(len(rows)), *zip(*(row[:3] for row in rows), strict=True), expected]
    assert_allclose(table, np.transpose(columns), rtol=1e-14)


def test_a_write_whose_last_call_fails_leaves_the_old_file_alone(course, monkeypatch):
    before, called = course[1].read_bytes(), []

    def fake(name, *arguments):
        called.append(name)
        if name == "replace":
            raise OSError("the disk is full")

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(fake, name))
    assert prepare.main(["--label", str(course[0]), "--output", str(course[1])]) == 2
    assert called == ["fsync", "replace"] and course[1].read_bytes() == before
    assert {*course[1].parent.iterdir()} == {*course}


def test_an_interrupted_command_has_its_status(monkeypatch):
    monkeypatch.setattr(prepare, "make_dataset", mock.Mock(side_effect=KeyboardInterrupt))
    assert prepare.main([]) == 130


OPTIONS = ["--label codes.pkl", "--output dataset.pkl", "--output no/such/folder.npz"]
OPTIONS += ["--label codes.pkl --output codes.pkl", "--label none.pkl --output heights.pkl"]
OPTIONS += ["--label codes.pkl --heights 1.pkl --output 1.pkl", "--heights 1.pkl --output new"]
OPTIONS += ["--label . --output heights.pkl"]


@pytest.mark.parametrize("options", OPTIONS)
def test_bad_options_are_refused_with_nothing_written(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / "codes.pkl", [[9, 4, 2, P]]), dump(tmp_path / "1.pkl", [2.0])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as exit:
        raise SystemExit(prepare.main(options.split()))
    *usage, error = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(usage) <= 1 and any(x in error for x in options.split())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- prediction ---


def test_predictions_and_exact_heights_are_in_the_order_of_the_input(tmp_path, rows, small, call):
    order = np.random.default_rng(0).permutation(360)
    others = [[10, 4, 2, np.ones((4, 6))], [9, 4, 1, P], [9, 4, 2, P * 0]]
    codes = dump(tmp_path / "test-2026.03.19-n_k_m_P", [rows[i] for i in order] + others)
    out = call(run5.main, "--predict", codes)
    path = tmp_path / "out" / "test-2026.03.19-n_k_m_P_predicted.csv"
    assert f"{path}: 363 rows, 2 of infinite" in out and "\n2 rows have exact heights alone" in out
    table = pd.read_csv(path)
    assert [*table] == ["row", "n", "k", "m", "predicted", "exact"]
    numbers = np.stack(read_codes(codes, trained=False)[:3], axis=1)
    assert_array_equal(table[["n", "k", "m"]], numbers)
    expected = run5.outputs_of(run5.load_trained(run5.TRAINED), small)[:, 0]
    assert_allclose(table["predicted"][:360], expected[order], rtol=1e-5)
    assert_allclose(table["exact"][:360], small.height[order], rtol=1e-14)
    assert table["predicted"].isna().tolist() == [False] * 360 + [True, True, False]
    assert np.isinf(table.loc[362, ["predicted", "exact"]]).all()
    bound = run5.outputs_of(run5.feature_model("basis"), small)[:, 0]
    squares = ((np.stack([np.log2(expected), bound]) - small.log2_height) ** 2).reshape(2, 9, 40)
    printed = re.findall(r" ([\d.]+) +([\d.]+) +(\d+)$", out, re.MULTILINE)
    printed, squares = np.array(printed, dtype=float), squares.mean(axis=2)
    assert_allclose(printed[:, :2].T, squares, rtol=1e-4, atol=2e-6)
    assert set(printed[:, 2]) == {40} and 0 < squares[0].mean() < 0.02 < squares[1].mean()


def test_predictions_are_those_of_the_model_that_is_named(tmp_path, course, small, call):
    features = run5.outputs_of(run5.feature_model("basis"), small)
    network = run5.build_network(features, run5.Settings(width=NARROW))
    model, other = run5.height_model(network, "basis"), tmp_path / "other.h5"
    model.save(other)
    call(run5.main, "--predict", course[0], "--model", other)
    table = pd.read_csv(tmp_path / "out" / "DS-1-n_k_m_P_predicted.csv")
    expected = run5.outputs_of(model, small)[:, 0]
    assert_allclose(table["predicted"], expected, rtol=1e-5)
    P4 = unflatten(small.P[:3], 4)
    assert_allclose(run5.inference(9, 4, 2, P4, model=other), expected[:3], rtol=1e-5)
    shutil.copy(run5.TRAINED, other)  # As after another training.
    assert run5.inference(9, 4, 2, P4, model=other) == run5.inference(9, 4, 2, P4)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (MemoryError, 2)])
def test_a_prediction_that_ends_early_is_not_said_to_resume(
    course, call, monkeypatch, error, status
):
    monkeypatch.setattr(run5, "exact_heights", mock.Mock(side_effect=error("interrupted")))
    said = call(run5.main, "--predict", course[0], status=status)
    assert "interrupted" in said and "resume" not in said


class Own(layers.Layer):
    """A layer that Keras does not know when it loads the model."""


OTHER_MODELS = {"another name": ("m_height", "float64"), "another dtype": ("run5", "float32")}


@pytest.mark.parametrize("kind", ["missing", "torn", "layer", *OTHER_MODELS])
def test_a_model_that_is_broken_or_of_another_kind_is_refused(tmp_path, course, call, kind):
    path = tmp_path / ("model.keras" if kind == "layer" else "model.h5")
    if kind == "torn":
        path.write_bytes(run5.TRAINED.read_bytes()[:100_000])
    elif kind == "layer":
        keras.Sequential([layers.Input((1,)), Own()]).save(path)
    elif kind in OTHER_MODELS:
        name, dtype = OTHER_MODELS[kind]
        inputs = run5.feature_model("raw").inputs[:3]
        inputs.append(layers.Input((20,), name="P_matrix", dtype=dtype))
        output = layers.Dense(1)(layers.Concatenate()(inputs))
        keras.Model(inputs, output, name=name).save(path)
    assert f"{path}: " in call(run5.main, "--predict", course[0], "--model", path, status=2)


def test_inference_takes_any_iterable_and_loads_its_model_once(small, monkeypatch):
    matrices = unflatten(small.P[:5], 4)
    heights = run5.inference(9, 4, 2, matrices)
    assert [type(height) for height in heights] == [float] * 5
    monkeypatch.setattr(keras.models, "load_model", None)
    fractions = [[[Fraction(int(x)) for x in row] for row in P] for P in matrices]
    forms = (matrices.tolist(), iter(matrices), [x.ravel() for x in matrices], fractions)
    for form in forms:
        assert run5.inference(np.int64(9), 4.0, 2, form) == pytest.approx(heights, rel=1e-5)
    assert run5.inference(9, 4, 2, []) == []
    others = [(9, 6, P, r"\(4, 5\)"), (9, 2.5, P, "n = 9"), (9, 2, P.T, ""), (9, 2, P[0], r"\[P\]")]
    others += [(9, 2, P * 1j, ""), (10, 2, np.ones((4, 6)), r"\(10, 4, 2\), expected n = 9")]
    for n, m, matrix, text in others:
        with pytest.raises(ValueError, match=rf"^p_list: row 0: found .*{text}.*\Z"):
            run5.inference(n, 4, m, [matrix, matrix])
    matrices = [P * 0, P * 0 + 1, P**3]  # Of minimum distance 1, 2 and more.
    assert np.isinf(run5.inference(9, 4, 2, matrices)).tolist() == [True, True, False]


# --- READMEs ---


def test_the_snippets_of_the_readme_and_the_course_evaluator(small, capsys, tmp_path, monkeypatch):
    course = pytest.importorskip("tamu_csce_636_project1")
    monkeypatch.chdir(tmp_path)
    one_code = re.search(r'-c "\n(.*?)"\n', TEXTS[0], re.DOTALL)[1]
    exec(one_code, {})
    shown = re.search(r"prints .*?, ([\d.]+), .* ([\d.]+):", TEXTS[0]).groups()
    printed = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert [*map(float, printed)] == pytest.approx([*map(float, shown)], abs=0.006)
    exec(next(snippet for snippet in SNIPPETS if "export(" in snippet), {})
    assert shown[0] in capsys.readouterr().out
    groups = {f"[9,{k},{m}]": small.take(small.group == i) for i, (k, m) in enumerate(GROUPS)}
    inputs = {name: [*unflatten(data.P, data.k[0])] for name, data in groups.items()}
    outputs = {name: data.height.tolist() for name, data in groups.items()}
    evaluator = course.Evaluator(first_name="A", last_name="L", email="a@tamu.edu", print=False)
    errors = evaluator.eval(func=run5.inference, inputs=inputs, outputs=outputs)
    assert [*errors] == [(9, k, m) for k, m in GROUPS] and 0 < np.mean([*errors.values()]) < 0.02


def test_a_generator_matrix_becomes_a_P_of_the_same_height():
    exec(next(snippet for snippet in SNIPPETS if "P_of" in snippet), names := {})
    places = np.random.default_rng(0).permutation(9)
    mixed = np.random.default_rng(0).integers(-3, 4, (4, 4)) @ np.hstack([np.eye(4), P**2])
    forms = np.stack([P**2, names["P_of"](mixed[:, places]), names["P_of"](mixed[:, ::-1])])
    assert_allclose(m_heights(forms, 2), m_heights(forms[:1], 2).repeat(3, 0), rtol=1e-9)
    with pytest.raises(ValueError, match="no k independent"):
        names["P_of"](np.ones((4, 9)))
