"""Files from users and strangers: course files, hostile and torn ones, exact labels, prediction."""

import gzip
import io
import os
import pickle
import re
import shutil
import signal
import time
import zipfile
from fractions import Fraction
from functools import partial
from unittest import mock

import h5py
import joblib
import keras
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

import train_model_v5 as run5
from data import dataset as files
from data import prepare
from data.dataset import InputError, flatten, load_dataset, read_codes, read_heights, unflatten
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


def zipped(name):
    with zipfile.ZipFile(content := io.BytesIO(), "w") as file:
        file.writestr(name, "content")
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
    codes = dump(tmp_path / "course" / "DS-1-Training-n_k_m_P.pkl", rows)
    return codes, dump(codes.with_name("DS-1-Training-mHeights.pkl"), small.height.tolist())


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


class Python2(pickle._Pickler):
    """Writes the data of arrays as Python 2 did, as a string."""

    dispatch = pickle._Pickler.dispatch | {bytes: lambda self, raw: self.write_string(raw)}

    def write_string(self, raw):
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(raw)


@pytest.mark.parametrize("protocol", range(-1, pickle.HIGHEST_PROTOCOL + 1))
def test_course_files_of_every_protocol_give_the_dataset(tmp_path, rows, small, protocol):
    rows[0] = [*map(np.int64, rows[0][:3]), np.asfortranarray(rows[0][3])]
    forms = [np.ndarray.tolist, np.ravel, lambda x: x.ravel().tolist(), lambda x: (*x,), np.float64]
    forms += [lambda x: x.astype(">i8"), lambda x: x.astype("i1"), lambda x: x.astype(">f4")]
    for row, form in zip(rows[1:], forms, strict=False):
        row[3] = form(row[3])
    packed = gzip.compress if protocol % 2 else bytes
    for name, value in (("codes", rows), ("heights", [*small.height])):
        if protocol < 0:
            Python2(content := io.BytesIO(), 2).dump(value)
            content = content.getvalue().replace(b"numpy._core", b"numpy.core")
        else:
            content = pickle.dumps(value, protocol)
        dump(tmp_path / name, packed(content))
    read = load_dataset(tmp_path / "codes", tmp_path / "heights")
    for name in ("k", "m", "P", "height"):
        np.testing.assert_array_equal(getattr(read, name), getattr(small, name))


def test_a_folder_is_taken_for_its_files_of_the_usual_names(tmp_path, course, rows, small, call):
    other_m = m_heights(rows[0][3][None], 3)[0, 0]
    dump(
        course[0],
        [*rows, *([N, k, m, -P[::-1]] for _, k, m, P in rows[:25]), [N, 4, 3, rows[0][3]]],
    )
    height = np.array([*small.height, *small.height[:25], other_m])
    dump(course[1], height)
    folder = course[0].parent
    course[0].rename(folder / "HW-4-n_k_m_P"), course[1].rename(folder / "HW-4-mHeights")
    assert run5.main(["--predict", str(folder)]) == 0
    predicted = folder / "HW-4-n_k_m_P_predicted.csv"  # Beside the input, and not taken for one.
    predicted = pd.read_csv(predicted, float_precision="round_trip")
    np.testing.assert_array_equal(predicted["exact"], height)
    call(prepare.main, "--label", folder, output="exact.csv")
    np.testing.assert_array_equal(read_heights(tmp_path / "exact.csv"), height)
    about = load_dataset(folder).about
    assert about["duplicates"] == 25 and about["rows"] == 386
    assert about["file"] == "HW-4-n_k_m_P + HW-4-mHeights"
    (folder / "DS-2-mHeights.pickle").touch()
    with pytest.raises(InputError, match=r"course: found DS-2-mHeights\.pickle, HW-4"):
        load_dataset(folder)
    error = call(prepare.main, "--label", tmp_path, status=2)
    assert "found none, expected one file *n_k_m_P*" in error


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
    out = call(prepare.main, *arguments, output="exact.csv")
    wrong = [row[:3] for row in chosen].index([9, 5, 3])
    assert f"heights.pkl: 1 of {len(chosen)} heights are wrong\nrow {wrong}: found" in out
    exact = read_heights(tmp_path / "exact.csv")
    np.testing.assert_array_equal(exact, heights)  # In the order of the codes.
    for other in others:
        dump(tmp_path / "heights.pkl", other)
        assert "heights.pkl: found" in call(prepare.main, *arguments, status=2)


