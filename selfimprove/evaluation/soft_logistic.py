"""Logistic regression on soft labels with an L1 penalty and no intercept, for many weightings at once.

Each of B problems minimises  sum_i w_i [log(1 + exp(x_i b)) - p_i x_i b] + |b|_1 / C,  which is what scikit-learn's
liblinear minimises when every row is given twice, with label 1 and weight w p, and with label 0 and weight w (1 - p).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit as sigmoid

__all__ = ["fit", "sigmoid"]

Array = NDArray[np.float64]

STEPS, HALVINGS, SWEEPS = 100, 30, 200
TOLERANCE = 1e-9  # of a coefficient


def fit(x: Array, p: Array, weight: Array, c: float, start: Array | None = None) -> Array:
    """The coefficients (B, k) at the optimum, by proximal Newton steps.

    Args:
        x: features (B, n, k); k is small.
        p: soft labels (n), in [0, 1].
        weight: of the rows (B, n), not negative.
        c: inverse strength of the penalty.
        start: coefficients to begin with, (B, k) or (1, k).

    Raises:
        ArithmeticError: no optimum in 100 steps.
    """
    problems, _, k = x.shape
    b = np.zeros((problems, k)) if start is None else np.broadcast_to(start, (problems, k)).copy()
    value = _objective(x, p, weight, c, b)
    for _ in range(STEPS):
        q = sigmoid(_logits(x, b))
        gradient = np.einsum("bn,bnk->bk", weight * (q - p), x)
        hessian = np.matmul((x * (weight * q * (1 - q))[..., None]).transpose(0, 2, 1), x)
        step = _penalised_step(gradient, hessian, b, 1 / c)
        scale = np.ones((problems, 1))
        for _ in range(HALVINGS):
            after = _objective(x, p, weight, c, b + scale * step)
            worse = after > value + 1e-12 * np.abs(value)
            if not worse.any():
                break
            scale[worse] /= 2
        else:
            scale[worse] = 0  # at the optimum, as far as numbers go
            after = np.where(worse, value, after)
        b, value = b + scale * step, after
        if np.abs(scale * step).max(initial=0) < TOLERANCE:
            return b
    raise ArithmeticError(f"no optimum of a logistic regression in {STEPS} steps")


def _logits(x: Array, b: Array) -> Array:
    return np.asarray(np.matmul(x, b[..., None])[..., 0])


def _objective(x: Array, p: Array, weight: Array, c: float, b: Array) -> Array:
    z = _logits(x, b)
    return np.asarray((weight * (np.logaddexp(0, z) - p * z)).sum(axis=1) + np.abs(b).sum(axis=1) / c)


def _penalised_step(gradient: Array, hessian: Array, b: Array, penalty: float) -> Array:
    """The step to the minimum of the quadratic model plus the penalty.

    Where no coefficient is or becomes zero the penalty is linear, and the step solves linear equations; the others are
    found by coordinate descent.
    """
    hessian = hessian + 1e-12 * np.eye(b.shape[1])
    sign = np.sign(b)
    step = -np.linalg.solve(hessian, (gradient + penalty * sign)[..., None])[..., 0]
    rest = ~((sign != 0) & (np.sign(b + step) == sign)).all(axis=1)
    if rest.any():
        step[rest] = _descent(gradient[rest], hessian[rest], b[rest], penalty)
    return np.asarray(step)


def _descent(gradient: Array, hessian: Array, b: Array, penalty: float) -> Array:
    step = np.zeros_like(b)
    for _ in range(SWEEPS):
        moved = 0.0
        for j in range(b.shape[1]):
            curvature = hessian[:, j, j]
            slope = gradient[:, j] + np.einsum("bk,bk->b", hessian[:, j], step)
            free = b[:, j] + step[:, j] - slope / curvature
            target = np.sign(free) * np.maximum(0, np.abs(free) - penalty / curvature)
            change = target - b[:, j] - step[:, j]
            step[:, j] += change
            moved = max(moved, float(np.abs(change).max()))
        if moved < TOLERANCE / 10:
            break
    return step
