"""Files from users and strangers: the course's format, hostile pickles, torn files, exact labels, prediction."""

import csv
import io
import os
import pickle
import re
import shutil
import subprocess
import sys

import h5py
import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import COURSE_SAMPLE, NARROW, ROOT, run_script
from hypothesis import given
from hypothesis import strategies as st

import train_model_v5 as run5
from data import prepare
from data.comparison import read_baselines
from data.files import InputError, read_codes, read_heights
from data.heights import GROUPS, Codes, N, flatten, m_heights, unflatten


def course_rows(arrays):
    """The course's list of [n, k, m, P] from a dataset's arrays."""
    rows = zip(arrays["k"].tolist(), arrays["m"].tolist(), arrays["P"], strict=True)
    return [[N, k, m, unflatten(P[None], k)[0]] for k, m, P in rows]


def readme_snippets():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def arrays(small_npz):
    with np.load(small_npz) as file:
        return dict(file)


@pytest.fixture
def course(tmp_path, arrays):
    """(codes file, heights file) in the course's format, the small dataset in them."""
    folder = tmp_path / "course"
    folder.mkdir()
    paths = folder / "DS-1-Training-n_k_m_P.pkl", folder / "DS-1-Training-mHeights.pkl"
    paths[0].write_bytes(pickle.dumps(course_rows(arrays)))
    paths[1].write_bytes(pickle.dumps(arrays["height"].tolist()))
    return paths


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_course_files_give_the_dataset_in_every_pickle_protocol(tmp_path, arrays, small_npz, protocol):
    rows = course_rows(arrays)
    rows[0][3] = rows[0][3].astype(np.float64)
    rows[1] = [np.int64(x) for x in rows[1][:3]] + [np.asfortranarray(rows[1][3])]
    (tmp_path / "codes").write_bytes(pickle.dumps(rows, protocol))
    (tmp_path / "heights").write_bytes(pickle.dumps([*map(np.float64, arrays["height"])], protocol))
    read = run5.load_dataset(tmp_path / "codes", tmp_path / "heights")
    same = run5.load_dataset(small_npz)
    for name in ("k", "m", "P", "height"):
        np.testing.assert_array_equal(getattr(read, name), getattr(same, name))


def test_a_folder_is_searched_for_the_usual_names(course, arrays):
    folder = course[0].parent
    read = run5.load_dataset(folder)
    assert len(read) == len(arrays["k"])
    assert read.source == "DS-1-Training-n_k_m_P.pkl + DS-1-Training-mHeights.pkl"
    (folder / "DS-2-Training-mHeights.pkl").write_bytes(b"")
    with pytest.raises(InputError, match=r"found 2 files \*mHeights\*\.pkl, expected 1"):
        run5.load_dataset(folder)


def test_duplicates_are_counted(tmp_path, arrays):
    rows = course_rows(arrays)
    rows += [[N, k, m, -P[::-1]] for _, k, m, P in rows[:25]]
    (tmp_path / "codes").write_bytes(pickle.dumps(rows))
    (tmp_path / "heights").write_bytes(pickle.dumps([*arrays["height"].tolist(), *arrays["height"][:25].tolist()]))
    assert run5.load_dataset(tmp_path / "codes", tmp_path / "heights").describe()["duplicates"] == 25


