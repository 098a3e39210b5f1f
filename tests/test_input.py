"""Files from users and strangers: the course's format, hostile pickles, torn files, exact labels, prediction."""

import csv
import io
import os
import pickle
import re
import subprocess

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import COURSE_SAMPLE, NARROW, ROOT, run_script
from hypothesis import given
from hypothesis import strategies as st

import train_model_v5 as run5
from data import prepare
from data.files import InputError, read_codes, read_heights
from data.heights import GROUPS, Codes, N, flatten, m_heights, unflatten


def course_rows(arrays):
    """The course's list of [n, k, m, P] from a dataset's arrays."""
    rows = zip(arrays["k"].tolist(), arrays["m"].tolist(), arrays["P"], strict=True)
    return [[N, k, m, unflatten(P[None], k)[0]] for k, m, P in rows]


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
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    exec(snippet)
    read = run5.load_dataset("codes.npz")
    np.testing.assert_array_equal(read.P, arrays["P"])
    np.testing.assert_array_equal(read.height, arrays["height"])


def test_a_csv_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "heights.csv").write_bytes("\ufeffheight,m\n2.5,3\n".encode())
    assert read_heights(tmp_path / "heights.csv").tolist() == [2.5]


def test_rows_of_infinite_height_are_left_out_and_counted(tmp_path, course, arrays, small_npz, model_file, capsys):
    heights = arrays["height"].tolist()
    heights[3] = heights[100] = np.inf
    heights[200] = 10**400
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
    course[1].write_bytes(pickle.dumps([np.inf] * 360))
    with pytest.raises(InputError, match="found infinite heights alone"):
        run5.load_dataset(*course)


def test_codes_and_heights_must_be_equally_many(course):
    course[1].write_bytes(pickle.dumps([2.0] * 5))
    with pytest.raises(InputError, match="found 5 heights, expected one for each of 360 codes"):
        run5.load_dataset(*course)


def test_wrong_labels_are_found_and_can_be_trusted(tmp_path, course, arrays, capsys):
    heights = arrays["height"].copy()
    heights[arrays["m"] == 5] *= 1.01
    course[1].write_bytes(pickle.dumps(heights.tolist()))
    dataset = run5.load_dataset(*course)
    with pytest.raises(InputError, match=r"row \d+: found height .*, expected .* --trust-labels"):
        prepare.check_labels(dataset)
    assert run5.main(["--data", *map(str, course), "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    prepare.check_labels(run5.load_dataset(ROOT / "data" / "augmented.npz"))
    asked = run5.parse_arguments(["--trust-labels"])[1]
    assert asked.trust_labels


def test_a_published_table_that_is_torn_is_refused(tmp_path):
    path = tmp_path / "baselines.csv"
    for content in (None, "", "run,source\nRun 2,published\n", "run,source,k,m,log2_mse,n\nRun 2,published,4,2,x,\n"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=r"baselines\.csv: expected published"):
            prepare.read_baselines("any", 42, path)


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
    assert "360 of 360 codes" in out and "360 heights, 0 of them infinite" in out
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


def test_many_codes_are_labelled_by_several_processes_alike():
    rng = np.random.default_rng(0)
    P = rng.integers(-9, 10, (45_000, 6, 3))
    codes = Codes(np.full(len(P), 6), rng.integers(2, 4, len(P)), flatten(P).astype(float))
    done = []
    heights = prepare.label(codes, done.append, workers=2)
    np.testing.assert_array_equal(heights, np.take_along_axis(m_heights(P, [2, 3]), codes.m[:, None] - 2, axis=1)[:, 0])
    assert done[-1] == len(P) and len(done) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "codes.pkl"], "--label: expected --output"),
        (["--label", "none.pkl", "--output", "h.pkl"], "none.pkl: cannot be read: No such file"),
        (["--label", "codes.pkl", "--output", "codes.pkl"], "is the file to be labelled"),
        (["--output", "dataset.pkl"], "expected a name that ends in .npz"),
        (["--rows", "many"], "argument --rows: invalid int value: 'many'"),
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
    prepare.check_labels(dataset, rows_per_group=500)
    process = run_script(
        "--label", COURSE_SAMPLE / "DS-1-sample_n_k_m_P.pkl", "--output", tmp_path / "h.csv", script="data/prepare.py"
    )
    assert process.returncode == 0
    np.testing.assert_allclose(np.log2(read_heights(tmp_path / "h.csv")), dataset.log2_height, atol=1e-9)
