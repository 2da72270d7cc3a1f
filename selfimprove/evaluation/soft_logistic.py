"""Logistic regression on soft labels with an L1 penalty and no intercept, for many weightings at once.

Each of B problems minimises  sum_i w_i [log(1 + exp(x_i b)) - p_i x_i b] + |b|_1 / C,  which is what scikit-learn's
liblinear minimises when every row is given twice, with label 1 and weight w p, and with label 0 and weight w (1 - p).
"""

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit as sigmoid

__all__ = ["fit", "sigmoid"]

Array = NDArray[np.float64]

STEPS, HALVINGS = 200, 30
TOLERANCE = 1e-9  # of a coefficient
FLAT = 1e-13  # of the objective: Newton's step before has left the square of its error


def fit(x: Array, p: Array, weight: Array, c: float, start: Array | None = None) -> Array:
    """The coefficients (B, k) at the optimum, by proximal Newton steps.

    Args:
        x: features (B, n, k); k is small.
        p: soft labels (n), in [0, 1].
        weight: of the rows (B, n), not negative.
        c: inverse strength of the penalty.
        start: coefficients to begin with, (B, k) or (1, k).

    Raises:
        ArithmeticError: no optimum in 200 steps.
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
        gained = value - after
        b, value = b + scale * step, after
        # where labels are separable and the penalty is weak, coefficients wander on long after nothing is gained
        small = (np.abs(scale * step) <= TOLERANCE).all(axis=1)
        if (small | (gained <= FLAT * (1 + np.abs(value)))).all():
            return b
    raise ArithmeticError(f"no optimum of a logistic regression in {STEPS} steps")


def _logits(x: Array, b: Array) -> Array:
    return np.asarray(np.matmul(x, b[..., None])[..., 0])


def _objective(x: Array, p: Array, weight: Array, c: float, b: Array) -> Array:
    z = _logits(x, b)
    return np.asarray((weight * (np.logaddexp(0, z) - p * z)).sum(axis=1) + np.abs(b).sum(axis=1) / c)


def _penalised_step(gradient: Array, hessian: Array, b: Array, penalty: float) -> Array:
    """The step to the minimum of the quadratic model plus the penalty.

    Where no coefficient is or becomes zero the penalty is linear, and the step solves linear equations. Elsewhere the
    equations are solved for every choice of signs and zeros (27 for three coefficients), and the best is taken:
    coordinate descent would crawl where the features are nearly collinear.
    """
    hessian = hessian + 1e-12 * np.eye(b.shape[1])
    step = _signed_step(gradient, hessian, b, penalty, np.sign(b))
    rest = (b == 0).any(axis=1) | (np.sign(b + step) != np.sign(b)).any(axis=1)
    if rest.any():
        g, h, at = gradient[rest], hessian[rest], b[rest]
        best, least = np.zeros_like(at), np.abs(at).sum(axis=1) * penalty
        for signs in itertools.product((-1.0, 0.0, 1.0), repeat=b.shape[1]):
            one = _signed_step(g, h, at, penalty, np.broadcast_to(signs, at.shape))
            model = (one * (g + np.matmul(h, one[..., None])[..., 0] / 2)).sum(axis=1)
            value = model + np.abs(at + one).sum(axis=1) * penalty
            best[value < least], least = one[value < least], np.minimum(value, least)
        step[rest] = best
    return step


def _signed_step(gradient: Array, hessian: Array, b: Array, penalty: float, sign: Array) -> Array:
    """The step that would be best had the coefficients these signs after it; those with sign 0 go to zero."""
    free = sign != 0
    both = free[:, :, None] & free[:, None, :]
    matrix = np.where(both, hessian, np.eye(b.shape[1]))
    moved = np.matmul(hessian, np.where(free, 0, b)[..., None])[..., 0]
    aim = np.where(free, moved - gradient - penalty * sign, -b)
    return np.asarray(np.linalg.solve(matrix, aim[..., None])[..., 0])
