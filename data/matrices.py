"""The matrices P of which data/prepare.py makes the dataset: random ones, and those of low codes.

Codes of small m-height are the ones that are looked for in practice, and random matrices hardly
ever give one. So a share of every group is made to be low: by a search that starts at random
matrices, and by two kinds of matrices whose heights are small by construction.
"""

import numpy as np

from data.heights import N, m_heights

# Entries are uniform on [-R, R]. The share of each R is that of the course's DS-1 data.
UNIFORM_RANGES = {4: 0.11, 8: 0.21, 16: 0.11, 32: 0.04, 50: 0.17, 64: 0.09, 80: 0.05, 100: 0.22}
MAX_ENTRY = max(UNIFORM_RANGES)
STRUCTURED_SHARE = 0.04
# Low codes: the shares of their three kinds, and how long the search takes, in rounds.
LOW_KINDS = {"searched": 0.8, "near-constant": 0.1, "small": 0.1}
SEARCH_ROUNDS = (5, 300)
VERY_LOW_ROUNDS = (30, 3_000)  # Of the search from small entries, for extra codes.


def random_matrices(rng: np.random.Generator, count: int, k: int, r: int) -> np.ndarray:
    """Random integer matrices P, shape (count, k, r), entries in [-MAX_ENTRY, MAX_ENTRY].

    Nearly all have entries uniform on [-R, R], R from UNIFORM_RANGES. A share STRUCTURED_SHARE is
    structured, a third each: entries in {-1, 0, 1}; one column equal to another but for a step of
    -1, 0 or 1 in each row; rank one less than full.
    """
    ranges = rng.choice(list(UNIFORM_RANGES), size=(count, 1, 1), p=list(UNIFORM_RANGES.values()))
    P = rng.integers(-ranges, ranges + 1, size=(count, k, r))

    family = rng.choice(4, size=count, p=[1 - STRUCTURED_SHARE, *[STRUCTURED_SHARE / 3] * 3])
    ternary, near, low = (np.flatnonzero(family == i) for i in (1, 2, 3))
    P[ternary] = rng.integers(-1, 2, size=(len(ternary), k, r))
    step = rng.integers(-1, 2, size=(len(near), k))
    P[near, :, 1] = np.clip(P[near, :, 0] + step, -MAX_ENTRY, MAX_ENTRY)
    rank = min(k, r) - 1
    left = rng.integers(-3, 4, size=(len(low), k, rank))
    P[low] = left @ rng.integers(-8, 9, size=(len(low), rank, r))
    return P


def low_matrices(rng: np.random.Generator, count: int, k: int, m: int) -> np.ndarray:
    """Matrices P of codes of small m-height, shape (count, k, N - k), of the three LOW_KINDS.

    Searched: random matrices improved by `search`, for a number of rounds that is log-uniform on
    SEARCH_ROUNDS, so that everything between random and low is there. Near-constant: all entries c
    + e, c uniform on [10, MAX_ENTRY - 8], e uniform on [-w, w], w one of 1, 2, 4, 8. Small: entries
    uniform on [a, b], a from -3 to 0, b from 1 to 3.
    """
    kind = rng.choice(3, size=count, p=list(LOW_KINDS.values()))
    P = random_matrices(rng, count, k, N - k)
    near, small = np.flatnonzero(kind == 1), np.flatnonzero(kind == 2)
    width = rng.choice([1, 2, 4, 8], size=(len(near), 1, 1))
    centre = rng.integers(10, MAX_ENTRY - 7, size=(len(near), 1, 1))
    P[near] = centre + rng.integers(-width, width + 1, size=(len(near), k, N - k))
    least = rng.integers(-3, 1, size=(len(small), 1, 1))
    most = rng.integers(1, 4, size=(len(small), 1, 1))
    P[small] = rng.integers(least, most + 1, size=(len(small), k, N - k))

    searched = np.flatnonzero(kind == 0)
    rounds = np.exp(rng.uniform(*np.log(SEARCH_ROUNDS), size=len(searched))).astype(int)
    P[searched] = search(rng, P[searched], m, rounds)
    return P


def very_low_matrices(rng: np.random.Generator, count: int, k: int, m: int) -> np.ndarray:
    """Matrices P of codes of very small m-height, shape (count, k, N - k), by `search`.

    It starts at entries uniform on [-R, R], R from 1 to 8, and takes a number of rounds that is
    log-uniform on VERY_LOW_ROUNDS.
    """
    most = rng.integers(1, 9, size=(count, 1, 1))
    P = rng.integers(-most, most + 1, size=(count, k, N - k))
    log_rounds = rng.uniform(*np.log(VERY_LOW_ROUNDS), size=count)
    return search(rng, P, m, np.rint(np.exp(log_rounds)).astype(int))


def search(rng: np.random.Generator, P: np.ndarray, m: int, rounds: np.ndarray) -> np.ndarray:
    """P, shape (count, k, r), after so many rounds, each of one or two changes if the height falls.

    Entries stay within the largest absolute entry that their matrix begins with. Half of the
    changes take a new entry from that whole range, half move one by at most an eighth of it.
    """
    order = np.argsort(-rounds, kind="stable")
    flat, rounds = P.reshape(len(P), -1)[order], rounds[order]
    most = np.abs(flat).max(axis=1)
    height = m_heights(P[order], [m])[:, 0]
    for number in range(rounds.max(initial=0)):
        active = np.arange(np.searchsorted(-rounds, -number))
        trial, limit = flat[active], most[active]
        for entries in range(2):
            place = rng.integers(flat.shape[1], size=len(active))
            step = np.maximum(limit // 8, 1)
            moved = trial[active, place] + rng.integers(-step, step + 1)
            new = np.where(rng.random(len(active)) < 0.5, rng.integers(-limit, limit + 1), moved)
            changed = rng.random(len(active)) < 0.5 if entries else slice(None)
            trial[active[changed], place[changed]] = np.clip(new, -limit, limit)[changed]
        found = m_heights(trial.reshape(-1, *P.shape[1:]), [m])[:, 0]
        lower = found < height[active]
        flat[active[lower]], height[active[lower]] = trial[lower], found[lower]
    return flat[np.argsort(order)].reshape(P.shape)
