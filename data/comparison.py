"""The trainings that Run 5 is compared with: their errors in baselines.csv, and what they show.

data/rerun_baselines.py, or data/rerun_on_jax.py, trains them and writes the file; the report of train_model_v5.py shows
it.
"""

from pathlib import Path

import pandas as pd

from data.files import InputError, one_line
from data.heights import GROUPS

BASELINES = Path(__file__).with_name("baselines.csv")

TIERS = {"easy": ((4, 2), (4, 3), (5, 2)), "medium": ((4, 4), (5, 3), (6, 2)), "hard": ((4, 5), (5, 4), (6, 3))}

RAW, SHARED, WEIGHTED, RUN5 = "Run 5, raw P", "Run 2, shared", "Run 4, weighted", "Run 5"
RUNS = {
    "Run 2": "Run 2 as it was built, except that no code is in training and validation at once",
    "Run 4": "Run 4 as it ran, with equal weights; the design says that it has about 8 million parameters",
    WEIGHTED: "Run 4 with the weights by epoch that were written for it and never in force",
    RAW: "Run 5 on the entries of P without extra codes: the design's input",
    "raw P, weight 1": "Run 5 on the entries of P, with equal weights of all groups; the design has 1 to 2",
    "raw P, weight 5": "Run 5 on the entries of P, with the weights of Run 2, 1 to 5",
    "raw P, extra": "Run 5 on the entries of P, with extra codes",
    "no extra codes": "Run 5 on the features, without extra codes",
    "no dropout": "Run 5 on the features, with extra codes, without dropout",
    SHARED: "Run 2 on a third of the codes, each three times, and a random split of the rows",
}

# What is the same in two runs, what is changed, the run before the change and the run after it.
WEIGHTS = ("raw P: equal weights -> 1 to 5", "raw P, weight 1", "raw P, weight 5")
FEATURES = ("no extra codes: raw P -> features", RAW, "no extra codes")
EXTRA = ("raw P: no extra codes -> extra codes", RAW, "raw P, extra")
CHANGES = (
    WEIGHTS,
    ("raw P: equal weights -> the design's", "raw P, weight 1", RAW),
    ("Run 4: equal weights -> by epoch", "Run 4", WEIGHTED),
    FEATURES,
    ("extra codes: raw P -> features", "raw P, extra", RUN5),
    EXTRA,
    ("features: no extra codes -> extra codes", "no extra codes", RUN5),
    ("features: dropout -> no dropout", RUN5, "no dropout"),
)