class Hostile:
    """A pickle of this runs the given call when it is read as pickles usually are."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("hostile", "name"),
    [
        (lambda path: Hostile(os.system, f"touch {path}"), r"posix\.system|nt\.system"),
        (lambda path: Hostile(eval, f"open({str(path)!r}, 'w')"), r"builtins\.eval"),
        (lambda path: Hostile(subprocess.getoutput, f"touch {path}"), r"subprocess\.getoutput"),
        (lambda path: Hostile(np.save, str(path), 0), r"numpy\.save"),
        (lambda path: [[N, 4, 2, Hostile(io.open, str(path), "w")]], r"io\.open|_io\.open"),
        (lambda path: np.array([Hostile(os.mkdir, str(path))], dtype=object), r"posix\.mkdir|nt\.mkdir"),
    ],
)
@pytest.mark.parametrize("read", [read_codes, read_heights])
def test_a_hostile_pickle_is_refused_by_name_before_it_runs(tmp_path, hostile, name, read):
    ran = tmp_path / "ran"
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(hostile(ran)))
    with pytest.raises(InputError, match=f"file.pkl.*it names ({name})"):
        read(tmp_path / "file.pkl")
    assert not ran.exists()


def test_a_pickle_may_not_change_what_it_calls(tmp_path):
    # c_codecs\nencode\n pushes our own function; the state after it would become its attributes.
    for state in (b"}S'call'\nI1\ns", b"N}S'call'\nI1\ns\x86"):
        (tmp_path / "file.pkl").write_bytes(b"\x80\x02c_codecs\nencode\n" + state + b"b.")
        with pytest.raises(InputError, match="cannot be read"):
            read_codes(tmp_path / "file.pkl")
    assert read_heights_of(tmp_path, pickle.dumps([2.0], 2)) == [2.0]


def read_heights_of(tmp_path, content):
    (tmp_path / "heights.pkl").write_bytes(content)
    return read_heights(tmp_path / "heights.pkl").tolist()


GOOD_P = np.arange(20).reshape(4, 5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"n": 9}, "holds a value of type dict, expected a list of"),
        ([], "found no rows"),
        ([[9, 4, 2, GOOD_P], "text"], "row 1: found 'text', expected"),
        ([[9, 4, 2]], "row 0: found a list of 3, expected"),
        ([[8, 4, 2, GOOD_P]], "row 0: found n = 8, expected 9"),
        ([[9, 4.0, 2, GOOD_P]], "row 0: found k = 4.0, expected an integer"),
        ([[9, True, 2, GOOD_P]], "row 0: found k = True, expected an integer"),
        ([[9, 4, None, GOOD_P]], "row 0: found m = None, expected an integer"),
        ([[9, 4, 6, GOOD_P]], "row 0: found .k, m. = .4, 6., expected one of the nine groups"),
        ([[9, 7, 2, np.ones((7, 2))]], "row 0: found .k, m. = .7, 2."),
        ([[9, 5, 2, GOOD_P]], r"row 0: found P = an array of int64 of shape \(4, 5\), expected .* shape \(5, 4\)"),
        ([[9, 4, 2, GOOD_P.ravel()[:19]]], r"row 0: found P = an array of int64 of shape \(19,\)"),
        ([[9, 4, 2, GOOD_P.tolist()[:3]]], "row 0: found P = a list of 3, expected an array"),
        ([[9, 4, 2, [*GOOD_P.tolist()[:3], [1, 2]]]], "row 0: found P = a list of 4, expected an array"),
        ([[9, 4, 2, [[*GOOD_P.tolist()]]]], "row 0: found P = a list of 1, expected an array"),
        ([[9, 4, 2, [["1"] * 5] * 4]], "row 0: found P = a list of 4, expected an array"),
        ([[9, 4, 2, [[True] * 5] * 4]], "row 0: found P = a list of 4, expected an array"),
        ([[9, 4, 2, GOOD_P.astype(str)]], "cannot be read as npz or pickle: it holds an array of dtype 'U21'"),
        ([[9, 4, 2, GOOD_P.astype(object)]], "cannot be read .* it holds an array of dtype 'O8'"),
        ([[9, 4, 2, np.where(GOOD_P == 3, np.nan, GOOD_P)]], "row 0: found NaN or inf in P"),
        ([[9, 4, 2, GOOD_P * 1e60]], "row 0: found an entry of P out of range"),
    ],
)
def test_a_malformed_course_file_is_refused_by_row(tmp_path, rows, message):
    (tmp_path / "codes.pkl").write_bytes(pickle.dumps(rows))
    with pytest.raises(InputError, match=f"codes.pkl: {message}") as error:
        read_codes(tmp_path / "codes.pkl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("heights", "message"),
    [
        ("text", "holds 'text', expected a list of heights"),
        (np.ones((2, 2)), "holds an array of float64"),
        ([2.0, None], "row 1: found height None, expected a number"),
        ([True], "row 0: found height True"),
        (["3.0"], "row 0: found height '3.0'"),
        ([2.0, 0.99], "row 1: found height 0.99, expected 1 or more"),
        ([2.0, -np.inf], "row 1: found height -inf, expected 1 or more"),
        ([np.nan], "row 0: found height nan"),
    ],
)
def test_malformed_heights_are_refused_by_row(tmp_path, heights, message):
    (tmp_path / "heights.pkl").write_bytes(pickle.dumps(heights))
    with pytest.raises(InputError, match=f"heights.pkl: {message}"):
        read_heights(tmp_path / "heights.pkl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,value\n0,2\n", "cannot be read as csv with a column height: Usecols do not match"),
        ("height\n2\nx\n", "row 1: found height nan, expected a number"),
        ("height\n0.5\n", "row 0: found height 0.5, expected 1 or more"),
        (b"\xff\xfe", "cannot be read as csv"),
    ],
)
def test_a_malformed_csv_of_heights_is_refused(tmp_path, text, message):
    (tmp_path / "heights.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"heights.csv: {message}"):
        read_heights(tmp_path / "heights.csv")


@pytest.mark.parametrize(
    "form", [np.ndarray.tolist, np.ravel, lambda P: P.ravel().tolist(), lambda P: tuple(map(np.array, P.tolist()))]
)
def test_a_matrix_may_be_nested_lists_or_flat(tmp_path, form):
    rows = [[9, 4, 2, GOOD_P], [9, 5, 3, GOOD_P.reshape(5, 4) + 0.5]]
    for name, change in (("arrays", lambda P: P), ("form", form)):
        (tmp_path / name).write_bytes(pickle.dumps([[*row[:3], change(row[3])] for row in rows]))
    np.testing.assert_array_equal(read_codes(tmp_path / "form").P, read_codes(tmp_path / "arrays").P)


def test_files_of_pandas_joblib_and_numpy_are_refused_with_a_way_on(tmp_path, monkeypatch, arrays):
    monkeypatch.chdir(tmp_path)
    rows = course_rows(arrays)
    frame = pd.DataFrame(rows, columns=["n", "k", "m", "P"]).assign(result=arrays["height"])
    frame.loc[len(frame)] = [10, 4, 2, np.ones((4, 6)), 2.0]
    frame.to_pickle("frame.pkl")
    joblib.dump(rows, "joblib.pkl")
    np.save("codes.npy", arrays["P"])
    for name, what in (
        ("frame.pkl", "object of pandas"),
        ("joblib.pkl", "object of joblib"),
        ("codes.npy", ".npy file"),
    ):
        with pytest.raises(InputError, match=rf"{name}.*{what}.*np\.savez\('codes\.npz', k=k") as error:
            read_codes(name)
        assert "\n" not in str(error.value)
    exec(readme_snippets()[0])
    read = run5.load_dataset("codes.npz")
    np.testing.assert_array_equal(read.P, arrays["P"])
    np.testing.assert_array_equal(read.height, arrays["height"])


def test_a_csv_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "heights.csv").write_bytes("\ufeffheight,m\n2.5,3\n".encode())
    assert read_heights(tmp_path / "heights.csv").tolist() == [2.5]


def test_rows_of_infinite_height_are_left_out_and_counted(tmp_path, course, arrays, small_npz, model_file, capsys):
    rows, heights = course_rows(arrays), arrays["height"].tolist()
    for row, height in ((3, np.inf), (100, np.inf), (200, 10**400)):
        rows[row][3], heights[row] = rows[row][3] * 0, height
    course[0].write_bytes(pickle.dumps(rows))
    course[1].write_bytes(pickle.dumps(heights))
    dataset = run5.load_dataset(*course)
    kept = np.delete(np.arange(360), [3, 100, 200])
    assert dataset.infinite == 3 and dataset.describe()["infinite"] == 3
    np.testing.assert_array_equal(dataset.height, arrays["height"][kept])
    np.testing.assert_array_equal(dataset.P, arrays["P"][kept])
    arguments = ["--predict", course[0], "--heights", course[1], "--model", model_file, "--output", tmp_path]
    assert run5.main([*map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert "360 heights" in out and "3 rows of infinite height left out" in out and "nan" not in out
    course[0].write_bytes(pickle.dumps([[*row[:3], row[3] * 0] for row in rows]))
    course[1].write_bytes(pickle.dumps([np.inf] * 360))
    with pytest.raises(InputError, match="found infinite heights alone"):
        run5.load_dataset(*course)
    assert run5.main([*map(str, arguments)]) == 0
    assert "360 rows of infinite height left out" in capsys.readouterr().out


def test_codes_and_heights_must_be_equally_many(course):
    course[1].write_bytes(pickle.dumps([2.0] * 5))
    with pytest.raises(InputError, match="found 5 heights, expected one for each of 360 codes"):
        run5.load_dataset(*course)


def test_wrong_labels_are_found_and_can_be_trusted_or_replaced(tmp_path, course, arrays, model_file, capsys):
    """As in a public test set, some heights are finite where the true ones are infinite."""
    rows = course_rows(arrays)
    rows[3][3] = rows[3][3] * 0
    course[0].write_bytes(pickle.dumps(rows))
    heights = arrays["height"].copy()
    heights[arrays["m"] == 5] *= 1.01
    course[1].write_bytes(pickle.dumps(heights.tolist()))

    trained = ["--data", *course, "--output", tmp_path / "out"]
    predicted = ["--predict", course[0], "--heights", course[1], "--model", model_file, "--output", tmp_path / "out"]
    for arguments in (trained, predicted):
        assert run5.main([*map(str, arguments)]) == 2
        problem = capsys.readouterr().err
        assert "mHeights.pkl: row 3: found height" in problem and "expected inf (41 of 360 rows checked" in problem
        assert "--relabel takes" in problem and "--trust-labels goes on" in problem and problem.count("\n") == 1
        assert not (tmp_path / "out").exists()

    trusted, exact = (run5.load_dataset(*course, labels=labels) for labels in ("trust", "relabel"))
    assert "41 of 360 heights were not the exact ones, which are taken instead" in capsys.readouterr().out
    np.testing.assert_array_equal(trusted.height, heights)
    np.testing.assert_array_equal(exact.height, np.delete(arrays["height"], 3))
    assert exact.infinite == 1 and exact.sha256 == f"{trusted.sha256} relabelled"
    assert "not checked" in trusted.describe()["labels"] and "41 of 360 differed" in exact.describe()["labels"]
    assert run5.main([*map(str, predicted), "--relabel"]) == 0
    out = capsys.readouterr().out
    assert "41 of 360 heights were not" in out and "1 rows of infinite height left out" in out


def test_a_sample_of_every_group_is_checked(arrays, tmp_path):
    many = {name: np.repeat(array, 5, axis=0) for name, array in arrays.items()}
    np.savez(tmp_path / "many.npz", **many)
    assert run5.load_dataset(tmp_path / "many.npz").labels == "as in the file, 900 of them checked"
    for k, m in GROUPS:
        wrong = np.where((many["k"] == k) & (many["m"] == m), many["height"] * 1.01, many["height"])
        np.savez(tmp_path / "wrong.npz", **many | {"height": wrong})
        with pytest.raises(InputError, match=r"wrong\.npz: row .* expected .* .100 of 900 rows checked differ"):
            run5.load_dataset(tmp_path / "wrong.npz")


def test_a_published_table_that_is_torn_is_refused(tmp_path):
    path = tmp_path / "baselines.csv"
    for content in (None, "", "run,source\nRun 2,published\n", "run,source,k,m,log2_mse,n\nRun 2,published,4,2,x,\n"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=r"baselines\.csv: expected published"):
            read_baselines("any", path)


# Pieces that a pickle can be made of, those of real course files among them, and any change of a real file's bytes.
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([4, 5, 6, 9, GOOD_P, GOOD_P.astype(float), np.zeros((0, 0)), np.float64(2), np.array(None)]),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)
almost_rows = st.lists(
    st.tuples(st.sampled_from([9, 8, "9"]), st.integers(3, 7), st.integers(1, 6), st.just(GOOD_P) | plain).map(list)
)


@given(value=plain | almost_rows, protocol=st.integers(0, 5))
def test_any_plain_pickle_is_read_or_refused(tmp_path_factory, value, protocol):
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    for read in (read_codes, read_heights):
        try:
            read(path)
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


@given(data=st.data(), kind=st.sampled_from(["codes.pkl", "heights.pkl", "dataset.npz"]))
def test_any_damaged_file_is_read_or_refused(tmp_path_factory, data, kind):
    rng = np.random.default_rng(0)
    P = rng.integers(-9, 10, (2, 4, 5))
    buffer = io.BytesIO()
    if kind == "dataset.npz":
        np.savez(buffer, k=np.array([4, 4]), m=np.array([2, 3]), P=flatten(P), height=np.array([2.0, 3.0]))
    else:
        pickle.dump([[9, 4, 2, P[0]], [9, 4, 3, P[1]]] if kind == "codes.pkl" else [2.0, np.float64(3)], buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    path = tmp_path_factory.getbasetemp() / kind
    path.write_bytes(content)
    for read in (run5.load_dataset, read_codes, read_heights):
        try:
            read(path)
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def label(inputs, output, capsys):
    assert prepare.main(["--label", str(inputs), "--output", str(output)]) == 0
    return capsys.readouterr().out


def test_label_writes_exact_heights_in_the_order_of_the_input(tmp_path, course, small_npz, arrays, capsys):
    out = label(course[0], tmp_path / "heights.pkl", capsys)
    assert re.search(r"^360 of 360 codes, [\d.]+ s, about 0:00:00 left$", out, re.M)
    assert "360 heights, 0 of them infinite" in out
    assert pickle.loads((tmp_path / "heights.pkl").read_bytes()) == arrays["height"].tolist()
    label(small_npz, tmp_path / "heights.csv", capsys)
    table = list(csv.DictReader((tmp_path / "heights.csv").read_text().splitlines()))
    assert [float(row["height"]) for row in table] == arrays["height"].tolist()
    assert [(int(row["k"]), int(row["m"])) for row in table] == list(zip(arrays["k"], arrays["m"], strict=True))
    np.testing.assert_allclose(read_heights(tmp_path / "heights.csv"), arrays["height"], rtol=1e-15)
    label(course[0], tmp_path / "again.npz", capsys)
    np.testing.assert_array_equal(run5.load_dataset(tmp_path / "again.npz").height, arrays["height"])


def test_label_writes_infinite_heights_as_such_and_counts_them(tmp_path, capsys):
    rows = [[9, 4, 2, GOOD_P * 0], [9, 6, 3, np.eye(6, 3) + 1]]
    (tmp_path / "codes.pkl").write_bytes(pickle.dumps(rows))
    assert "2 heights, 2 of them infinite" in label(tmp_path / "codes.pkl", tmp_path / "heights.pkl", capsys)
    assert pickle.loads((tmp_path / "heights.pkl").read_bytes()) == [np.inf, np.inf]


def test_many_codes_are_labelled_by_several_processes(monkeypatch):
    monkeypatch.setattr(prepare, "LABEL_BLOCK", 10**6)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    rng = np.random.default_rng(0)
    P = rng.integers(-9, 10, (15_000, 6, 3))
    codes = Codes(np.full(len(P), 9), np.full(len(P), 6), rng.integers(2, 4, len(P)), flatten(P).astype(float))
    calls = []
    heights = prepare.label(codes, lambda rows, share: calls.append((rows, share)))
    np.testing.assert_array_equal(heights, np.take_along_axis(m_heights(P, [2, 3]), codes.m[:, None] - 2, axis=1)[:, 0])
    assert calls == sorted(calls) and calls[-1] == (len(P), 1.0) and len(calls) > 2


def test_codes_of_other_lengths_are_labelled_and_not_trained_on(tmp_path, capsys):
    rng = np.random.default_rng(0)
    numbers = [(9, 4, 2), (10, 5, 3), (12, 6, 6), (2, 1, 1), (10, 4, 6), (12, 11, 1), (9, 1, 8)]
    rows = [[n, k, m, rng.integers(1, 100, (k, n - k))] for n, k, m in numbers]
    # The example of the course's evaluator, with its height.
    rows.append([5, 2, 2, [[0.4759809, 0.9938236, 0.819425], [-0.8960798, -0.7442706, 0.3345122]]])
    (tmp_path / "codes.pkl").write_bytes(pickle.dumps(rows))
    assert "8 of 8 codes" in label(tmp_path / "codes.pkl", tmp_path / "heights.csv", capsys)
    heights = read_heights(tmp_path / "heights.csv")
    assert heights[:7].tolist() == [m_heights(P[None], [m])[0, 0] for _, _, m, P in rows[:7]]
    assert heights[7] == pytest.approx(1.9242387, abs=1e-6)
    assert pd.read_csv(tmp_path / "heights.csv")["n"].tolist() == [row[0] for row in rows]

    label(tmp_path / "codes.pkl", tmp_path / "codes.npz", capsys)
    with np.load(tmp_path / "codes.npz") as file:
        assert file["n"].tolist() == [row[0] for row in rows] and file["P"].shape == (8, 36)
    label(tmp_path / "codes.npz", tmp_path / "again.csv", capsys)
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "heights.csv").read_text()
    for name in ("codes.pkl", "codes.npz"):
        with pytest.raises(InputError, match="row 1: found n = 10, expected 9, the only length that is trained"):
            read_codes(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([13, 4, 2, np.ones((4, 9))], r"found \(n, k, m\) = \(13, 4, 2\), expected n up to 12, k from 1 to n - 1"),
        ([10, 10, 1, np.ones((10, 1))], r"found \(n, k, m\) = \(10, 10, 1\)"),
        ([10, 4, 7, np.ones((4, 6))], r"found \(n, k, m\) = \(10, 4, 7\), .* m from 1 to n - k"),
        ([10, 4, 0, np.ones((4, 6))], r"found \(n, k, m\) = \(10, 4, 0\)"),
        ([10, 4, 2, np.ones((4, 5))], r"found P = .* of shape \(4, 5\), expected .* shape \(4, 6\)"),
    ],
)
def test_what_cannot_be_labelled_is_refused_by_row(tmp_path, row, message):
    (tmp_path / "codes.pkl").write_bytes(pickle.dumps([[9, 4, 2, GOOD_P], row]))
    with pytest.raises(InputError, match=f"codes.pkl: row 1: {message}"):
        read_codes(tmp_path / "codes.pkl", trained=False)


def test_an_npz_with_n_needs_room_for_every_matrix(tmp_path):
    columns = {"n": [9, 10], "k": [4, 5], "m": [2, 2], "P": np.ones((2, 24))}
    np.savez(tmp_path / "codes.npz", **columns)
    with pytest.raises(InputError, match=r"row 1: found 24 entries in P, expected k \* \(n - k\) = 25"):
        read_codes(tmp_path / "codes.npz", trained=False)
    np.savez(tmp_path / "codes.npz", **columns | {"n": [9.5, 10]})
    with pytest.raises(InputError, match=r"row 0: found n = 9.5, expected an integer"):
        read_codes(tmp_path / "codes.npz", trained=False)


@pytest.mark.parametrize("width", [18, 36])
def test_an_npz_with_n_may_have_another_width(tmp_path, arrays, width):
    inside = arrays["k"] == 6
    kept = {name: arrays[name][inside] for name in ("k", "m", "P", "height")}
    P = np.pad(kept["P"][:, :18], ((0, 0), (0, width - 18)))
    np.savez(tmp_path / "codes.npz", **kept | {"n": np.full(len(P), 9), "P": P})
    np.testing.assert_array_equal(run5.load_dataset(tmp_path / "codes.npz").P, kept["P"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot bind a process to a core")
def test_only_cores_that_the_process_may_use_are_counted():
    source = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from data import command_line; "
    command = [sys.executable, "-c", source + "print(command_line.environment()['machine'])"]
    assert ", 1 cores" in subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "codes.pkl"], "--label: expected --output"),
        (["--label", "none.pkl", "--output", "h.pkl"], "none.pkl: cannot be read: No such file"),
        (["--label", "codes.pkl", "--output", "codes.pkl"], "is the file to be labelled"),
        (["--output", "dataset.pkl"], "expected a name that ends in .npz"),
        (["--rows", "many"], "argument --rows: found many, expected a whole number from 1"),
    ],
)
def test_labelling_refuses_bad_options_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "codes.pkl").write_bytes(b"x")
    try:
        status = prepare.main(arguments)
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1
    assert (tmp_path / "codes.pkl").read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, small):
    path = tmp_path_factory.mktemp("model") / "model.h5"
    run5.height_model(run5.build_network(small.P, run5.Settings(width=NARROW, features="raw")), "raw").save(path)
    return path


def test_predictions_are_the_models_in_the_order_of_the_input(tmp_path, course, small, small_npz, model_file, capsys):
    assert run5.main([*map(str, ["--predict", small_npz, "--model", model_file, "--output", tmp_path])]) == 0
    assert "log2_mse" not in capsys.readouterr().out
    expected = read_heights(tmp_path / "small_predicted.csv")
    assert expected.shape == (360,) and (expected[:40] != expected[40:80]).all()

    # The course's files, in another order.
    order = np.random.default_rng(0).permutation(360)
    for path in course:
        rows = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps([rows[i] for i in order]))
    arguments = ["--predict", course[0], "--heights", course[1], "--model", model_file, "--output", tmp_path]
    assert run5.main([str(argument) for argument in arguments]) == 0
    out = capsys.readouterr().out
    predicted = pickle.loads((tmp_path / "DS-1-Training-n_k_m_P_predicted.pkl").read_bytes())
    np.testing.assert_allclose(predicted, expected[order], rtol=1e-5)
    square = (np.log2(expected) - small.log2_height) ** 2
    rows = np.array(re.findall(r" ([\d.]+) +([\d.]+) +40$", out, re.M), dtype=float)
    assert rows[:, 0] == pytest.approx([square[small.group == i].mean() for i in range(len(GROUPS))], rel=1e-5)
    bound = (run5.predict_all(run5.feature_model("basis"), small)[:, 0] - small.log2_height) ** 2
    assert rows[:, 1] == pytest.approx([bound[small.group == i].mean() for i in range(len(GROUPS))], abs=2e-6)
    assert f"log2_mse {square.mean():.6f}, bound_log2_mse {bound.mean():.6f}" in out


def test_the_model_of_the_repository_predicts_whatever_the_output_is(tmp_path, course, arrays, capsys):
    assert run5.main([*map(str, ["--predict", course[0], "--heights", course[1], "--output", tmp_path / "out"])]) == 0
    error, bound = re.search(r"log2_mse ([\d.]+), bound_log2_mse ([\d.]+)", capsys.readouterr().out).groups()
    assert float(error) < 0.02 and float(error) < float(bound)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["DS-1-Training-n_k_m_P_predicted.pkl"]


def test_prediction_refuses_what_it_cannot_do(tmp_path, course, model_file, capsys):
    def refused(*arguments):
        assert run5.main([*map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    none = ("--model", tmp_path / "none.h5")
    assert "python train_model_v5.py makes one" in refused("--predict", course[0], *none)
    (tmp_path / "torn.h5").write_bytes(model_file.read_bytes()[:100_000])
    assert "torn.h5: cannot be loaded" in refused("--predict", course[0], "--model", tmp_path / "torn.h5")
    import keras

    other = keras.Sequential([keras.layers.Input((3,), name="x"), keras.layers.Dense(1)])
    other.save(tmp_path / "other.h5")
    assert "expected a model that takes n, k, m" in refused("--predict", course[0], "--model", tmp_path / "other.h5")
    (tmp_path / "ten.pkl").write_bytes(pickle.dumps([[10, 4, 2, np.ones((4, 6))]]))
    assert "found n = 10, expected 9" in refused("--predict", tmp_path / "ten.pkl", "--model", model_file)
    (tmp_path / "few.pkl").write_bytes(pickle.dumps([2.0]))
    few = ("--predict", course[0], "--model", model_file, "--heights", tmp_path / "few.pkl")
    assert "found 1 heights, expected one for each of 360" in refused(*few)


def test_inference_works_in_the_course_evaluator(arrays):
    evaluator = pytest.importorskip("tamu_csce_636_project1").Evaluator(
        first_name="A", last_name="B", email="c@tamu.edu", print=False
    )
    inputs, outputs = {}, {}
    for k, m in GROUPS:
        rows = (arrays["k"] == k) & (arrays["m"] == m)
        inputs[f"[9,{k},{m}]"] = list(unflatten(arrays["P"][rows], k))
        outputs[f"[9,{k},{m}]"] = arrays["height"][rows].tolist()
    errors = evaluator.eval(func=run5.inference, inputs=inputs, outputs=outputs)
    assert list(errors) == [(9, k, m) for k, m in GROUPS]
    assert 0 < np.mean(list(errors.values())) < 0.02


def test_the_snippet_of_the_readme_prints_what_it_says(capsys):
    pytest.importorskip("tamu_csce_636_project1")
    snippet = readme_snippets()[-1]
    exec(snippet)
    shown, exact = map(float, re.search(r"matrices: \[([\d.]+)\]; the exact height is ([\d.]+)", snippet).groups())
    heights, errors = capsys.readouterr().out.splitlines()
    assert float(heights.strip("[]")) == pytest.approx(shown, abs=0.01)
    assert f"(9, 4, 3): {(np.log2(exact) - np.log2(float(heights.strip('[]')))) ** 2:.12f}" in errors
    P = eval(re.search(r"^P = (.*)$", snippet, re.M)[1])
    assert m_heights(np.array([P]), [3])[0, 0] == pytest.approx(exact, abs=0.005)


def test_inference_takes_any_iterable_of_matrices_and_loads_its_model_once(arrays, monkeypatch):
    matrices = unflatten(arrays["P"][:5], 4)
    heights = run5.inference(9, 4, 2, matrices)
    assert [type(height) for height in heights] == [float] * 5
    monkeypatch.setattr(run5.keras.models, "load_model", None)
    for form in (matrices.tolist(), iter(matrices), tuple(matrices.astype(float)), [P.ravel() for P in matrices]):
        assert run5.inference(np.int64(9), 4, 2, form) == pytest.approx(heights, rel=1e-5)
    assert run5.inference(9, 4, 2, []) == []


@pytest.mark.parametrize(
    ("n", "k", "m", "P", "message"),
    [
        (10, 4, 2, np.ones((4, 6)), "found n = 10, expected 9"),
        (9, 4, 6, GOOD_P, r"found \(k, m\) = \(4, 6\), expected one of the nine groups"),
        (9, 4, 2.0, GOOD_P, "found m = 2.0, expected an integer"),
        (9, 4, 2, GOOD_P.T, r"found P = an array of int64 of shape \(5, 4\), expected .* shape \(4, 5\)"),
        (9, 4, 2, [[1, 2], [3]], "found P = a list of 2"),
        (9, 4, 2, np.full((4, 5), np.nan), "found NaN or inf in P"),
    ],
)
def test_inference_refuses_what_the_model_does_not_know(n, k, m, P, message):
    with pytest.raises(ValueError, match=rf"p_list: row \d: {message}"):
        run5.inference(n, k, m, [GOOD_P, P])


def test_a_model_that_reads_other_files_is_refused(tmp_path, course, model_file, capsys):
    """HDF5 can take weights from another file, or claim more of them than there is memory for."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(10**6))
    for kind in ("link", "storage", "size"):
        path = tmp_path / f"{kind}.h5"
        shutil.copy(model_file, path)
        with h5py.File(path, "r+") as file:
            names = []
            file["model_weights"].visititems(lambda name, x, names=names: names.append((name, x)))
            name, weights = next((name, x) for name, x in names if isinstance(x, h5py.Dataset) and x.ndim == 2)
            whole, shape, dtype, parent = weights.name, weights.shape, weights.dtype, weights.parent
            del file["model_weights"][name]
            name = name.split("/")[-1]
            if kind == "link":
                parent[name] = h5py.ExternalLink(str(model_file), whole)
            elif kind == "storage":
                parent.create_dataset(name, shape, dtype, external=[(str(secret), 0, 10**6)])
            else:
                parent.create_dataset(name, (10**6, 10**6), dtype, chunks=(1, 10**6))
        arguments = ["--predict", course[0], "--model", path, "--output", tmp_path / "out"]
        assert run5.main([str(argument) for argument in arguments]) == 2, kind
        assert f"{kind}.h5: cannot be loaded as a model" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_model_that_brings_code_is_refused_before_it_runs(tmp_path, course, capsys):
    import keras

    ran = tmp_path / "ran"
    source = f"(lambda x: (open({str(ran)!r}, 'w').close(), x)[1])"
    inputs = [keras.layers.Input((1,), name=name) for name in ("n", "k", "m")] + [
        keras.layers.Input((20,), name="P_matrix")
    ]
    model = keras.Model(inputs, keras.layers.Lambda(eval(source))(keras.layers.Concatenate()(inputs)))
    ran.unlink()
    model.save(tmp_path / "hostile.h5")
    arguments = ["--predict", course[0], "--model", tmp_path / "hostile.h5", "--output", tmp_path / "out"]
    assert run5.main([str(argument) for argument in arguments]) == 2
    assert "hostile.h5: cannot be loaded as a model" in capsys.readouterr().err
    assert not ran.exists()


def test_options_that_need_predict_say_so(capsys):
    with pytest.raises(SystemExit) as exit:
        run5.main(["--heights", "h.pkl"])
    assert exit.value.code == 2 and "expected --predict" in capsys.readouterr().err


@pytest.mark.skipif(not COURSE_SAMPLE.exists(), reason="the course's sample is not here")
def test_the_course_sample_is_read_and_its_labels_agree(tmp_path):
    dataset = run5.load_dataset(COURSE_SAMPLE)
    assert set(dataset.group) == set(range(9))
    exact = run5.load_dataset(COURSE_SAMPLE, labels="relabel")
    assert exact.labels.endswith("where 0 of 4,500 differed")
    process = run_script(
        "--label", COURSE_SAMPLE / "DS-1-sample_n_k_m_P.pkl", "--output", tmp_path / "h.csv", script="data/prepare.py"
    )
    assert process.returncode == 0
    np.testing.assert_allclose(np.log2(read_heights(tmp_path / "h.csv")), dataset.log2_height, atol=1e-9)
