"""The top eigenvalue of the loss's Hessian for each layer's weights (HAWQ, Dong et al. 2019; PyHessian, Yao et al. 2020).

Power iteration v <- Hv / |Hv| from a seeded start; the eigenvalue is the Rayleigh quotient v'Hv, |v| = 1. Products need no second
derivative, for the gradient g at two points near w gives them:

    Hv = (g(w + e v) - g(w - e v)) / 2 e

Only here is torch needed (`torch_gradient`). The Hessian is that of the trace: of KL to the model's own outputs without labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qcompile.divergence import FloatArray
from qcompile.executors import Workers, result_of
from qcompile.probing import Study
from qcompile.torch_gradient import Gradient, one_thread, require_torch

_LARGEST_STEP = 2.0**-5  # of the weights' norm, along a direction of length 1
_SMALLEST_STEP = 2.0**-14
_STEP_TOLERANCE = 0.01
_WARM = 2  # products before the step is chosen: by then v has turned to where the curvature is
TOLERANCE = 1e-3
MOST = 100


@dataclass(frozen=True)
class Eigenvalue:
    """What was found of one layer, by `iterations` products of `step`.

    change: of the value in the last iteration, relative; disagreement: of the product at that step and at half of it, relative.
    tight: the change fell below the tolerance.
    """

    value: float
    iterations: int
    change: float
    step: float
    disagreement: float
    tight: bool


def top_eigenvalue(study: Study, layer: int, tolerance: float = TOLERANCE, most: int = MOST) -> Eigenvalue:
    """That of `layer`: the largest in size, of either sign.

    Raises InputError where torch is missing (a cluster's workers need it too), ModelError where it cannot run the model.
    """
    require_torch()
    with one_thread():
        gradient = Gradient(study, layer)
        return power_iteration(gradient, gradient.weight, np.random.default_rng([study.seed, layer]), tolerance, most)


def power_iteration(
    gradient: Callable[[FloatArray], FloatArray],
    weight: FloatArray,
    random: np.random.Generator,
    tolerance: float = TOLERANCE,
    most: int = MOST,
) -> Eigenvalue:
    """The top eigenvalue of the derivative of `gradient` at `weight`, by at most `most` products."""
    size = max(float(np.linalg.norm(weight)), 1e-30)

    def product(v: FloatArray, step: float) -> FloatArray:
        return np.asarray((gradient(weight + step * v) - gradient(weight - step * v)) / (2 * step))

    v = random.normal(size=weight.shape)
    v /= np.linalg.norm(v)
    step, disagreement = _LARGEST_STEP * size, 0.0
    value, change, count = 0.0, np.inf, 0
    while count < most:
        if count == _WARM:
            step, disagreement = _choose_step(product, v, size)
        turned = product(v, step)
        count += 1
        length = float(np.linalg.norm(turned))
        if length == 0:
            return Eigenvalue(0.0, count, 0.0, step, disagreement, True)
        found = float(np.vdot(v, turned))
        change = abs(found - value) / max(abs(found), 1e-300)
        value, v = found, turned / length
        if count > _WARM + 1 and change <= tolerance:
            return Eigenvalue(value, count, change, step, disagreement, True)
    return Eigenvalue(value, count, float(change), step, disagreement, False)


def _choose_step(product: Callable[[FloatArray, float], FloatArray], v: FloatArray, size: float) -> tuple[float, float]:
    """(step, disagreement): the largest step whose half gives the same product within a hundredth; else the one that differs
    least: float noise grows as steps shrink, and what is not quadratic as they grow."""
    best = (np.inf, 0.0)
    relative = _LARGEST_STEP
    coarse = product(v, relative * size)
    while relative >= _SMALLEST_STEP:
        fine = product(v, relative / 2 * size)
        scale = float(max(np.linalg.norm(coarse), np.linalg.norm(fine)))
        apart = float(np.linalg.norm(coarse - fine)) / scale if scale > 0 else 0.0
        if apart < best[0]:
            best = (apart, relative / 2 * size)
        if apart <= _STEP_TOLERANCE:
            break
        relative, coarse = relative / 2, fine
    return best[1], best[0]


def eigenvalues(
    pool: Workers,
    layers: int,
    *,
    max_seconds: float | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Eigenvalue | None]:
    """The top eigenvalue of each of the pool's study's `layers`; None for what was not begun within `max_seconds`."""
    started = clock()
    ahead = [pool.submit(top_eigenvalue, index) for index in range(layers)] if pool.count > 1 else []
    found: list[Eigenvalue | None] = []
    for index in range(layers):
        late = max_seconds is not None and clock() - started > max_seconds
        if ahead:
            late = late and not ahead[index].done()
            found.append(None if late else result_of(ahead[index]))
            if late:
                ahead[index].cancel()
        else:
            found.append(None if late else result_of(pool.submit(top_eigenvalue, index)))
        if progress is not None:
            progress(index + 1, layers)
    return found
