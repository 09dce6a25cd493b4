"""Which original each reconstruction of a batch is compared with: a gradient's sum has no order of its own."""

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment


def pair_with_truth(
    truth: Float[np.ndarray, "N H W C"], pictures: Float[np.ndarray, "N H W C"], examples: int
) -> Float[np.ndarray, "N H W C"]:
    """`truth` reordered within each gradient's `examples` so that the total squared error to `pictures` is least."""
    order = []
    for start in range(0, len(truth), examples):
        group = slice(start, start + examples)
        errors = np.sum((pictures[group, None] - truth[None, group]) ** 2, axis=(2, 3, 4))
        order.append(start + linear_sum_assignment(errors)[1])
    return truth[np.concatenate(order)]