def changed(**arrays):
    """An npz of two codes, but for these arrays; None for one that is left out."""
    good = {"k": [4, 5], "m": [2, 2], "P": np.ones((2, 20)), "height": [2.0, 3.0]} | arrays
    return npz(**{name: x for name, x in good.items() if x is not None})


NUMBERS = [(8, 4, 2), (9, 4.5, 2), (9, 4, None), (9, 10**5000, 2), (9, 4, 6), (9, 5, 2)]
MATRICES = [P.ravel()[1:], np.ones((4, 6)), [P.tolist()], [[1, 2], [3]], [["1"] * 5] * 4, P == P]
MATRICES += [None, "text", 3, {}, P.T]
MATRICES += [np.where(P == 3, x, 2.0) for x in (np.nan, np.inf, 1e60, 1e-60)]
BAD_ROWS = [
    "text",
    [9, 4, 2],
    [9, 4, 2, P, P],
    *([*x, P] for x in NUMBERS),
    *([9, 4, 2, x] for x in MATRICES),
]
LENGTHS = [(13, 4, 2, 9), (10, 10, 1, 1), (10, 4, 7, 6), (10, 4, 0, 6), (10, 4, 2, 5)]
TALL = np.pad(P.reshape(5, 4), ((0, 1), (0, 1)))  # With zeros below and beside it.
any_length = partial(read_codes, trained=False)
REFUSED = [
    *((read_codes, [[9, 4, 2, P], row], "row 1: ") for row in BAD_ROWS),
    *((any_length, [[9, 4, 2, P], [*x, np.ones((x[0], y))]], "row 1: ") for *x, y in LENGTHS),
    *((any_length, changed(n=[9, n]), "row 1: ") for n in (10, 9.5)),
    *((any_length, changed(m=[2, m]), "row 1: ") for m in (2.5, 0)),
    (any_length, changed(k=[4, 5.5]), "row 1: "),
    *((read_codes, x, "") for x in ({"n": 9}, [], None)),
    *((read_heights, x, "") for x in ("text", {"a": 2.0}, b"\xff\xfe", b"")),
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
    (read_codes, [[9, 5, 2, TALL]], r".*padded .*P\[:k, :n - k\]"),
    (read_codes, [[9, 4, 2, np.pad(P, ((0, 1), (0, 0)))]], r".*padded .*P\[:k, :n - k\]"),
    (read_codes, [[9, 4, 2, np.hstack([np.eye(4), P])]], r".*G = \[I \| P\].*G\[:, k:\]"),
    (read_codes, [[9, 4, 2, np.hstack([P[:, :4], P])]], ".*generator matrix G, data/README"),
    (read_codes, [[9, 4, 2, [[1] * 5, [1, 2, "x", 4, 5], [1] * 5, [1] * 5]]], ".*in P there.*'x'"),
    (read_codes, npz(k=[4], m=[2], P=np.pad(P, ((0, 2), (0, 0)))[None]), r".*P\[:k, :n - k\]"),
    (read_codes, npz(k=[5], m=[2], P=TALL.reshape(1, -1)), r"row 0: .*P\[:k, :n - k\]"),
    (read_codes, b"SQLite format 3\0 and more", ".*SQLite .*README"),
    (read_codes, b'{"n": 9}', ".*JSON"),
    (read_codes, zipped("archive/data.pkl"), ".*zip of archive/data.pkl"),
    (read_codes, pickle.dumps([[9, 4, 2, P]]) + pickle.dumps({(9, 4, 2): P}), ".*2 objects"),
    (read_codes, {0: {"n": 9, "k": 4, "m": 2, "GeneratorMatrix": P}}, ".*README.* GeneratorMatrix"),
    (read_codes, [{"n": 9, "k": 4, "P_matrix": P, "m_heights": 2.0}], ".*P_matrix.*README"),
    (read_codes, {(9, 4, np.inf): P}, ".*the key"),
    (read_codes, {(9, 4, 10**30): 2.0}, ".*the key"),
    (read_codes, {(9, 4, 2): 7}, "row 0: found"),
    (read_codes, gzip.compress(b"damaged", mtime=0), "cannot be read"),
    (read_codes, gzip.compress(b"damaged", mtime=0)[:10] + b"\xff" * 20, "cannot be read"),
    (read_codes, b"N}S'a'\nI1\nsb.", "cannot be read"),  # It sets an attribute of None.
]