def read_baselines(sha256: str, path: Path = BASELINES) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published log2-MSE of Run 2 and Run 4 (columns) by k and m (index), and the rows that rerun_baselines.py
    measured with the dataset of this hash, all seeds. Raises InputError if a published figure is not there."""
    try:
        rows = pd.read_csv(path)
        published = rows[rows["source"] == "published"].pivot(index=["k", "m"], columns="run", values="log2_mse")
        published = published.loc[list(GROUPS), ["Run 2", "Run 4"]].astype(float)
        return published, rows[(rows["dataset"] == sha256) & rows["run"].isin(RUNS)].astype({"seed": int})
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
    lines = [
        "on the split of Run 5, without extra codes unless said otherwise. Parameters of Run 2 and Run 4 include "
        "queries and keys, which have no effect in attention over one vector and are not trained here."
    ]
    if (here["backend"] == "jax").any():
        lines[0] += " JAX: trained on a GPU by Keras' JAX backend (data/rerun_on_jax.py)."
    for run in [run for run in RUNS if run in here.index]:
        about = here.loc[run]
        ended = "" if about["ended"] == "complete" else f", stopped by {about['ended']}"
        size = f"{about['parameters']:,.0f} parameters, {about['epochs']:.0f} epochs{ended}"
        lines.append(f"{run:<18} {RUNS[run]} ({size}{', JAX' if about['backend'] == 'jax' else ''})")
    validation = means_by_run(rows, "log2_mse")
    test = {(RUN5, seed): tier_means(run5.to_frame("error"))["error"]} | means_by_run(rows, "test_log2_mse")
    earlier = tier_means(published)
    said = [weights_text(test, earlier), curriculum_text(here), departures_text(test, seed)]
    said.append(leak_text(validation, test, seed, earlier["Run 2"]))
    return "\n".join(lines + changes_table(test) + [text for text in said if text])


def means_by_run(rows: pd.DataFrame, column: str) -> dict[tuple[str, int], pd.Series]:
    """The tier_means of this column of the csv for each run and seed that has it."""
    runs = rows.dropna(subset=column).groupby(["run", "seed"])
    return {run: tier_means(table.set_index(["k", "m"]))[column] for run, table in runs}


def seeds_of_both(tiers: dict[tuple[str, int], pd.Series], base: str, run: str) -> list[int]:
    """The seeds with which both runs were trained."""
    return [seed for name, seed in tiers if name == run and (base, seed) in tiers]


def changes_table(tiers: dict[tuple[str, int], pd.Series]) -> list[str]:
    """The lines of a table of the test errors before and after each change. tiers: their means by run and seed."""
    compared = {
        (what, seed): {tier: f"{tiers[base, seed][tier]:.4f} -> {tiers[run, seed][tier]:.4f}" for tier in TIERS}
        for what, base, run in CHANGES
        for seed in seeds_of_both(tiers, base, run)
    }
    if not compared:
        return []
    table = pd.DataFrame(compared.values(), pd.MultiIndex.from_tuples(compared, names=["change", "seed"]))
    about = "What one change does: mean test error of a tier before -> after it, one run for each seed"
    return ["", about, *table.reset_index().to_string(index=False).splitlines()]


def by_tier(values: dict[str, str]) -> str:
    return ", ".join(f"{value} ({tier})" for tier, value in values.items())


def weights_text(tiers: dict[tuple[str, int], pd.Series], published: pd.DataFrame) -> str:
    """What weights of 1 to 5 change, by the seeds trained with them and without; one seed alone says nothing.

    published: tier_means of Run 2 and Run 4.
    """
    _, base, run = WEIGHTS
    if len(seeds := seeds_of_both(tiers, base, run)) < 2:
        return ""
    changes = [tiers[run, seed] / tiers[base, seed] - 1 for seed in seeds]
    found = {tier: [change[tier] for change in changes] for tier in TIERS}
    blamed = {tier: f"{published['Run 4'][tier] / published['Run 2'][tier] - 1:+.1%}" for tier in TIERS}
    return (
        f"- The design blames weights of up to 5 for the published errors of Run 4, against Run 2: {by_tier(blamed)}. "
        f"But Run 4 ran with equal weights, Run 2 with 1 to 5. On raw P, 1 to 5 in place of equal ones change the test "
        f"error by {by_tier({tier: f'{min(x):+.1%} to {max(x):+.1%}' for tier, x in found.items()})}, in "
        f"{len(seeds)} seeds."
    )


def curriculum_text(runs: pd.DataFrame) -> str:
    """When Run 4's weights by epoch came, and when it was best with them. runs: rows of the csv by run (index)."""
    if WEIGHTED not in runs.index:
        return ""
    large, best, last = 61, runs["best_epoch"][WEIGHTED], runs["epochs"][WEIGHTED]
    return (
        f"- Run 4's weights by epoch give hard groups 0.2 to 0.5 at first, and 2.0 to 6.5 from epoch {large} on. The "
        f"run with them ended by its own early stopping after {last:.0f} epochs. Its best epoch is {best:.0f}, "
        f"{'before' if best < large else 'when'} hard groups have the large weights."
    )


def departures_text(tiers: dict[tuple[str, int], pd.Series], seed: int) -> str:
    """What features and extra codes bring, each alone."""
    parts = []
    for what, (_, base, run) in (("features alone", FEATURES), ("extra codes alone", EXTRA)):
        if seed in seeds_of_both(tiers, base, run):
            factors = (tiers[base, seed] / tiers[run, seed])[list(TIERS)].items()
            shown = {tier: f"{factor:.3g}" if factor < 1000 else "over 1000" for tier, factor in factors}
            parts.append(f"{what} divide it by {by_tier(shown)}")
    return f"- The test error on raw P without extra codes: {'; '.join(parts)}." if parts else ""


def leak_text(validation: dict, test: dict, seed: int, published: pd.Series) -> str:
    """How far shared codes bring the validation error of Run 2 to the published one, and what they do on new codes.

    validation, test: tier_means by run and seed. published: those of Run 2.
    """
    if seed not in seeds_of_both(test, "Run 2", SHARED):
        return ""
    split, shared, parts = validation["Run 2", seed], validation[SHARED, seed], []
    for tier in TIERS:
        way = (split[tier] - shared[tier]) / (split[tier] - published[tier])
        reached = f"{way:.0%} of the way to" if way < 1 else "past"
        parts.append(
            f"{split[tier]:.3f} to {shared[tier]:.3f} in {tier}, {reached} the published {published[tier]:.3f}"
        )
    return (
        f"- With most validation codes in training too, the validation error of Run 2 goes from {'; '.join(parts)}. On "
        f"the test set, that is on new codes, the run with shared codes has {test[SHARED, seed]['overall']:.3f} "
        f"overall, the other one {test['Run 2', seed]['overall']:.3f}."
    )
