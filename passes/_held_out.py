"""Optimal Brain Surgeon judged by samples that it has not seen: what a layer loses with some of its inputs.

Inputs P of a layer y = W x go, and the others make up for them as far as they can (Hassibi and Stork 1993, for a block):

    dW = -w_P ([A^-1]_PP)^-1 [A^-1]_P:        A = Cov(x) on one part of the samples, damped

OBS takes w_P ([A^-1]_PP)^-1 w_P^T for the loss. That is the error on the samples which dW was fitted to: where they give fewer
rows than x has columns (behind a global pool a photo is one row) anything can be made up for, and all inputs look free. Here the
loss is |W - W'|^2 under B = Cov(x) on the other part, W' being what is left of W:

    loss(P) = tr(dW B dW^T) + 2 tr(dW B E^T)        E = W' - W before P goes

so that the losses of one removal after the other add up to what all cost. It needs no more than the entries at P of A^-1,
M = A^-1 B A^-1 and N = E B A^-1. P goes out of A^-1 by T A^-1 T^T with T = [I, -[A^-1]_:P ([A^-1]_PP)^-1], and out of M alike.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from qcompile.graph import Array


def grouped(roots: Array) -> list[tuple[Array, Array]]:
    """(units [n], their columns [n, p]) for each number p of columns that a unit has."""
    units, counts = np.unique(roots, return_counts=True)
    order = np.argsort(roots, kind="stable")
    found = []
    for size in np.unique(counts):
        alike = units[counts == size]
        found.append((alike, order[np.isin(roots[order], alike)].reshape(len(alike), size)))
    return found


class Fitted:
    """W [rows, K] as its columns go, the others fitted by `inverse` = A^-1 [K, K] and judged by B = `judge` [K, K].

    roots: which unit each column belongs to.
    """

    def __init__(self, matrix: Array, roots: Array, inverse: Array, judge: Array) -> None:
        self.matrix, self.roots, self.inverse = matrix, roots, inverse
        self._spread = inverse @ judge @ inverse  # M
        self._cross = np.zeros_like(matrix)  # N

    def losses(self) -> dict[int, float]:
        """Of each unit that is left."""
        found: dict[int, float] = {}
        for units, columns in grouped(self.roots):
            blocks = columns[:, :, None], columns[:, None, :]
            rows, cross = (
                np.moveaxis(self.matrix[:, columns], 0, 1),
                np.moveaxis(self._cross[:, columns], 0, 1),
            )
            share = rows @ np.linalg.inv(self.inverse[blocks])
            losses = np.einsum("ucp,ucp->u", share @ self._spread[blocks] - 2 * cross, share)
            found.update(zip(units.tolist(), losses.tolist(), strict=True))
        return found

    def remove(self, units: Collection[int]) -> float:
        """Take them out; returns their loss."""
        gone = np.isin(self.roots, sorted(units))
        if not gone.any():
            return 0.0
        stays = ~gone
        block, across = self.inverse[np.ix_(gone, gone)], self.inverse[np.ix_(gone, stays)]
        share, back = np.linalg.solve(block, self.matrix[:, gone].T).T, np.linalg.solve(block, across)
        inner, mixed = self._spread[np.ix_(gone, gone)], self._spread[np.ix_(stays, gone)] @ back
        loss = float(np.einsum("cp,cp->", share @ inner - 2 * self._cross[:, gone], share))
        cross = self._cross - share @ self._spread[gone]
        self._cross = cross[:, stays] - cross[:, gone] @ back
        self._spread = self._spread[np.ix_(stays, stays)] - mixed - mixed.T + back.T @ inner @ back
        self.matrix = self.matrix[:, stays] - self.matrix[:, gone] @ back
        self.inverse = self.inverse[np.ix_(stays, stays)] - across.T @ back
        self.roots = self.roots[stays]
        return loss


class Plain:
    """W [rows, K] of a layer too wide to be fitted: columns take along what they bring, by `power` [K]; nothing stands in."""

    def __init__(self, matrix: Array, roots: Array, power: Array) -> None:
        self.matrix, self.roots, self._energy = matrix, roots, np.square(matrix).sum(axis=0) * power

    def losses(self) -> dict[int, float]:
        """Of each unit that is left."""
        units, place = np.unique(self.roots, return_inverse=True)
        return dict(zip(units.tolist(), np.bincount(place, self._energy).tolist(), strict=True))

    def remove(self, units: Collection[int]) -> float:
        """Take them out; returns their loss."""
        stays = ~np.isin(self.roots, sorted(units))
        loss = float(self._energy[~stays].sum())
        self.matrix, self.roots, self._energy = self.matrix[:, stays], self.roots[stays], self._energy[stays]
        return loss


def fitted_pair(matrix: Array, roots: Array, covariances: tuple[Array, Array], strengths: Collection[float]) -> list[Fitted]:
    """Both parts of the samples in turn, A damped with the strength of `strengths` (rising) that judges best.

    That is the one at which single units, each gone alone, lose the least together. A strength counts in mean variances of A.
    """
    level = max(float(np.mean([np.einsum("kk->k", c).mean() for c in covariances])), 1e-30)
    best: list[Fitted] = []
    least = float("inf")
    for strength in strengths:
        pair = []
        for fit, judge in (covariances, covariances[::-1]):
            inverse = np.linalg.inv(fit + strength * level * np.eye(len(fit)))
            pair.append(Fitted(matrix, roots, (inverse + inverse.T) / 2, judge))
        lost = sum(sum(half.losses().values()) for half in pair)
        if best and lost >= least:
            break
        best, least = pair, lost
    return best