@pytest.mark.parametrize(("read", "value", "problem"), REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, read, value, problem):
    path = dump(tmp_path / "file", value)
    with pytest.raises(InputError, match=f"{path}: {problem}") as error:
        read(path)
    assert "\n" not in str(error.value)


def finite_by_rounding():
    """Integer codes of infinite height, by a float solver in another systematic form."""
    rng = np.random.default_rng(0)
    P = rng.integers(-2, 3, (600, 4, 5))
    G = np.concatenate([np.broadcast_to(np.eye(4), (600, 4, 4)), P], axis=2)
    G = G[np.isinf(m_heights(G[:, :, 4:], 4)[:, 0]) & (np.linalg.det(G[:, :, [0, 4, 5, 6]]) != 0)]
    form = np.linalg.solve(G[:, :, [0, 4, 5, 6]], G[:, :, [1, 2, 3, 7, 8]])
    return form[(np.rint(form) != form).any(axis=(1, 2))]


def test_heights_that_rounding_alone_makes_finite_are_infinite_ones(tmp_path, rows, small, call):
    P = finite_by_rounding()
    dump(tmp_path / "codes.pkl", rows + [[9, 4, 4, x] for x in P])
    out = call(prepare.main, "--label", tmp_path / "codes.pkl", output="heights.pkl")
    assert f"{len(P)} of them infinite" in out and len(P) > 50
    dump(tmp_path / "solver.pkl", [*small.height, *np.full(len(P), 2.0**52)])
    for labels, name in (("check", "heights"), ("check", "solver"), ("trust", "solver")):
        read = load_dataset(tmp_path / "codes.pkl", tmp_path / f"{name}.pkl", labels=labels)
        assert read.about["infinite"] == len(P) and len(read) == 360
    assert np.isinf(run5.inference(9, 4, 4, P)).all()


def test_appended_pickles_are_read_as_one(tmp_path, rows, small):
    parts = (rows[:10], rows[10:250], rows[250:])
    codes = dump(tmp_path / "codes.pkl", b"".join(map(pickle.dumps, parts)))
    cut = np.split(small.height, [10, 250])
    labels = b"".join(pickle.dumps(part.tolist()) for part in cut)
    read = load_dataset(codes, dump(tmp_path / "heights.pkl", labels))
    np.testing.assert_array_equal(read.height, small.height)
    with pytest.raises(InputError, match=r"codes\.pkl: cannot be read"):
        read_codes(dump(codes, codes.read_bytes() + b"more"))


def test_numbers_of_other_kinds_are_taken(rows, small, tmp_path):
    heights = run5.inference(9, 4, 2, [P])
    exact = [[Fraction(int(x)) for x in row] for row in P]
    for form in (exact, np.array(exact), P.astype(object)):
        assert run5.inference(9.0, 4, 2, [form]) == heights
    floats, column = [[*map(float, row[:3]), row[3]] for row in rows], small.height[:, None]
    columns = npz(k=small.k[:, None], m=small.m[:, None], P=small.P, height=column)
    for data, labels in [
        (floats, column),
        (floats, column.tolist()),
        (columns, npz(height=column)),
    ]:
        read = load_dataset(dump(tmp_path / "codes", data), dump(tmp_path / "heights", labels))
        np.testing.assert_array_equal(read.height, small.height)
    for bad in ("3", True, None, 1j):
        with pytest.raises(InputError, match="in P there is"):
            run5.inference(9, 4, 2, [np.where(P == 3, np.array(bad, dtype=object), P)])


