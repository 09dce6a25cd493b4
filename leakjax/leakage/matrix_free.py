"""Spectrum and leakage map of a Jacobian that is too large to write down: Lanczos, random probes, products alone.

J is the Jacobian of a gradient g(x) with respect to its images x, not weighted, n = x.size columns. Nothing here is
larger than order x n numbers. A floor t is a noise level in the gradient over a standard deviation in the image: the
directions with singular values above it stand out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Int
from matfree import decomp
from scipy.linalg import eigh_tridiagonal

from leakjax.errors import InputError
from leakjax.runtime.programs import keep
from leakjax.solvers.lsmr import lsmr

CONVERGED = 1e-3  # a Ritz pair with a residual below this share of its value is taken for an eigenpair of J^T J
ROUNDING = 10.0  # eigenvalues of J^T J below so many units of rounding of its largest are not told from zero


class SpectrumEstimate(NamedTuple):
    """What probes say of the singular values of J.

    - `singular_values`: the largest ones, descending, to which Lanczos has converged (to 0.1 % or better; of several
      that agree as closely it may see one);
    - `floors`: the levels t asked for, in the order given;
    - `counts`, `counts_error`: how many singular values exceed each floor, and the standard error: of the probes, and
      of what the quadrature cannot place on one side of t, as the root of their squares; NaN below `resolution`;
    - `total`, `total_error`: the sum of squares of all singular values, ||J||_F^2, and its standard error;
    - `resolution`: singular values below it are rounding, about 5e-8 of the largest in float64 and 1e-3 in float32.
    """

    singular_values: Float[np.ndarray, " K"]
    floors: Float[np.ndarray, " F"]
    counts: Float[np.ndarray, " F"]
    counts_error: Float[np.ndarray, " F"]
    total: float
    total_error: float
    resolution: float


class MapEstimate(NamedTuple):
    """`map`: an estimate in [0, 1] for every entry of x, and its `standard_error`, both in the shape of x."""

    map: Float[np.ndarray, "*x"]
    standard_error: Float[np.ndarray, "*x"]


class _Quadrature(NamedTuple):
    """Nodes (eigenvalues of J^T J), ascending, their weights, and how far from its node a weight may lie."""

    nodes: Float[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    radii: Float[np.ndarray, " k"]
    vectors: Float[np.ndarray, "k k"]


def estimate_spectrum(
    gradient: Callable[..., Any],
    variables: Any,
    x: Float[Array, "B *space C"],
    labels: Int[Array, " B"],
    *,
    floor: Sequence[float],
    probes: int = 4,
    order: int = 60,
    seed: int = 0,
) -> SpectrumEstimate:
    """Counts of singular values by stochastic Lanczos quadrature, the largest of them set apart first.

    A first run of Lanczos gives eigenpairs (l_i, q_i) of J^T J; with Q = (q_1, ..., q_k), P = I - Q Q^T and random
    signs z,

        tr f(J^T J) = sum_i f(l_i) + E[(P z)^T f(P J^T J P) P z],  (P z)^T f(.) P z ~ sum_m w_m f(theta_m),

    with the Ritz values theta_m of Lanczos from P z and w_m = ||P z||^2 times the squares of the first components of
    their vectors. f is a step at t^2. A step is no polynomial: half of a weight may lie anywhere between its node and
    the next (Chebyshev, Markov & Stieltjes), but hardly farther from it than the Ritz residual; it is spread evenly in
    s = sqrt(theta) over that, and what is spread across t enters the error as a uniform distribution's deviation.
    Random signs have variance 2 (||F||_F^2 - sum_i F_ii^2) <= 2 (tr F^2 - (tr F)^2 / n), F what is left of f(J^T J);
    the error of the probes is this or their own spread, whichever is larger. The lower a floor beside the largest
    singular value s_1, the larger the `order` that it takes, up to about s_1 / t.

    Arguments:
    - `gradient(variables, x, labels)`: a dict of arrays, as of `network.batch_gradient`; hashable;
    - `floor`: levels t > 0, in units of the gradient over units of x;
    - `probes`: at least 2; `order`: products with J^T J in each of the `probes` + 1 runs of Lanczos.

    Raises `InputError` for a floor that is not positive, fewer than 2 probes or steps.

    Reference: Ubaru, Chen & Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal.
    Appl. 38 (2017), algorithm 1; deflation as in Gambhir, Stathopoulos & Orginos, SIAM J. Sci. Comput. 39 (2017).
    """
    floors = np.asarray(floor, float).reshape(-1)
    if not (np.isfinite(floors).all() and (floors > 0).all()):
        raise InputError(f"floor must hold positive numbers, got {list(floor)}")
    _at_least(2, probes=probes, order=order)
    steps = min(order, x.size)
    run = functools.partial(_lanczos(gradient, steps), variables, x, labels)
    first, *keys = jax.random.split(jax.random.key(seed), probes + 1)
    basis, *entries = run(_signs(first, x), jnp.zeros((x.size, steps), x.dtype))
    ritz = _quadrature(entries, x.dtype)
    smallest = ROUNDING * float(jnp.finfo(x.dtype).eps) * ritz.nodes.max(initial=0.0)
    apart = (ritz.radii <= CONVERGED * ritz.nodes) & (ritz.nodes > smallest)
    fixed = _ritz_vectors(basis, ritz.vectors[:, apart])
    del basis
    rules = [_quadrature(run(_signs(key, x), fixed)[1:], x.dtype) for key in keys]
    return _summary(rules, np.sqrt(ritz.nodes), apart, floors, np.sqrt(smallest), x.size)


def estimate_map(
    gradient: Callable[..., Any],
    variables: Any,
    x: Float[Array, "B *space C"],
    labels: Int[Array, " B"],
    *,
    floor: float,
    probes: int = 16,
    steps: int = 100,
    seed: int = 0,
    block: int = 1,
) -> MapEstimate:
    """The diagonal of J^T J (J^T J + t^2 I)^(-1), t the `floor`: how far noise t leaves each entry determined.

    1 where the gradient shows an entry above the noise, 0 where it does not; as t goes to 0, the diagonal of the
    projector onto the row space of J. With random signs z,

        diag(P) = E[z * P z],  P z = argmin_w ||J w - J z||^2 + t^2 ||w||^2  by LSMR, `steps` of it at most,

    of which one entry has variance (P^2)_ii - P_ii^2 <= P_ii (1 - P_ii) a probe: up to 0.5 / sqrt(probes), which is
    large. Averages are what to read: over blocks of b entries the variance is below 2 p (1 - p) / b a probe, p their
    mean. `block` > 1 averages over block x block positions (each channel alone; blocks at the far edges are smaller)
    and gives every entry its block's mean.

    `standard_error` is the root of this bound, or the spread over probes where that is larger, and of the square of
    what LSMR left: ||J^T J z - (J^T J + t^2) w|| / (t^2 sqrt(n)), which bounds the entries' root mean square error
    (1 is taken at most). LSMR takes about s_1 / t steps.

    Raises `InputError` for a floor that is not positive, fewer than 2 probes, or less than 1 step or block.

    Reference: Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix", Appl. Numer. Math. 57 (2007),
    equation 2.
    """
    if not (np.isfinite(floor) and floor > 0):
        raise InputError(f"floor must be a positive number, got {floor}")
    _at_least(2, probes=probes)
    _at_least(1, steps=steps, block=block)
    solve = _filtered(gradient, steps)
    sums, squares, left = np.zeros(x.shape), np.zeros(x.shape), 0.0
    for key in jax.random.split(jax.random.key(seed), probes):
        z = _signs(key, x).reshape(x.shape)
        w, error = solve(variables, x, labels, z, jnp.asarray(floor, x.dtype))
        sample = _block_means(np.asarray(z * w, float), block)
        sums, squares, left = sums + sample, squares + sample**2, left + float(error) / probes
    mean = sums / probes
    spread = np.maximum(squares / probes - mean**2, 0.0) / (probes - 1)
    clipped = np.clip(mean, 0.0, 1.0)
    entries = _block_sizes(x.shape, block)
    bound = np.where(entries > 1, 2.0, 1.0) * clipped * (1 - clipped) / entries / probes
    return MapEstimate(clipped, np.sqrt(np.maximum(spread, bound) + min(left, 1.0) ** 2))


def _at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")


def _signs(key: Array, x: Array) -> Float[Array, " n"]:
    return jax.random.rademacher(key, (x.size,), x.dtype)


@keep(16)
def _lanczos(gradient: Any, order: int) -> Any:
    """(variables, x, labels, start, Q) -> basis, diagonal, off-diagonal and ||start||, from P start with P J^T J P.

    P = I - Q Q^T. The last off-diagonal entry is the residual's length.
    """
    decompose = decomp.hessenberg(order, reortho="full", custom_vjp=False)

    def run(variables: Any, x: Any, labels: Any, start: Any, fixed: Any) -> Any:
        tangent = jax.linearize(lambda x: gradient(variables, x, labels), x)[1]
        adjoint = jax.linear_transpose(tangent, x)

        def outside(v: Array) -> Array:
            return v - fixed @ (fixed.T @ v)

        def product(v: Array) -> Array:
            return outside(jnp.ravel(adjoint(tangent(outside(v).reshape(x.shape)))[0]))

        start = outside(outside(start))
        pieces: Any = decompose(product, start)
        basis, matrix, residual, _ = pieces
        off = jnp.append(jnp.diagonal(matrix, -1), jnp.linalg.norm(residual))
        return basis, jnp.diagonal(matrix), off, jnp.linalg.norm(start)

    return jax.jit(run)


def _quadrature(entries: Sequence[Any], dtype: Any) -> _Quadrature:
    """Gauss's rule of the tridiagonal matrix, cut where the space that Lanczos explores is exhausted.

    `entries`: diagonal, off-diagonal and the start's length, as `_lanczos` gives them.
    """
    a, b, length = (np.asarray(entry, float) for entry in entries)
    scale = np.nanmax(np.abs(a), initial=0.0)
    rounding = ROUNDING * float(jnp.finfo(dtype).eps) * scale
    ends = np.flatnonzero(~(b > rounding) | ~np.isfinite(a))
    size = int(ends[0]) + int(np.isfinite(a[ends[0]])) if ends.size else a.size
    if size == 0 or scale == 0.0:
        empty = np.zeros(0)
        return _Quadrature(empty, empty, empty, np.zeros((a.size, 0)))
    nodes, vectors = eigh_tridiagonal(a[:size], b[: size - 1])
    last = b[size - 1] if np.isfinite(b[size - 1]) else 0.0
    radii = np.maximum(last * np.abs(vectors[-1]), rounding)
    padded = np.zeros((a.size, size))
    padded[:size] = vectors
    return _Quadrature(np.maximum(nodes, 0.0), float(length) ** 2 * vectors[0] ** 2, radii, padded)


def _ritz_vectors(basis: Float[Array, "k n"], vectors: Float[np.ndarray, "k m"]) -> Float[Array, "n k"]:
    """Orthonormal vectors of J^T J, then columns of zeros, so that one compiled run serves any number of them."""
    wide = np.zeros((len(vectors), len(vectors)))
    wide[:, : vectors.shape[1]] = vectors
    return jnp.matmul(jnp.nan_to_num(basis).T, jnp.asarray(wide, basis.dtype), precision="highest")


def _above(rule: _Quadrature, floor: float) -> tuple[float, float]:
    """(the weight above the floor, how much weight may lie on either side of it).

    Below the lowest node nothing balances what is misplaced: there all of its weight is in doubt, not half.
    """
    below = np.concatenate([[0.0], rule.nodes[:-1]])
    beyond = np.concatenate([rule.nodes[1:], [np.inf]])
    middle = np.sqrt(rule.nodes)
    low = np.sqrt(np.maximum(below, rule.nodes - rule.radii))
    high = np.sqrt(np.minimum(beyond, rule.nodes + rule.radii))
    low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
    half = np.tile(rule.weights / 2, 2)
    above = np.clip((high - floor) / np.maximum(high - low, np.finfo(float).tiny), 0.0, 1.0)
    across = (low < floor) & (floor < high)
    return float(half @ above), float(half @ across + half[:1].sum() * across[:1].sum())


def _summary(
    rules: Sequence[_Quadrature], ritz: np.ndarray, apart: np.ndarray, floors: np.ndarray, resolution: float, n: int
) -> SpectrumEstimate:
    """The probes' rules, and the singular values that were set `apart` of all Ritz values, ascending."""
    known = ritz[apart]
    pairs = np.array([[_above(rule, floor) for floor in floors] for rule in rules]).reshape(len(rules), floors.size, 2)
    rest, across = pairs[..., 0], pairs[..., 1].mean(axis=0)
    counts = np.clip(rest.mean(axis=0), 0.0, n - known.size)
    sizes = np.array([rule.weights @ rule.nodes for rule in rules])
    squares = np.array([rule.weights @ rule.nodes**2 for rule in rules])
    seen = np.where(floors < resolution, np.nan, 1.0)
    return SpectrumEstimate(
        singular_values=ritz[::-1][np.logical_and.accumulate(apart[::-1])],
        floors=floors,
        counts=seen * (counts + (known[:, None] > floors).sum(axis=0)),
        counts_error=seen * np.hypot(_probe_error(rest, counts, n), across / np.sqrt(12.0)),
        total=float(sizes.mean() + (known**2).sum()),
        total_error=float(_probe_error(sizes, squares.mean(), n)),
        resolution=float(resolution),
    )


