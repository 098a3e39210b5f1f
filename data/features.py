"""What a code is turned into before the network: Keras layers, since the saved model takes P.

Every set B of k coordinates of the code whose columns G_B of G = [I_k | P] are invertible, a basis
(information set), bounds the m-height from below. BasisFeatures gives two numbers for each of the
at most 126 bases, in log2: how large this bound is, and how large a codeword within 1 on B can be.
MinimumDistance tells from which m on the height is infinite. Both start from the maximal minors of
G, by which heights.py computes exact heights, too.
"""

import math
from functools import partial
from itertools import combinations

import keras
import numpy as np
from keras import layers, ops

from data.heights import (
    EXACT_INTEGER_LIMIT,
    ROUNDING,
    N,
    cramer_table,
    expand,
    minor_order,
    minor_tables,
)

rows_of = partial(ops.take, axis=0)  # What x[rows] is for arrays.


class MinorLayer(layers.Layer):
    """Base of layers that start from the maximal minors of G.

    Called with k and m, integers of shape (batch, 1), and P_matrix, (batch, 20): the entries of P
    row by row, padded with zeros. Returns (batch, WIDTH), float32, by `from_minors`, which a
    subclass has. Until then all is float64: minors reach 2.4e9, and it matters whether one is 0.
    """

    WIDTH = 1

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs | {"dtype": "float64"})
        self.supports_jit = False  # XLA cannot compile a number of rows that depends on k.

    def compute_output_spec(self, k, m, P_matrix):
        return keras.KerasTensor((None, self.WIDTH), "float32")  # Else Keras traces call.

    def call(self, k, m, P_matrix):
        output = 0.0
        for dimension in (4, 5, 6):  # The codes of each k apart, since their minors differ.
            (rows,) = ops.nonzero(ops.equal(k[:, 0], dimension))
            minors = self.minors(rows_of(P_matrix, rows), dimension)
            part = self.from_minors(minors, rows_of(m[:, 0], rows), dimension)
            part = ops.cast(part, "float32")
            output += ops.scatter(rows[:, None], part, (ops.shape(k)[0], self.WIDTH))
        return output

    def minors(self, P, k: int):
        """|det G_B| for the sets B of itertools.combinations, (sets, rows). P: (rows, 20).

        By the rule of heights.py at ROUNDING, what rounding alone can have made is 0. In floating
        point that goes for integers, too, where a minor can be 2^53 or more.
        """
        r = N - k
        entries = ops.transpose(ops.cast(P, "float64")[:, : k * r])
        largest = ops.max(ops.abs(entries), axis=0, initial=0.0)
        entries = ops.where(ops.abs(entries) > ROUNDING * largest, entries, 0.0)
        tables, one = minor_tables(k, r), ops.ones_like(entries[:1])
        minors = ops.abs(ops.concatenate([one, *expand(entries, tables, -1, rows_of)]))
        sizes = ops.concatenate([one, *expand(ops.abs(entries), tables, +1, rows_of)])
        exact = ops.all(ops.equal(entries, ops.round(entries)), axis=0)
        exact = ops.logical_and(exact, ops.max(sizes, axis=0, initial=1.0) < EXACT_INTEGER_LIMIT)
        rounding = ops.where(exact, 0.0, ROUNDING * sizes)
        return rows_of(ops.where(minors > rounding, minors, 0.0), minor_order(k, r))

    def from_minors(self, minors, m, k: int):
        """The output, (rows, WIDTH), for codes of one k. minors: (sets, rows); m: (rows,)."""
        raise NotImplementedError


@keras.saving.register_keras_serializable("m_height")
class MinimumDistance(MinorLayer):
    """The minimum distance d of the code, (batch, 1): the m-height is infinite for m >= d.

    A codeword other than 0 can vanish on a set S of coordinates exactly when no basis is inside S.
    """

    def from_minors(self, minors, m, k: int):
        sets = [S for size in range(k, N) for S in combinations(range(N), size)]
        bases = combinations(range(N), k)
        inside = np.array([[{*basis} <= {*S} for S in sets] for basis in bases], dtype="float64")
        bases_inside = ops.matmul(ops.cast(ops.transpose(minors) > 0, "float64"), inside)
        outside = np.array([N - len(S) for S in sets], dtype="float64")
        distances = ops.where(bases_inside > 0, N, outside)
        return ops.min(distances, axis=1, keepdims=True, initial=N - k + 1)


@keras.saving.register_keras_serializable("m_height")
class BasisFeatures(MinorLayer):
    """Two numbers for each basis (information set) B of the code: 252 features, float32.

    For a coordinate a outside B let M[B, a] = max(1, || G_B^-1 g_a ||_1): codewords c within 1 on B
    have |c_a| <= M[B, a], and one attains the norm. Let rho_B be the largest M[B, a] and s_B the
    (n - k - m)-th smallest, or 1 for m = n - k. The codeword that attains rho_B, divided by s_B, is
    within 1 on n - m coordinates, so that rho_B / s_B is a lower bound of the m-height. With the
    bases sorted by this bound, and those within 0.002 of each other by rho_B, the features are, in
    log2:

      1       the largest bound
      125     how far the bound of every other basis is below it, at most LIMIT
      126     rho_B of all of them, relative to the largest bound, within LIMIT of it

    Sets of k coordinates that are no basis, and what k = 6 has less than 126, are last and have
    LIMIT. The order and signs of coordinates do not matter. How bases combine to a height is left
    to the network. The minors give M by Cramer's rule (data/heights.py).
    """

    BASES, WIDTH, LIMIT = 126, 252, 6.0

    def from_minors(self, minors, m, k: int):
        r, sets = N - k, math.comb(N, k)
        basis, swapped = cramer_table(N, k)
        above, below = sum(rows_of(minors, row) for row in swapped), rows_of(minors, basis)
        M = ops.log2(ops.maximum(ops.where(below > 0, above / below, 1.0), 1.0))
        falling = ops.top_k(ops.reshape(ops.transpose(M), (-1, sets, r)), r)[0]
        rho = falling[:, :, 0]
        # In the falling order s_B has the index m. For m = r there is none, and log2 of 1 is 0.
        s = ops.sum(falling * ops.one_hot(m, r, dtype="float64")[:, None, :], axis=2)
        bound = ops.where(ops.transpose(minors) > 0, rho - s, -np.inf)
        largest = ops.max(bound, axis=1, keepdims=True, initial=0.0)
        # By rho where bounds are nearly equal, so that rounding does not decide.
        order = ops.top_k(bound + rho / 2**14, sets)[1]
        bound, rho = (ops.take_along_axis(x, order, axis=1) for x in (bound, rho))

        gaps = ops.minimum(largest - bound, self.LIMIT)
        reach = ops.clip(rho - largest, -self.LIMIT, self.LIMIT)
        reach = ops.where(bound > -np.inf, reach, self.LIMIT)
        missing = ((0, 0), (0, self.BASES - sets))
        gaps, reach = (ops.pad(x, missing, constant_values=self.LIMIT) for x in (gaps, reach))
        return ops.concatenate([largest, gaps[:, 1:], reach], axis=1)
