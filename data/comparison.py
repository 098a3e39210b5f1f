"""The trainings that Run 5 is compared with: their errors in baselines.csv, and what they show.

data/rerun_baselines.py trains them and writes the file; the report of train_model_v5.py shows it.
"""

from pathlib import Path

import pandas as pd

from data.files import InputError, one_line
from data.heights import GROUPS

BASELINES = Path(__file__).with_name("baselines.csv")

TIERS = {"easy": ((4, 2), (4, 3), (5, 2)), "medium": ((4, 4), (5, 3), (6, 2)), "hard": ((4, 5), (5, 4), (6, 3))}

RAW, SHARED, RUN5 = "Run 5, raw P", "Run 2, shared", "Run 5"
RUNS = {
    "Run 2": "Run 2 as it was built, except that no code is in training and validation at once",
    "Run 4": "Run 4 as it ran, with equal weights; 15.9 million parameters, where the design says about 8",
    "Run 4, curriculum": "Run 4 with the weights by epoch that were written for it and never in force",
    RAW: "Run 5 on the entries of P without extra codes: the design's input",
    "raw P, weights 1": "the same with equal weights of all groups, where the design has 1 to 2",
    "raw P, weights 5": "the same with the weights of Run 2, 1 to 5",
    "raw P, more codes": "Run 5 on the entries of P, with extra codes",
    "no extra codes": "Run 5 on the features, without extra codes",
    "no dropout": "Run 5 on the features, with extra codes, without dropout",
    SHARED: "Run 2 on a third of the codes, each three times, and a random split of the rows",
}

# What is changed, the run that has it, and the run that does not.
CHANGES = (
    ("Weights of 1 to 5 in place of equal ones, on raw P", "raw P, weights 5", "raw P, weights 1"),
    ("The design's weights, 1 to 2, in place of equal ones, on raw P", RAW, "raw P, weights 1"),
    ("The curriculum of Run 4", "Run 4, curriculum", "Run 4"),
    ("Features in place of raw P, without extra codes", "no extra codes", RAW),
    ("Features in place of raw P, with extra codes", RUN5, "raw P, more codes"),
    ("Extra codes, on raw P", "raw P, more codes", RAW),
    ("Extra codes, on the features", RUN5, "no extra codes"),
    ("No dropout", "no dropout", RUN5),
)


def read_baselines(sha256: str, path: Path = BASELINES) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published log2-MSE of Run 2 and Run 4 (columns) by k and m (index), and the rows that rerun_baselines.py
    measured with the dataset of this hash, all seeds. Raises InputError if a published figure is not there."""
    try:
        rows = pd.read_csv(path)
        published = rows[rows["source"] == "published"].pivot(index=["k", "m"], columns="run", values="log2_mse")
        published = published.loc[list(GROUPS), ["Run 2", "Run 4"]].astype(float)
        return published, rows[(rows["dataset"] == sha256) & rows["run"].isin(RUNS)]
    except (OSError, ValueError, KeyError) as error:
        expected = "expected published Run 2 and Run 4 figures of the nine groups"
        raise InputError(f"{path}: {expected} ({one_line(error)})") from None


def measured_errors(rows: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """log2-MSE by k and m (index) of the runs of one seed (columns), on the validation set and on the test set.

    Run 2 with shared codes has another validation set, and stands in the second table alone.
    """
    tables = {}
    for name, column in (("validation", "log2_mse"), ("test", "test_log2_mse")):
        table = rows[rows["seed"] == seed].pivot(index=["k", "m"], columns="run", values=column)
        runs = [run for run in RUNS if run in table and (run != SHARED or name == "test")]
        tables[name] = table.reindex(pd.MultiIndex.from_tuples(GROUPS, names=["k", "m"]))[runs].dropna(axis=1)
    return tables


def tier_means(errors: pd.DataFrame) -> pd.DataFrame:
    """The mean of each column over the groups of each tier, and over all nine. errors: indexed by k and m."""
    tiers = (TIERS | {"overall": GROUPS}).items()
    return pd.DataFrame({tier: errors.loc[list(groups)].mean(numeric_only=True) for tier, groups in tiers}).T


def runs_text(rows: pd.DataFrame, seed: int, run5: pd.Series, published: pd.DataFrame) -> str:
    """What the runs were, and what they show.

    rows, published: of read_baselines. run5: the test errors of the present run, which has this seed, by k and m.
    """
    here = rows[rows["seed"] == seed].drop_duplicates("run").set_index("run")
    if here.empty:
        return "not trained with this dataset and seed."
    lines = ["on the split of Run 5, without extra codes unless said otherwise"]
    for run in [run for run in RUNS if run in here.index]:
        about = here.loc[run]
        ended = "" if about["ended"] == "complete" else f", stopped by {about['ended']}"
        size = f"{about['parameters']:,.0f} parameters, {about['epochs']:.0f} epochs{ended}"
        lines.append(f"{run:<18} {RUNS[run]} ({size})")
    tiers = {(RUN5, seed): tier_means(run5.to_frame("error"))["error"]}
    for each, table in rows.dropna(subset="test_log2_mse").groupby(["run", "seed"]):
        tiers[each] = tier_means(table.set_index(["k", "m"]))["test_log2_mse"]
    said = [change_text(tiers, *change) for change in CHANGES]
    if (SHARED, seed) in tiers:
        shared = rows[(rows["run"] == SHARED) & (rows["seed"] == seed)].set_index(["k", "m"])
        said.append(leak_text(tier_means(shared)["log2_mse"], tiers[SHARED, seed], tier_means(published)["Run 2"]))
    if any(said):
        lines += ["", "What they show: how the test error of a tier changes, for each seed"]
    return "\n".join(lines + [text for text in said if text])


def change_text(tiers: dict[tuple[str, int], pd.Series], what: str, run: str, base: str) -> str:
    """One line on what a change did to the test errors of the tiers, for every seed that both runs have."""
    seeds = [seed for name, seed in tiers if name == run and (base, seed) in tiers]
    if not seeds:
        return ""
    parts = []
    for tier in TIERS:
        changes = [tiers[run, seed][tier] / tiers[base, seed][tier] - 1 for seed in seeds]
        parts.append(f"{tier} {', '.join(f'{change:+.0%}' for change in changes)}")
    return f"- {what}: {'; '.join(parts)} (seed {', '.join(map(str, seeds))})."


def leak_text(own: pd.Series, new: pd.Series, published: pd.Series) -> str:
    """One line on the run whose validation codes are in training too: its error on them and on new codes."""
    own, new, published = (", ".join(f"{tier} {means[tier]:.3f}" for tier in TIERS) for means in (own, new, published))
    about = "on its validation rows, most of whose codes are in training too"
    return f"- {SHARED}: {own} {about}; {new} on the test set. Run 2 was published with {published}."
