"""Solvers against numpy: they take an operator and know nothing of layers."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from leakjax.solvers.linear import (
    dense_bytes,
    lsmr_condition,
    materialize,
    relative_residual,
    solve_dense,
    solve_lsmr,
)
from leakjax.solvers.lsmr import extreme_singular_values, lsmr


def with_spectrum(rng, rows, columns, values):
    u = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
    v = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
    return u @ np.diag(values) @ v.T


def operator_of(matrix):
    matrix = jnp.asarray(matrix)
    return lx.FunctionLinearOperator(lambda x: matrix @ x, jax.ShapeDtypeStruct(matrix.shape[1:], matrix.dtype))


def close(a, b, tolerance):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) <= tolerance * np.linalg.norm(np.asarray(b))


SHAPES = {
    "square": (9, 9, 9),
    "tall": (20, 8, 8),
    "wide": (7, 15, 7),
    "tall, deficient": (20, 12, 7),
    "wide, deficient": (12, 20, 5),
    "rank one": (6, 9, 1),
}


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_lsmr_is_the_minimum_norm_least_squares_solution(shape, consistent, rng):
    rows, columns, rank = SHAPES[shape]
    matrix = with_spectrum(rng, rows, columns, np.geomspace(10.0, 0.5, rank))
    b = matrix @ rng.normal(size=columns) if consistent else rng.normal(size=rows)
    expected = np.linalg.lstsq(matrix, b, rcond=1e-12)[0]
    answer = lsmr(operator_of(matrix), jnp.asarray(b), tolerance=1e-15, max_steps=300)
    assert close(answer.x, expected, 1e-11)
    left = np.linalg.norm(matrix @ expected - b) / np.linalg.norm(b)
    np.testing.assert_allclose(answer.residual, left, atol=1e-12)
    assert int(answer.steps) <= 300


def test_lsmr_of_nothing_is_nothing(rng):
    matrix = rng.normal(size=(5, 4))
    answer = lsmr(operator_of(matrix), jnp.zeros(5), tolerance=1e-15, max_steps=10)
    assert not np.any(answer.x)
    assert int(answer.steps) <= 1
    q, _ = np.linalg.qr(matrix)
    b = rng.normal(size=5)
    b -= q @ (q.T @ b)  # nothing of b is in the range of the matrix
    assert np.linalg.norm(lsmr(operator_of(matrix), jnp.asarray(b), tolerance=1e-14, max_steps=50).x) < 1e-12
    zero = lsmr(operator_of(np.zeros((5, 4))), jnp.asarray(b), tolerance=1e-14, max_steps=50)
    assert not np.any(zero.x)
    assert np.all(np.isfinite(zero.residual))


def test_lsmr_stops_at_its_bound_and_at_its_tolerance(rng):
    matrix = with_spectrum(rng, 60, 50, np.geomspace(1.0, 1e-4, 50))
    b = jnp.asarray(matrix @ rng.normal(size=50))
    assert int(lsmr(operator_of(matrix), b, tolerance=0.0, max_steps=7).steps) == 7
    rough = lsmr(operator_of(matrix), b, tolerance=1e-3, max_steps=400)
    fine = lsmr(operator_of(matrix), b, tolerance=1e-12, max_steps=400)
    assert int(rough.steps) < int(fine.steps)
    assert float(fine.residual) < float(rough.residual)


def test_lsmr_on_trees_under_jit_and_vmap(rng):
    matrices = np.stack([with_spectrum(rng, 14, 6, np.geomspace(3.0, 0.2, 6)) for _ in range(3)])
    sides = rng.normal(size=(3, 14))

    def solve(matrix, side):
        struct = jax.ShapeDtypeStruct((2, 3), matrix.dtype)
        operator = lx.FunctionLinearOperator(
            lambda x: {"top": matrix[:5] @ x.ravel(), "rest": (matrix[5:] @ x.ravel()).reshape(3, 3)}, struct
        )
        return lsmr(operator, {"top": side[:5], "rest": side[5:].reshape(3, 3)}, tolerance=1e-15, max_steps=60).x

    answers = jax.jit(jax.vmap(solve))(jnp.asarray(matrices), jnp.asarray(sides))
    for matrix, side, answer in zip(matrices, sides, answers, strict=True):
        assert answer.shape == (2, 3)
        assert close(np.ravel(answer), np.linalg.lstsq(matrix, side)[0], 1e-11)


def test_vmap_does_not_disturb_the_side_that_is_done_first(rng):
    """The while loop of a batch runs until the last is done; the others keep their answers."""
    matrix = with_spectrum(rng, 40, 30, np.geomspace(1.0, 1e-3, 30))
    easy, hard = np.linalg.svd(matrix)[0][:, 0], rng.normal(size=40)
    sides = jnp.asarray(np.stack([easy, hard]))
    both = jax.vmap(lambda b: lsmr(operator_of(matrix), b, tolerance=1e-13, max_steps=300))(sides)
    alone = lsmr(operator_of(matrix), sides[0], tolerance=1e-13, max_steps=300)
    assert int(both.steps[0]) == int(alone.steps) < int(both.steps[1])
    assert close(both.x[0], alone.x, 1e-12)


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_extreme_singular_values_are_the_matrixs_own(condition, rng):
    matrix = with_spectrum(rng, 50, 25, np.geomspace(7.0, 7.0 / condition, 25))
    answer = lsmr(operator_of(matrix), jnp.asarray(matrix @ rng.normal(size=25)), tolerance=1e-15, max_steps=200)
    low, high = extreme_singular_values(np.asarray(answer.alphas), np.asarray(answer.betas), int(answer.steps))
    assert high == pytest.approx(7.0, rel=1e-6)
    assert low == pytest.approx(7.0 / condition, rel=0.02)


def test_extreme_singular_values_ignore_the_null_space(rng):
    matrix = with_spectrum(rng, 40, 30, np.geomspace(5.0, 0.5, 12))
    answer = lsmr(operator_of(matrix), jnp.asarray(matrix @ rng.normal(size=30)), tolerance=1e-15, max_steps=100)
    low, high = extreme_singular_values(np.asarray(answer.alphas), np.asarray(answer.betas), int(answer.steps))
    assert high == pytest.approx(5.0, rel=1e-6)
    assert low == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("rounds", [1, 3])
def test_solve_lsmr_says_whether_it_met_a_null_space(rounds, rng):
    whole = with_spectrum(rng, 40, 20, np.geomspace(2.0, 0.1, 20))
    part = with_spectrum(rng, 40, 20, np.geomspace(2.0, 0.1, 15))
    truth = rng.normal(size=20)
    for matrix, null in ((whole, 0), (part, 5)):
        solution = jax.jit(lambda m, b: solve_lsmr(operator_of(m), b, tolerance=1e-15, max_steps=200, rounds=rounds))(
            jnp.asarray(matrix), jnp.asarray(matrix @ truth)
        )
        assert close(solution.x, np.linalg.lstsq(matrix, matrix @ truth, rcond=1e-10)[0], 1e-11)
        assert float(solution.residual) < 1e-13
        if null:
            assert 0.1 < float(solution.lost) < 1.0
        else:
            assert float(solution.lost) <= 1e-6
            assert close(solution.x, truth, 1e-9)


def test_refinement_wins_back_digits_in_float32(rng):
    matrix = with_spectrum(rng, 40, 20, np.geomspace(1.0, 3e-3, 20)).astype(np.float32)
    truth = rng.normal(size=20).astype(np.float32)
    b = jnp.asarray(matrix @ truth)
    errors = []
    for rounds in (1, 3):
        solution = solve_lsmr(operator_of(matrix), b, tolerance=5e-7, max_steps=300, rounds=rounds)
        assert solution.x.dtype == jnp.float32
        errors.append(float(solution.residual))
    assert errors[1] <= errors[0]
    assert errors[1] < 1e-5


def test_the_condition_of_several_solutions(rng):
    matrices = np.stack([with_spectrum(rng, 30, 12, np.geomspace(1.0, 1.0 / c, 12)) for c in (5.0, 50.0)])
    solution = jax.vmap(lambda m: solve_lsmr(operator_of(m), m @ jnp.ones(12), tolerance=1e-15, max_steps=100))(
        jnp.asarray(matrices)
    )
    assert lsmr_condition(solution, 0) == pytest.approx(5.0, rel=0.05)
    assert lsmr_condition(solution, 1) == pytest.approx(50.0, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_solve_dense_knows_rank_condition_and_what_is_seen(shape, rng):
    rows, columns, rank = SHAPES[shape]
    values = np.geomspace(10.0, 0.5, rank)
    matrix = with_spectrum(rng, rows, columns, values)
    b = rng.normal(size=rows)
    answer = solve_dense(matrix, b, tolerance=1e-12)
    assert answer.rank == rank
    assert answer.condition == pytest.approx(values[0] / values[-1], rel=1e-9)
    assert close(answer.x, np.linalg.lstsq(matrix, b, rcond=1e-12)[0], 1e-11)
    projector = np.linalg.pinv(matrix, rcond=1e-12) @ matrix
    np.testing.assert_allclose(answer.seen, np.diag(projector), atol=1e-11)
    assert answer.seen.sum() == pytest.approx(rank)
    assert answer.residual == pytest.approx(np.linalg.norm(matrix @ answer.x - b) / np.linalg.norm(b), abs=1e-14)


def test_solve_dense_counts_small_singular_values_by_its_tolerance(rng):
    matrix = with_spectrum(rng, 20, 10, [1.0, 0.5, 1e-3, 1e-6, 1e-9])
    b = matrix @ rng.normal(size=10)
    assert [solve_dense(matrix, b, tolerance=t).rank for t in (1e-12, 1e-8, 1e-4, 0.1)] == [5, 4, 3, 2]


def test_solve_dense_leaves_dead_columns_unseen(rng):
    matrix = rng.normal(size=(9, 6))
    matrix[:, [1, 4]] = 0.0
    answer = solve_dense(matrix, matrix @ rng.normal(size=6), tolerance=1e-12)
    np.testing.assert_allclose(answer.seen, [1, 0, 1, 1, 0, 1], atol=1e-12)
    np.testing.assert_allclose(answer.x[[1, 4]], 0.0, atol=1e-14)


def test_solve_dense_of_zeros():
    answer = solve_dense(np.zeros((3, 4)), np.ones(3), tolerance=1e-12)
    assert answer.rank == 0
    assert not np.any(answer.x)
    assert not np.any(answer.seen)


@pytest.mark.parametrize("shape", [pytest.param((900, 850), marks=pytest.mark.slow), (820, 900)])
def test_solve_dense_by_the_gram_matrix_agrees_with_singular_values(shape, rng):
    """Above 800 rows and columns the Gram matrix serves: same rank, solution and seen share as numpy's."""
    rank = 700
    matrix = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])) / rank
    truth = rng.normal(size=shape[1])
    b = matrix @ truth
    answer = solve_dense(matrix, b, tolerance=1e-10)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    assert answer.rank == rank == np.sum(s > 1e-10 * s[0])
    assert answer.condition == pytest.approx(s[0] / s[rank - 1], rel=1e-6)
    expected = vt[:rank].T @ ((u[:, :rank].T @ b) / s[:rank])
    assert close(answer.x, expected, 1e-8)
    np.testing.assert_allclose(answer.seen, np.sum(vt[:rank] ** 2, axis=0), atol=1e-8)