CSV = "row,n,k,m,height\n0,9,4,2,{}\n1,9,4,3,{}\n2,9,5,2,{}\n"
GOOD = CSV.format(4 / 3, 167.06107322857977, np.inf)  # To the last digit.
CSVS = {
    GOOD + "\n": None,
    "".join(GOOD.splitlines(keepends=True)[i] for i in (0, 3, 1, 2)): None,
    CSV.format("2,", "3,", "4,"): "5 to 6 fields",  # A comma at the end of lines.
    "height\n1,83.5\n2,166.1\n3,2\n": "1 to 2 fields",  # Row names of R.
    "height\n83,567\n166,1\n2,5\n": "1 to 2 fields",  # Decimal commas.
    GOOD.replace("2,9,5", "3,9,5"): "column row",
    GOOD.replace("9,4,3", "9,4,4"): "row 1: found another m",
    GOOD.replace("9,4,3", "9,5,3"): "row 1: found another k",
    GOOD.replace("2,9,5", "2,8,5"): "row 2: found another n",
    GOOD.replace("height", "heights"): "height",
    "row\n0\n": "height",
    "": "",
}


@pytest.mark.filterwarnings("error::pandas.errors.ParserWarning")
@pytest.mark.parametrize(("text", "problem"), CSVS.items())
def test_a_csv_has_the_heights_of_its_rows_or_is_refused(tmp_path, text, problem):
    codes = dump(tmp_path / "c", [[9, 4, 2, P], [9, 4, 3, P], [9, 5, 2, P.reshape(5, 4)]])
    path, codes = dump(tmp_path / "h.csv", text.encode()), read_codes(codes)
    if problem is None:
        assert read_heights(path, codes).tolist() == [4 / 3, 167.06107322857977, np.inf]
        return
    with pytest.raises(InputError, match=rf"h\.csv: .*{problem}") as error:
        read_heights(path, codes)
    assert "\n" not in str(error.value)


FAILED = [np.nan, None, 0, -1, "failed"]  # What people write where they have no height.


@pytest.mark.parametrize("mark", [*FAILED, 1e10, 1.0, np.inf, 0.9999, 1.0001, 0.99995, 1.00005])
def test_labels_are_right_within_a_tolerance(tmp_path, rows, small, call, mark):
    codes = dump(tmp_path / "codes.pkl", rows)
    if near := mark not in FAILED and abs(mark - 1) < 0.1 and mark != 1:
        mark *= small.height[5]
    right = near and abs(mark / small.height[5] - 1) < 7e-5
    labels = dump(tmp_path / "labels.pkl", [*small.height[:5], mark, *small.height[6:]])
    out = call(prepare.main, "--label", codes, "--heights", labels, output="exact.csv")
    assert f"labels.pkl: {1 - right} of 360 heights are wrong\n" in out
    assert right or "\nrow 5: found" in out
    relabelled = load_dataset(codes, labels, labels="relabel")
    assert f"where {1 - right} of 360" in relabelled.about["labels"]
    np.testing.assert_array_equal(relabelled.height, small.height)
    if not right:
        with pytest.raises(InputError, match=r"row 5: .*1 of 360 heights are wrong"):
            load_dataset(codes, labels)
    if mark in FAILED:
        with pytest.raises(InputError, match=r"row 5: .* of 1 or more"):
            load_dataset(codes, labels, labels="trust")
    else:
        kept = load_dataset(codes, labels, labels="trust").height
        assert kept[5] == (small.height[6] if mark == np.inf else mark)


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