def _probe_error(samples: np.ndarray, squares: Any, n: int) -> Any:
    """sqrt(max(sample variance, 2 (tr F^2 - (tr F)^2 / n)) / probes), samples of tr F along the first axis."""
    bound = 2.0 * (squares - samples.mean(axis=0) ** 2 / n)
    return np.sqrt(np.maximum(samples.var(axis=0, ddof=1), bound) / len(samples))


@keep(16)
def _filtered(gradient: Any, steps: int) -> Any:
    """(variables, x, labels, z, t) -> w = (J^T J + t^2)^(-1) J^T J z, and a bound of its entries' rms error."""

    def solve(variables: Any, x: Any, labels: Any, z: Any, floor: Any) -> Any:
        tangent = jax.linearize(lambda x: gradient(variables, x, labels), x)[1]
        adjoint = jax.linear_transpose(tangent, x)
        operator = lx.FunctionLinearOperator(lambda w: (tangent(w), floor * w), jax.eval_shape(lambda: x))
        shown = tangent(z)
        tolerance = float(jnp.finfo(x.dtype).eps)
        w = lsmr(operator, (shown, jnp.zeros_like(x)), tolerance=tolerance, max_steps=steps).x
        left = adjoint(jax.tree.map(jnp.subtract, shown, tangent(w)))[0] - floor**2 * w
        return w, jnp.sqrt(jnp.mean(left**2)) / floor**2

    return jax.jit(solve)


def _block_means(values: np.ndarray, block: int) -> np.ndarray:
    """Every entry's mean over its block of positions: axes 1 to -2, image and channel kept."""
    for axis in range(1, values.ndim - 1):
        starts = list(range(0, values.shape[axis], block))
        sizes = np.diff([*starts, values.shape[axis]])
        shape = [1] * values.ndim
        shape[axis] = len(starts)
        sums = np.add.reduceat(values, starts, axis=axis)
        values = np.repeat(sums / sizes.reshape(shape), sizes, axis=axis)
    return values


def _block_sizes(shape: Sequence[int], block: int) -> np.ndarray:
    """How many entries each entry's mean is of."""
    sizes = np.ones(shape, int)
    for axis in range(1, len(shape) - 1):
        places = np.arange(shape[axis])
        extent = np.minimum(block, shape[axis] - places // block * block)
        sizes = sizes * np.expand_dims(extent, [other for other in range(len(shape)) if other != axis])
    return sizes
