"""The scale that a head without bias leaves open: all t and labels y with t dL/dz(f(t x), y) = u, u = dz / ||dz||.

One program finds the roots of all victims: sign changes of <t dL/dz(f(t x), y), u> - 1 on a logarithmic grid of t, then
halving each step of the grid down to rounding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from leakjax.attacks.heads.wanted import Wanted, bits
from leakjax.constraints.layer import loss_pull
from leakjax.models.losses import LossSpec
from leakjax.models.reader import Arrays
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment

_FROM, _TO, _STEPS = 1e-5, 1e16, 6300
"""The grid of t = 1 / ||dz||: from logits of 1e5 under a squared error to where a probability is 1 in float64. Two
roots within a step, 0.8 %, are missed."""

_PIECES = 63  # of the grid, one after another: a head of 1,000 outputs holds 100 x 1,000 numbers at a time
_MOST = 8  # roots of one label and sign; a loss has two or three
_HALVINGS = 54  # of a step of the grid: below the rounding of float64
_TELLING = ("softmax_cross_entropy", "sigmoid_binary_cross_entropy")
"""Losses whose dL/dz is negative at the label alone: others, and these with parameters, may push more outputs up."""


class Root(NamedTuple):
    """t, the target, and ||t dL/dz(f(t x), y) - u||."""

    t: float
    target: Shaped[np.ndarray, "..."]
    residual: float


def ray_of(
    segment: Segment, variables: Arrays, loss: LossSpec, x: Float[Array | np.ndarray, "..."]
) -> tuple[Float[Array, "..."], Callable[[Float[Array, " T"], Shaped[Array, "..."]], Float[Array, "T K"]]]:
    """f(x) - f(0), and (t (T,), target) -> t dL/dz(f(t x), target), (T, K)."""
    z0, along = _line(segment)(dict(variables), x)
    return along, functools.partial(_ray(segment, loss), dict(variables), z0, along)


def scalar_roots(
    segment: Segment,
    variables: Arrays,
    loss: LossSpec,
    direction: Float[np.ndarray, "V ..."],
    x: Float[np.ndarray, "V ..."],
    wanted: Wanted,
    count: int | None = None,
) -> list[list[Root]]:
    """By victim all roots, of both signs of t and every target that is `wanted`; of the first `count` victims, where
    the others fill a program up."""
    flat = direction.reshape(len(direction), -1)
    telling = flat.shape[1] > 1 and loss in _TELLING and bool(wanted.classes) and wanted.given is None
    plain = telling & np.all(flat != 0, axis=1)  # one-hot targets: only the label's entry of dz is negative
    everyone = np.asarray(wanted.classes, int)
    found: list[list[Root]] = [[] for _ in flat]

    def search(victims: Any, labels: Shaped[np.ndarray, "V S L ..."]) -> None:
        """The roots of victims who have the targets (positive t, negative t) in question."""
        signs = np.broadcast_to(np.array([1.0, -1.0], x.dtype)[:, None], labels.shape[1:3]).ravel()
        rays = labels.reshape(len(victims), -1, *labels.shape[3:])
        roots = _roots(segment, loss)(dict(variables), direction[victims], x[victims], rays, signs)
        for v, label, ts, residuals in zip(victims, rays, *map(np.asarray, roots), strict=True):
            for ray, k in zip(*np.nonzero(np.isfinite(ts)), strict=True):
                found[v].append(Root(float(ts[ray, k]), label[ray], float(residuals[ray, k])))

    def all_classes(victims: Any) -> Int[np.ndarray, "V 2 L"]:
        return np.broadcast_to(everyone, (len(victims), 2, len(everyone)))

    every = np.arange(len(flat))
    if wanted.given is not None:
        search(every, np.stack([wanted.given, wanted.given], axis=1)[:, :, None])
    elif wanted.several:
        lines = [np.asarray(_line(segment)(dict(variables), one)[1]) for one in x]
        search(
            every,
            np.stack(
                [[bits(u, z, wanted.shape), bits(-u, -z, wanted.shape)] for u, z in zip(flat, lines, strict=True)]
            )[:, :, None],
        )
    elif not telling:
        search(every, all_classes(every))
    else:  # all victims, so that the program has one shape; what it says of those who are not plain is dropped
        search(every, np.stack([np.argmin(flat, axis=1), np.argmax(flat, axis=1)], axis=1)[:, :, None])
        for v in np.flatnonzero(~plain[:count]):
            found[v].clear()
            search([v], all_classes([v]))
    return found[:count]


@keep(32)
def _roots(segment: Segment, loss: LossSpec) -> Callable[..., tuple[Float[Array, "V R k"], Float[Array, "V R k"]]]:
    """(variables, u (V, ...), x (V, ...), labels (V, R), signs (R,)) -> (t, residual) of each ray, NaN for no root."""

    def of_one(
        variables: Arrays,
        u: Float[Array, "..."],
        x: Float[Array, "..."],
        labels: Shaped[Array, "R ..."],
        signs: Float[Array, " R"],
    ) -> tuple[Float[Array, "R k"], Float[Array, "R k"]]:
        z0, along = _ends(segment, variables, x)
        flat = jnp.ravel(u)
        grid = jnp.asarray(np.geomspace(_FROM, _TO, _STEPS), x.dtype)

        def of_ray(
            given: tuple[Shaped[Array, "..."], Float[Array, ""]],
        ) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
            label, sign = given

            def pull(t: Float[Array, ""]) -> Float[Array, " K"]:
                return t * jnp.ravel(loss_pull(segment, variables, loss, z0 + t * along, label[None]))

            def excess(t: Float[Array, " T"]) -> Float[Array, " T"]:
                return jax.vmap(lambda t: pull(t) @ flat - 1.0)(t)

            ts = sign * grid
            signs = jnp.sign(jax.lax.map(excess, ts.reshape(_PIECES, -1)).ravel())
            [place] = jnp.nonzero(signs[:-1] * signs[1:] < 0, size=_MOST, fill_value=_STEPS)
            start = signs[jnp.minimum(place, _STEPS - 1)]

            def halve(_: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
                middle = 0.5 * (ends[0] + ends[1])
                same = jnp.sign(excess(middle)) == start
                return jnp.where(same, middle, ends[0]), jnp.where(same, ends[1], middle)

            ends = (ts[jnp.minimum(place, _STEPS - 1)], ts[jnp.minimum(place + 1, _STEPS - 1)])
            near, far = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
            t = jnp.where(jnp.abs(excess(near)) <= jnp.abs(excess(far)), near, far)
            residual = jnp.linalg.norm(jax.vmap(pull)(t) - flat[None], axis=1)
            return jnp.where(place < _STEPS, t, jnp.nan), residual

        return jax.lax.map(of_ray, (labels, signs))

    return jax.jit(vmap_several(of_one, (None, 0, 0, 0, None)))


@keep(32)
def _ray(segment: Segment, loss: LossSpec) -> Callable[..., Float[Array, "T K"]]:
    """(variables, z0, a, t (T,), label) -> t dL/dz(z0 + t a, label), (T, K)."""

    def pulls(
        variables: Arrays, z0: Float[Array, "*z"], a: Float[Array, "*z"], t: Float[Array, " T"], label: Int[Array, ""]
    ) -> Float[Array, "T K"]:
        return jax.vmap(lambda s: s * jnp.ravel(loss_pull(segment, variables, loss, z0 + s * a, label[None])))(t)

    return jax.jit(pulls)


@keep(32)
def _line(segment: Segment) -> Callable[..., tuple[Float[Array, "..."], Float[Array, "..."]]]:
    return jax.jit(lambda variables, x: _ends(segment, variables, x))


def _ends(segment: Segment, variables: Arrays, x: Float[Array, "*x"]) -> tuple[Float[Array, "*z"], Float[Array, "*z"]]:
    """f(0), f(x) - f(0): the logits along t x are the first plus t times the second."""
    at_zero = segment.function(variables, jnp.zeros_like(x))
    return at_zero, segment.function(variables, x) - at_zero