def test_a_pickle_may_not_change_what_the_next_one_calls():
    names = re.findall(rb"c(.+\n(?!ndarray).+\n)", pickle.dumps([P, np.float64(2)], 2))
    assert len(names) == 4
    for name in names:  # Each is pushed, and an attribute of it is set.
        marked = files._read_pickle("file", b"\x80\x02c" + name + b"N}S'mark'\nI1\ns\x86b.")
        fresh = files._read_pickle("file", b"\x80\x02c" + name + b".")
        assert marked.mark == 1 and not hasattr(fresh, "mark")


def test_files_of_pandas_and_others_are_refused_with_a_way_on(tmp_path, monkeypatch, rows, small):
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame(rows, columns=["n", "k", "m", "P"]).assign(result=small.height)
    frame.loc[len(frame)] = [10, 4, 2, np.ones((4, 6)), 2.0]
    frame.to_pickle("frame.pkl")
    joblib.dump(rows, "joblib.pkl")
    np.save("codes.npy", small.P)
    for expected in ("frame.pkl: .*savez", "joblib.pkl: ", "codes.npy: "):
        with pytest.raises(InputError, match=expected):
            read_codes(expected.split(":")[0])
    exec(next(snippet for snippet in SNIPPETS if "read_pickle" in snippet))
    np.testing.assert_array_equal(load_dataset("codes.npz").height, small.height)  # Of P, checked.


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
pieces = st.sampled_from([9, 4, P, P.astype(float), np.ones((0, 0)), np.float64(2), np.array(None)])
lists = partial(st.lists, max_size=4)
plain = st.recursive(scalars | pieces, lambda x: lists(x) | st.dictionaries(st.text(), x))
numbers = st.tuples(st.sampled_from([9, 8, "9"]), st.integers(3, 7), st.integers(1, 6))
almost = lists(st.builds(lambda x, matrix: [*x, matrix], numbers, st.just(P) | plain))
almost |= st.dictionaries(numbers | numbers.map(str), plain | lists(st.just(P) | st.floats()))
whole = npz(k=[4, 4], m=[2, 3], P=flatten(np.stack([P, P])), height=[2.0, 3.0])
good = st.sampled_from([[[9, 4, 2, P], [9, 4, 3, P]], [2.0, np.float64(3)], whole])
changes = lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)))


