"""The trainings that Run 5 is compared with: their errors in baselines.csv, and what they show.

data/rerun_baselines.py trains them, or data/rerun_on_jax.py, and writes the file; train_model_v5.py reports it.
"""

from pathlib import Path

import pandas as pd

from data.files import InputError, one_line
from data.heights import GROUPS

BASELINES = Path(__file__).with_name("baselines.csv")

TIERS = {"easy": ((4, 2), (4, 3), (5, 2)), "medium": ((4, 4), (5, 3), (6, 2)), "hard": ((4, 5), (5, 4), (6, 3))}

RUN5, RAW, NO_EXTRA = "Run 5", "Run 5, raw P", "Run 5, no extra"
SHARED, WEIGHTED = "Run 2, shared", "Run 4, weighted"
RUNS = {
    "Run 2": "Run 2 as it was built, but codes are split, not rows",
    "Run 4": "Run 4 as it ran, with equal weights; the design says that it has about 8 million parameters",
    WEIGHTED: "Run 4 with its weights by epoch, which never reached training in the published run",
    RAW: "Run 5 on the entries of P without extra codes: the design's input",
    "raw P, weight 1": "Run 5 on the entries of P, with equal weights of all groups; the design has 1 to 2",
    "raw P, weight 5": "Run 5 on the entries of P, with the weights of Run 2, 1 to 5",
    "raw P, extra": "Run 5 on the entries of P, with extra codes",
    NO_EXTRA: "Run 5 on the features, without extra codes",
    "no dropout": "Run 5 on the features, with extra codes, without dropout",
    SHARED: "Run 2 on a third of the codes, each three times, and a random split of the rows",
}