def test_materialize_is_the_operator(rng):
    matrix = rng.normal(size=(7, 6))
    struct = jax.ShapeDtypeStruct((2, 3), jnp.float64)
    operator = lx.FunctionLinearOperator(
        lambda x: (jnp.asarray(matrix[:3]) @ x.ravel(), {"g": jnp.asarray(matrix[3:]) @ x.ravel()}), struct
    )
    found, vector = materialize(operator, (jnp.arange(3.0), {"g": jnp.arange(3.0, 7.0)}))
    np.testing.assert_allclose(found, matrix, rtol=1e-15)
    np.testing.assert_array_equal(vector, np.arange(7.0))
    x = rng.normal(size=(2, 3))
    expected = np.linalg.norm(matrix @ x.ravel() - np.arange(7.0)) / np.linalg.norm(np.arange(7.0))
    answer = relative_residual(operator, (jnp.arange(3.0), {"g": jnp.arange(3.0, 7.0)}), jnp.asarray(x))
    assert float(answer) == pytest.approx(expected)


def test_dense_bytes_covers_the_matrix_and_grows():
    assert dense_bytes(100, 50) >= 8 * 100 * 50
    assert dense_bytes(200, 50) > dense_bytes(100, 50)


def test_a_zero_matrix_fits_a_zero_vector_only():
    assert solve_dense(np.zeros((3, 2)), np.zeros(3), tolerance=1e-12).residual == 0
    assert solve_dense(np.zeros((3, 2)), np.ones(3), tolerance=1e-12).residual == 1


def test_rank_of_a_large_float32_matrix_is_not_overcounted(rng):
    basis = rng.normal(size=(900, 850)).astype(np.float32)
    matrix = rng.normal(size=(1000, 850)).astype(np.float32) @ basis.T / 30
    assert solve_dense(matrix, matrix @ np.ones(900, np.float32), tolerance=1e-4).rank == 850