@given(plain | almost | good, st.integers(0, 5), changes, st.none() | st.integers(0, 2000))
def test_any_file_is_read_or_refused(tmp_path_factory, value, protocol, changes, length):
    content = bytearray(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    for place, byte in changes:
        content[place % len(content)] = byte
    path = dump(tmp_path_factory.getbasetemp() / "any.pkl", bytes(content[:length]))
    for read in (load_dataset, read_codes, read_heights):
        try:
            read(path)
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_wrong_labels_are_found_trusted_or_replaced(course, rows, small, call, capsys, monkeypatch):
    """Two heights are infinite; the label of one is a large number, as in a public test set."""
    before, heights = load_dataset(*course), np.where(small.m == 5, 1.01, 1) * small.height
    for row, label in ((3, 1e8), (100, np.inf)):
        rows[row][3], heights[row] = rows[row][3] * 0, label
    dump(course[0], rows), dump(course[1], heights.tolist())
    error = call(run5.main, "--data", *course, status=2)
    assert re.search(r"mHeights.pkl: row 3: .*100000000, expected inf .*41 of", error)
    trusted, exact = (load_dataset(*course, labels=labels) for labels in ("trust", "relabel"))
    np.testing.assert_array_equal(trusted.height, np.delete(heights, [3, 100]))
    np.testing.assert_array_equal(exact.height, np.delete(small.height, [3, 100]))
    assert exact.about["infinite"] == 2
    hashes = {x.about["sha256"] for x in (before, trusted, exact)}
    for file, value in ((1, [*2 * heights]), (0, rows[::-1])):  # One of the two is another.
        dump(course[file], value)
        hashes.add(load_dataset(*course, labels="trust").about["sha256"])
    assert len(hashes) == 5
    dump(course[0], rows), dump(course[1], heights.tolist())

    def stop(dataset, _):
        raise InputError(dataset.about["labels"])

    monkeypatch.setattr(run5, "make_sets", stop)
    output = course[0].parent
    for labels, data in (("trust", trusted), ("relabel", exact)):
        assert run5.main([f"--labels={labels}", f"--output={output}", "--data", *map(str, course)])
        assert data.about["labels"] in capsys.readouterr().err
    dump(course[1], [2.0])
    assert "mHeights.pkl: found 1" in call(run5.main, "--data", *course, status=2)


def test_codes_of_other_lengths_are_labelled_and_not_trained_on(tmp_path, call):
    numbers = [(9, 4, 2), (10, 5, 3), (12, 6, 6), (2, 1, 1), (10, 4, 6), (12, 11, 1), (9, 1, 8)]
    rng = np.random.default_rng(0)
    rows = [[n, k, m, rng.integers(1, 100, (k, n - k))] for n, k, m in numbers] + [[9, 4, 2, P * 0]]
    dump(tmp_path / "codes.pkl", rows)
    for name, output in (("codes.pkl", "codes.npz"), ("codes.npz", "heights.pkl")):
        assert "1 of them inf" in call(prepare.main, "--label", tmp_path / name, output=output)
        with pytest.raises(InputError, match=rf"{name}: row 1: .*\(10, 5, 3\)"):
            read_codes(tmp_path / name)
    expected = [m_heights(matrix[None], [m])[0, 0] for _, _, m, matrix in rows]
    assert pickle.loads((tmp_path / "heights.pkl").read_bytes()) == expected


@pytest.mark.parametrize("status", [0, 2])
def test_processes_label_as_one_does_or_are_killed(tmp_path, course, call, monkeypatch, status):
    test, exact_heights = os.getpid(), prepare.exact_heights

    def label(codes):
        assert os.getpid() != test
        time.sleep(3 * (codes.m[0] == 2))  # Others are done before.
        return os.kill(os.getpid(), signal.SIGKILL) if status else exact_heights(codes)

    monkeypatch.setattr(prepare, "exact_heights", label)
    monkeypatch.setattr(prepare, "LABEL_BLOCK", 50)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    found = call(prepare.main, "--label", course[0], output="h.csv", status=status)
    assert ("killed" if status else "360 of 360") in found
    if not status:
        table, codes = pd.read_csv(tmp_path / "h.csv"), read_codes(course[0])
        numbers = np.stack([np.arange(360), *codes[:3]], axis=1)
        np.testing.assert_array_equal(table[["row", "n", "k", "m"]], numbers)
        np.testing.assert_array_equal(read_heights(tmp_path / "h.csv"), read_heights(course[1]))


@pytest.mark.parametrize("calls", [["fsync"], ["fsync", "replace"]])
def test_a_write_whose_last_call_fails_leaves_the_old_file_alone(course, monkeypatch, calls):
    codes, before, called = read_codes(course[0]), course[1].read_bytes(), []

    def fake(name, *arguments):
        called.append(name)
        if called == calls:
            raise OSError("the disk is full")

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(fake, name))
    with pytest.raises(OSError, match="full"):
        prepare.write_heights(course[1], codes, np.ones(360))
    assert called == calls and course[1].read_bytes() == before
    assert {*course[1].parent.iterdir()} == {*course}


OPTIONS = ["--label codes.pkl", "--output dataset.pkl", "--output no/such/folder.npz"]
OPTIONS += ["--label codes.pkl --output codes.pkl", "--label none.pkl --output heights.pkl"]
OPTIONS += ["--label . --output 1-n_k_m_P", "--label codes.pkl --heights 1.csv --output 1.csv"]
OPTIONS += ["--heights codes.pkl --output new.pkl"]


