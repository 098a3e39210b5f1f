"""The whole script as a user runs it, on a small dataset of all nine groups."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_script
from PIL import Image

import train_model_v5 as run5

RESULTS = [
    "best_model_run5.h5",
    "comparison.png",
    "detailed_comparison.txt",
    "metrics.json",
    "predictions_scatter.png",
    "training_history.png",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_npz):
    """(process, folder) of a run of two epochs."""
    output = tmp_path_factory.mktemp("run") / "results"
    process = run_script("--data", small_npz, "--output", output, "--epochs", "2", cwd=output.parent)
    assert process.returncode == 0, process.stderr
    return process, output


@pytest.fixture(scope="module")
def metrics(finished):
    return json.loads((finished[1] / "metrics.json").read_text())


def test_the_output_folder_holds_the_results_and_nothing_else(finished):
    assert sorted(path.name for path in finished[1].iterdir()) == RESULTS


def test_metrics_are_those_of_the_saved_model(finished, metrics, small_npz):
    # A process of its own, with the five lines of the README: import, load, predict.
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import keras, numpy as np, train_model_v5 as run5
dataset = run5.load_dataset({str(small_npz)!r})
_, rows = run5.split_dataset(dataset)
model = keras.models.load_model({str(finished[1] / "best_model_run5.h5")!r})
inputs = {{"n": np.full(len(rows), 9), "k": dataset.k[rows], "m": dataset.m[rows], "P_matrix": dataset.P[rows]}}
error = np.log2(model.predict(inputs, verbose=0)[:, 0]) - np.log2(dataset.height[rows])
for group in run5.GROUPS:
    inside = (dataset.k[rows] == group[0]) & (dataset.m[rows] == group[1])
    print(*group, inside.sum(), np.mean(error[inside] ** 2))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, row in zip(process.stdout.splitlines(), metrics["groups"], strict=True):
        k, m, n, error = line.split()
        assert (row["k"], row["m"], row["n"]) == (int(k), int(m), int(n)) and row["n"] == 6
        assert row["run5"] == pytest.approx(float(error), rel=1e-4)
    # val_loss is rounded to bfloat16 in other places where XLA compiled what lies between the products.
    assert metrics["best_val_loss"] == pytest.approx(np.mean([row["run5"] for row in metrics["groups"]]), rel=1e-3)


def test_scale_is_fitted_on_the_datasets_training_rows_alone(finished, small_npz):
    import keras

    dataset = run5.load_dataset(small_npz)
    train_rows = run5.split_dataset(dataset)[0]
    network = keras.models.load_model(finished[1] / "best_model_run5.h5").get_layer("log2_height")
    expected = run5.see(dataset, "basis")[train_rows].mean(axis=0)
    np.testing.assert_allclose(np.ravel(network.get_layer("P_scaled").mean), expected, rtol=1e-4, atol=1e-4)


def test_report_says_what_was_run_and_how_it_compares(finished, metrics):
    process, output = finished
    report = (output / "detailed_comparison.txt").read_text()
    assert report.strip() in process.stdout
    lost = 1224 - metrics["drawn_rows"]  # drawn, but already in the dataset
    assert 0 <= lost < 20
    for said in (
        metrics["dataset"]["sha256"],
        "complete; 2 of at most 2 epochs, best epoch",
        f"{1584 - lost:,}: {1530 - lost:,} training, 54 validation, 0 on both sides",
        f"{1224 - lost:,} more for training; an epoch takes 306 rows",
        "norms of the code's bases (--features basis), scaled on training rows",
        "5,781,921",
        "No code is on both sides.",
        "negative means that Run 5 has the smaller error",
        "not measured here",
    ):
        assert said in report
    assert re.search(r"^k,m +Run 2 +Run 4 +Run 5 +vs R2 +vs R4 +n$", report, re.M)
    rows = re.findall(
        r"^k=(\d),m=(\d) +([\d.]+) +([\d.]+) +([\d.]+) +([-+][\d.]+)% +([-+][\d.]+)% +n=(\d+)$", report, re.M
    )
    assert len(rows) == 9
    for row, figures in zip(rows, metrics["groups"], strict=True):
        run2, run4, own, vs2, vs4 = map(float, row[2:7])
        assert (int(row[0]), int(row[1])) == (figures["k"], figures["m"])
        assert own == pytest.approx(figures["run5"], abs=1e-6)
        assert vs2 == pytest.approx(100 * (own / run2 - 1), abs=0.06)
        assert vs4 == pytest.approx(100 * (own / run4 - 1), abs=0.06)
    assert (rows[0][2], rows[3][3]) == ("0.103043", "1.379000")
    tiers = dict(re.findall(r"^(easy|medium|hard|overall) +(.+)$", report, re.M))
    assert list(tiers) == ["easy", "medium", "hard", "overall"]
    for tier in metrics["tiers"]:
        assert tiers[tier["tier"]].endswith("met" if tier["met"] else "missed")
        assert tier["met"] == (tier["run5"] < run5.TARGETS[tier["tier"]])
    means = {tier["tier"]: tier for tier in metrics["tiers"]}
    assert means["overall"]["run2"] == pytest.approx(0.507, abs=1e-3)
    assert means["overall"]["run4"] == pytest.approx(0.531, abs=1e-3)
    easy = [row["run5"] for row in metrics["groups"] if (row["k"], row["m"]) in ((4, 2), (4, 3), (5, 2))]
    assert means["easy"]["run5"] == pytest.approx(np.mean(easy))


def test_the_literal_20_numbers_bfloat16_and_no_drawn_codes_when_asked_for(tmp_path, small_npz):
    arguments = ["--data", small_npz, "--output", tmp_path, "--epochs", "1", "--features", "raw", "--drawn", "0"]
    # All rows in one batch: each shape of a batch is compiled anew, which takes most of the time here.
    process = run_script(*arguments, "--precision", "bfloat16", "--batch-size", "306")
    assert process.returncode == 0, process.stderr
    report = (tmp_path / "detailed_comparison.txt").read_text()
    for said in (
        "the 20 numbers of P (--features raw)",
        "360: 306 training",
        "0 more for training",
        "5,630,369, trained in bfloat16",
    ):
        assert said in report
    process = run_script("--output", tmp_path, "--predict", small_npz)
    assert process.returncode == 0, process.stderr


def test_the_report_is_written_anew_with_the_measured_runs(finished, metrics, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results"
    shutil.copytree(finished[1], output)
    before = (output / "detailed_comparison.txt").read_text()
    assert run5.main(["--output", str(output), "--report"]) == 0
    assert (output / "detailed_comparison.txt").read_text() == before and "Left out" in before
    assert json.loads((output / "metrics.json").read_text()) == metrics

    rows = pd.read_csv(ROOT / "data" / "baselines.csv").query("source == 'published'").astype(object)
    own = rows[rows["run"] == "Run 4"].assign(source="measured", dataset=metrics["dataset"]["sha256"], seed=42)
    own = own.assign(log2_mse=2.0, epochs=7, best_epoch=5, ended="interrupted", parameters=9)
    shared = own.assign(run="Run 2, codes shared", log2_mse=0.5, epochs=8)
    picture = (output / "comparison.png").read_bytes()
    (tmp_path / "data").mkdir()
    pd.concat([rows, own, shared]).to_csv(tmp_path / "data" / "baselines.csv", index=False)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(run5, "HERE", tmp_path)
        assert run5.renew_report(output) == 0
    report = (output / "detailed_comparison.txt").read_text()
    assert capsys.readouterr().out.strip() == report.strip() and "Left out" not in report
    assert "R4         Run 4: 9 parameters, 7 epochs, best epoch 5; interrupted" in report
    overall = metrics["tiers"][-1]["run5"]
    assert f"overall  2.000000   {overall:<11.6f}{overall / 2 - 1:+.1%}" in report
    note = report[report.index("What shared codes hide") :].split("\n\n")[0].splitlines()
    assert note[-2] == "Run 2, codes shared: 9 parameters, 8 epochs, best epoch 5; interrupted, it could have gone on:"
    assert note[-1] == "easy 0.500000, medium 0.500000, hard 0.500000, overall 0.500000"
    assert (output / "comparison.png").read_bytes() != picture
    assert sorted(path.name for path in output.iterdir()) == RESULTS

    for torn in (None, "{", "[]", '{"settings": {}}'):
        (output / "metrics.json").unlink(missing_ok=True)
        if torn:
            (output / "metrics.json").write_text(torn)
        assert run5.main(["--output", str(output), "--report"]) == 2
        problem = capsys.readouterr().err
        assert "metrics.json: expected the figures of a finished run" in problem and problem.count("\n") == 1
    assert run5.main(["--output", str(tmp_path / "nowhere"), "--report"]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_progress_is_one_line_an_epoch_when_output_is_no_terminal(finished):
    lines = [line for line in finished[0].stdout.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert all(
        re.search(r"loss \S+ +val_loss \S+ +learning_rate \S+ +\S+ s an epoch, at most .* left", x) for x in lines
    )


def test_pictures_are_drawn(finished):
    for name, least in (("training_history.png", 40), ("predictions_scatter.png", 40), ("comparison.png", 40)):
        with Image.open(finished[1] / name) as picture:
            assert min(picture.size) > 800
            assert len(picture.convert("RGB").getcolors(1 << 24)) > least


def test_a_met_target_is_reported_as_met(finished, metrics):
    better = json.loads(json.dumps(metrics))
    for tier in better["tiers"]:
        tier["met"] = True
    better["overall_to_beat"]["met"] = True
    assert run5.report_text(better).count(" met\n") == 5
    assert run5.report_text(better).count("missed") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: found 0, expected 1 or more"),
        (["--batch-size", "-3"], "--batch-size: found -3, expected 1 or more"),
        (["--seed", "-1"], "--seed: found -1"),
        (["--drawn", "-1"], "--drawn: found -1, expected 0 or more"),
        (["--features", "minors"], "--features: found minors, expected basis or raw"),
        (["--data", "none.npz"], "none.npz: cannot be read: No such file"),
    ],
)
def test_bad_options_end_with_one_line_and_nothing_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run5.main([*arguments, "--output", "out"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_path_that_is_a_file_is_refused(tmp_path, small_npz, capsys):
    (tmp_path / "file").write_text("mine")
    assert run5.main(["--data", str(small_npz), "--output", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert "file: File exists" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, small_npz, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run5.Path, "mkdir", refuse)
    assert run5.main(["--data", str(small_npz), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "out: Permission denied" in err and err.count("\n") == 1


def test_a_folder_in_which_no_lock_can_be_made_is_refused(tmp_path, small_npz, capsys):
    (tmp_path / ".lock").mkdir()
    assert run5.main(["--data", str(small_npz), "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "cannot be written to: unable to open database file" in err and err.count("\n") == 1


def test_too_little_memory_ends_with_one_line(tmp_path, small_npz, monkeypatch, capsys):
    def refuse(*_):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(run5, "make_dataset", refuse)
    assert run5.main(["--data", str(small_npz), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "too little memory (Unable to allocate 9 TiB)" in err and "--drawn" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_second_ctrl_c_ends_with_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run5, "run", interrupt)
    assert run5.main([]) == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on after the last whole epoch\n"


def start(*arguments):
    command = [sys.executable, ROOT / "train_model_v5.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def without_times(folder):
    return {k: v for k, v in json.loads((folder / "metrics.json").read_text()).items() if k != "times"}


def test_a_killed_run_goes_on_to_the_result_of_an_unbroken_one(tmp_path, small_npz, finished, metrics):
    arguments = ["--data", small_npz, "--output", tmp_path, "--epochs", "2"]
    (tmp_path / "metrics.json").write_text("earlier")
    process = start(*arguments)
    for line in process.stdout:
        if line.startswith("epoch 1/2"):
            break
    journal = tmp_path / "unfinished" / "journal.npz"
    while not journal.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    second = run_script(*arguments)
    process.kill()
    process.wait()
    assert second.returncode == 2 and "another run is writing there" in second.stderr
    assert (tmp_path / "metrics.json").read_text() == "earlier"

    resumed = run_script(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "1 epochs are done" in resumed.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == RESULTS
    assert without_times(tmp_path) == {k: v for k, v in metrics.items() if k != "times"}


def test_ctrl_c_ends_the_epoch_and_reports_what_there_is(tmp_path, small_npz):
    arguments = ["--data", small_npz, "--output", tmp_path, "--epochs", "200", "--batch-size", "306"]
    process = start(*arguments)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    os.kill(process.pid, signal.SIGINT)
    process.stdout.read()
    assert process.wait(120) == 130
    report = (tmp_path / "detailed_comparison.txt").read_text()
    assert "interrupted, the same command goes on with it" in report
    assert sorted(path.name for path in tmp_path.iterdir()) == [*RESULTS, "unfinished"]


KILLS = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
import train_model_v5 as run5

full, batches, line = run5.dense_block, run5.batches, run5.Progress.on_epoch_end
run5.dense_block = lambda x, units, dropout=0.0: full(x, max(4, units // 32), dropout)
arguments = ["--data", {data!r}, "--epochs", "120", "--output"]


def start(folder):
    # A fork has what takes long, the imports, behind it. It sends a byte when training begins and for every epoch.
    pulse, beat = os.pipe()
    child = os.fork()
    if child == 0:
        run5.batches = lambda *rest: (os.write(beat, b"x"), batches(*rest))[1]
        run5.Progress.on_epoch_end = lambda *rest: (line(*rest), os.write(beat, b"x"))
        os._exit(run5.main([*arguments, folder]))
    os.close(beat)
    return child, pulse


assert os.waitpid(start({unbroken!r})[0], 0)[1] == 0
random.seed(0)
for kill in range(20):
    child, pulse = start({broken!r})
    for _ in range(random.randrange(0, 6)):
        os.read(pulse, 1)
    time.sleep(random.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, f"the run ended before kill {{kill}}"
    os.close(pulse)
assert os.waitpid(start({broken!r})[0], 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(tmp_path, small_npz):
    paths = {"root": str(ROOT), "data": str(small_npz), "unbroken": str(tmp_path / "1"), "broken": str(tmp_path / "2")}
    process = subprocess.run([sys.executable, "-c", KILLS.format(**paths)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    done = [int(epochs) for epochs in re.findall(r"unfinished: (\d+) epochs are done", process.stdout)]
    assert len(set(done)) > 5 and done == sorted(done)
    assert without_times(tmp_path / "1") == without_times(tmp_path / "2")
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == RESULTS