# What is the same in two runs, what is changed, the run before the change and the run after it.
WEIGHTS = ("raw P: equal weights -> 1 to 5", "raw P, weight 1", "raw P, weight 5")
FEATURES = ("no extra codes: raw P -> features", RAW, NO_EXTRA)
EXTRA = ("raw P: no extra codes -> extra codes", RAW, "raw P, extra")
NETWORK = ("Run 2 -> Run 4", "Run 2", "Run 4")
CHANGES = (
    NETWORK,
    ("Run 4: equal weights -> by epoch", "Run 4", WEIGHTED),
    WEIGHTS,
    ("raw P: equal weights -> the design's", "raw P, weight 1", RAW),
    FEATURES,
    ("extra codes: raw P -> features", "raw P, extra", RUN5),
    EXTRA,
    ("features: no extra codes -> extra codes", NO_EXTRA, RUN5),
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


def runs_text(rows: pd.DataFrame, settings: dict, errors: pd.DataFrame, published: pd.DataFrame) -> str:
    """What the runs were, and what they show.

    rows, published: of read_baselines. settings: seed, features and extra_codes of the present run. errors: its
    log2-MSE on the test set, and that of the simple models (columns), by k and m.
    """
    seed = settings["seed"]
    here = rows[rows["seed"] == seed].drop_duplicates("run").set_index("run")
    if here.empty:
        return "not trained with this dataset and seed."
    lines = [
        "on the split of Run 5, without extra codes unless said otherwise. Parameters of Run 2 and Run 4 include "
        "queries and keys, which have no effect in attention over one vector and are not trained here."
    ]
    if (here["backend"] == "jax").any():
        lines[0] += " JAX: trained on a GPU by Keras' JAX backend (data/rerun_on_jax.py); the others by TensorFlow."
    for run in [run for run in RUNS if run in here.index]:
        about = here.loc[run]
        ended = "" if about["ended"] == "complete" else f", stopped by {about['ended']}"
        size = f"{about['parameters']:,.0f} parameters, {about['epochs']:.0f} epochs{ended}"
        lines.append(f"{run:<18} {RUNS[run]} ({size}{', JAX' if about['backend'] == 'jax' else ''})")
    simple, earlier = tier_means(errors), tier_means(published)
    test = means_by_run(rows, "test_log2_mse")
    if settings["features"] == "basis" and settings["extra_codes"]:
        test[RUN5, seed] = simple["run5"]
    said = [earlier_text(test, seed, earlier), weights_text(test), curriculum_text(here)]
    if settings["features"] == "basis":
        said.append(departures_text(test, seed, simple["ridge"]))
    said.append(leak_text(rows, test, seed, earlier["Run 2"]))
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


def change(before: pd.Series, after: pd.Series) -> str:
    return by_tier({tier: f"{after[tier] / before[tier] - 1:+.1%}" for tier in TIERS})


def earlier_text(tiers: dict[tuple[str, int], pd.Series], seed: int, published: pd.DataFrame) -> str:
    """Whether Run 4 is worse than Run 2, as published and as trained here. published: tier_means of both."""
    _, base, run = NETWORK
    if seed not in seeds_of_both(tiers, base, run):
        return ""
    return (
        f"- The published errors of Run 4, against Run 2: {change(published[base], published[run])}. The design blames "
        "weights of up to 5. But Run 2 had weights of 1 to 5, and those of Run 4 never reached training. Trained here, "
        f"one run each, the test errors of Run 4 against Run 2: {change(tiers[base, seed], tiers[run, seed])}."
    )


def weights_text(tiers: dict[tuple[str, int], pd.Series]) -> str:
    """What weights of 1 to 5 change, and how far seeds differ without them; one seed alone says nothing."""
    _, base, run = WEIGHTS
    if len(seeds := seeds_of_both(tiers, base, run)) < 2:
        return ""
    changes = pd.DataFrame({seed: tiers[run, seed] / tiers[base, seed] - 1 for seed in seeds})
    equal = pd.DataFrame({seed: tiers[base, seed] for seed in seeds})
    found = {tier: f"{changes.loc[tier].min():+.1%} to {changes.loc[tier].max():+.1%}" for tier in TIERS}
    chance = {tier: f"{equal.loc[tier].max() / equal.loc[tier].min() - 1:.1%}" for tier in TIERS}
    return (
        f"- On raw P, weights of 1 to 5 in place of equal ones change the test error by {by_tier(found)}, in "
        f"{len(seeds)} seeds. With equal weights, it differs by {by_tier(chance)} between these seeds."
    )


def curriculum_text(runs: pd.DataFrame) -> str:
    """When Run 4's weights by epoch came, and when it was best with them. runs: rows of the csv by run (index)."""
    if WEIGHTED not in runs.index:
        return ""
    large, best, last = 61, runs["best_epoch"][WEIGHTED], runs["epochs"][WEIGHTED]
    return (
        f"- Run 4's weights by epoch give hard groups 0.2 to 0.5 at first, and 2.0 or more from epoch {large} on. The "
        f"run with them ended after {last:.0f} epochs. Its best epoch is {best:.0f}, "
        f"{'before' if best < large else 'when'} hard groups have the large weights."
    )


def departures_text(tiers: dict[tuple[str, int], pd.Series], seed: int, ridge: pd.Series) -> str:
    """What features and extra codes bring, each alone, and the features without a network. ridge: its tier_means."""
    if not all(seed in seeds_of_both(tiers, base, run) for _, base, run in (FEATURES, EXTRA)):
        return ""

    def factors(after: pd.Series) -> str:
        divided = tiers[RAW, seed] / after
        return by_tier({tier: f"{divided[tier]:.3g}" if divided[tier] < 1000 else "over 1000" for tier in TIERS})

    return (
        "- The test error on raw P without extra codes is divided by "
        f"{factors(tiers[FEATURES[2], seed])} by the features, with the largest bound added at the output. Without a "
        f"network, ridge regression on the features divides it by {factors(ridge)}. Extra codes alone divide it by "
        f"{factors(tiers[EXTRA[2], seed])}."
    )


def leak_text(rows: pd.DataFrame, test: dict[tuple[str, int], pd.Series], seed: int, published: pd.Series) -> str:
    """Whether shared codes bring the validation error of Run 2 to the published one. published: its tier_means."""
    if seed not in seeds_of_both(test, "Run 2", SHARED):
        return ""
    validation = means_by_run(rows, "log2_mse")
    split, shared = validation["Run 2", seed], validation[SHARED, seed]
    falls = [f"{split[tier]:.3f} to {shared[tier]:.3f} in {tier} ({published[tier]:.3f})" for tier in TIERS]
    below = [tier for tier in TIERS if shared[tier] < published[tier]]
    about = rows[(rows["run"] == SHARED) & (rows["seed"] == seed)].iloc[0]
    return (
        f"- With most validation codes in training too, the validation error of Run 2 (published) goes from "
        f"{', '.join(falls)}: below the published one in {' and '.join(below) or 'no tier'}. This run has a third of "
        f"the codes, and its best epoch is {about['best_epoch']:.0f} of {about['epochs']:.0f}. On the test set it has "
        f"{test[SHARED, seed]['overall']:.3f} overall, the run on all codes without sharing "
        f"{test['Run 2', seed]['overall']:.3f}."
    )