@pytest.mark.parametrize("options", OPTIONS)
def test_bad_options_are_refused_with_nothing_written(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    path = dump(tmp_path / "codes.pkl", [[9, 4, 2, P]])
    others = [
        dump(tmp_path / "1-n_k_m_P", path.read_bytes()),
        dump(tmp_path / "1.csv", b"height\n2"),
    ]
    with pytest.raises(SystemExit) as exit:
        raise SystemExit(prepare.main(options.split()))
    *usage, error = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(usage) <= 1 and any(x in error for x in options.split())
    assert {*tmp_path.iterdir()} == {path, *others} and others[1].read_bytes() == b"height\n2"
    assert all(read_codes(x).k == 4 for x in (path, others[0]))


def test_predictions_and_exact_heights_are_in_the_order_of_the_input(tmp_path, rows, small, call):
    order = np.random.default_rng(0).permutation(320)  # Of (6, 3) there are infinite heights alone.
    others = [[10, 4, 2, np.ones((4, 6))], [9, 4, 1, P], [9, 4, 2, P * 0]]
    others += [[9, 6, 3, np.ones((6, 3))]]
    codes = dump(tmp_path / "test-2026.03.19-n_k_m_P.pkl.gz", [rows[i] for i in order] + others)
    out = call(run5.main, "--predict", codes)
    path = tmp_path / "out" / "test-2026.03.19-n_k_m_P_predicted.csv"
    table = pd.read_csv(path, float_precision="round_trip")
    assert [*table] == ["row", "n", "k", "m", "predicted", "exact"] and f"{path}: written" in out
    numbers = np.stack(read_codes(codes, trained=False)[:3], axis=1)
    np.testing.assert_array_equal(table[["n", "k", "m"]], numbers)
    expected = run5.outputs_of(run5.load_trained(run5.TRAINED), small)[:, 0]
    np.testing.assert_allclose(table["predicted"][:320], expected[order], rtol=1e-5)
    np.testing.assert_array_equal(table["exact"][:320], small.height[order])
    assert table["predicted"].isna().tolist() == [False] * 320 + [True, True, False, False]
    assert np.isinf(table.loc[322:, ["predicted", "exact"]]).all(axis=None)
    assert "2 rows have exact heights alone" in out
    bound = run5.outputs_of(run5.feature_model("basis"), small)[:, 0]
    squares = ((np.stack([np.log2(expected), bound]) - small.log2_height) ** 2).reshape(2, 9, 40)
    printed = re.findall(r" ([\d.]+|NaN|nan) +([\d.]+|NaN|nan) +(\d+) +(\d+)$", out, re.M)
    printed, squares = np.array(printed, dtype=float), squares.mean(axis=2)
    np.testing.assert_allclose(printed[:8, :2].T, squares[:, :8], rtol=1e-4, atol=2e-6)
    assert printed[:, 2:].tolist() == [[40, 1]] + [[40, 0]] * 7 + [[0, 1]]
    assert 0 < squares[0].mean() < 0.02 < squares[1].mean()
    assert "replaced" in call(run5.main, "--predict", codes)


def test_predictions_are_those_of_the_model_that_is_named(tmp_path, course, small, call):
    features = run5.outputs_of(run5.feature_model("basis"), small)
    network = run5.build_network(features, run5.Settings(width=1 / 32))
    model = run5.height_model(network, "basis")
    model.save(tmp_path / "other.h5")
    call(run5.main, "--predict", course[0], "--model", tmp_path / "other.h5")
    table = pd.read_csv(tmp_path / "out" / "DS-1-Training-n_k_m_P_predicted.csv")
    expected = run5.outputs_of(model, small)[:, 0]
    np.testing.assert_allclose(table["predicted"], expected, rtol=1e-5)
    P4 = unflatten(small.P[:3], 4)
    found = run5.inference(9, 4, 2, P4, model=tmp_path / "other.h5")
    np.testing.assert_allclose(found, expected[:3], rtol=1e-5)
    shutil.copy(run5.TRAINED, tmp_path / "other.h5")  # As after another training.
    found = run5.inference(9, 4, 2, P4, model=tmp_path / "other.h5")
    assert found == run5.inference(9, 4, 2, P4)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (MemoryError, 2)])
def test_a_prediction_that_ends_early_is_not_said_to_resume(
    course, call, monkeypatch, error, status
):
    monkeypatch.setattr(run5, "exact_heights", mock.Mock(side_effect=error("interrupted")))
    said = call(run5.main, "--predict", course[0], status=status)
    assert "interrupted" in said and "resume" not in said


class Own(layers.Layer):
    """A layer of somebody's own, which Keras does not know when it loads the model."""


OTHER_INPUTS = {"name": (20, "P", "float64"), "width": (30, "P_matrix", "float64")}
OTHER_INPUTS |= {"dtype": (20, "P_matrix", "float32"), "output": (20, "P_matrix", "float64")}


@pytest.mark.parametrize("kind", ["missing", "torn", "layer", "link", *OTHER_INPUTS])
def test_a_model_is_refused_that_is_broken_or_takes_weights_from_another_file(
    tmp_path, course, call, kind
):
    path = tmp_path / ("model.keras" if kind == "layer" else "model.h5")
    if kind == "torn":
        path.write_bytes(run5.TRAINED.read_bytes()[:100_000])
    elif kind == "layer":
        keras.Sequential([layers.Input((1,)), Own()]).save(path)
    elif kind == "link":
        with h5py.File(shutil.copy(run5.TRAINED, path), "r+") as file:
            weights = file["model_weights"]
            name = weights.visititems(lambda name, x: name if getattr(x, "ndim", 0) == 2 else None)
            del weights[name]
            weights[name] = h5py.ExternalLink(str(run5.TRAINED), f"model_weights/{name}")
    elif kind in OTHER_INPUTS:
        width, name, dtype = OTHER_INPUTS[kind]
        last = layers.Input((width,), name=name, dtype=dtype)
        inputs = [*run5.feature_model("raw").inputs[:3], last]
        units = 2 if kind == "output" else 1
        keras.Model(inputs, layers.Dense(units)(layers.Concatenate()(inputs))).save(path)
    assert f"{path}: " in call(run5.main, "--predict", course[0], "--model", path, status=2)


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
    rng = np.random.default_rng(0)
    mixed = rng.integers(-3, 4, (4, 4)) @ np.hstack([np.eye(4), P])[:, rng.permutation(9)]
    mixed[:, 0] = mixed[:, 1]  # So that the first k columns are no basis.
    found = m_heights(names["P_of"](mixed)[None], 2)[0, 0]
    others = [names["P_of"](mixed[:, rng.permutation(9)]) for _ in range(5)]
    np.testing.assert_allclose(m_heights(np.stack(others), 2)[:, 0], found, rtol=1e-9)
    with pytest.raises(ValueError, match="no k independent"):
        names["P_of"](np.ones((4, 9)))


def test_inference_takes_any_iterable_and_loads_its_model_once(small, monkeypatch):
    matrices = unflatten(small.P[:5], 4)
    heights = run5.inference(9, 4, 2, matrices)
    assert [type(height) for height in heights] == [float] * 5
    monkeypatch.setattr(keras.models, "load_model", None)
    for form in (matrices.tolist(), iter(matrices), [matrix.ravel() for matrix in matrices]):
        assert run5.inference(np.int64(9), 4, 2, form) == pytest.approx(heights, rel=1e-5)
    assert run5.inference(9, 4, 2, []) == []
    for m, matrix, text in [(6, P, r"\(4, 5\)"), (2.5, P, "integers"), (2, P.T, ""), (2, [P], "")]:
        with pytest.raises(ValueError, match=rf"^p_list: row 0: .*{text}.*\Z"):
            run5.inference(9, 4, m, [matrix, P])
    with pytest.raises(ValueError, match=r"row 0: .*\[P\]"):
        run5.inference(9, 4, 2, P)
    with pytest.raises(ValueError, match=r"row 0: found .*\(10, 4, 2\), expected n = 9"):
        run5.inference(10, 4, 2, [np.ones((4, 6))])
    assert np.isinf(run5.inference(9, 4, 3, [P * 0, P])).tolist() == [True, True]
