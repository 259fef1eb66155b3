"""Where rows of a label head begin: from the means of their labels, in closed form.

    x_i, g_i(y)    head inputs of the device's own rows, with g = 1 for the row's label; and of public
                   texts that the fleet has predicted, with g = √e t(y) (codistill.py)
    w_y            Σ_i g_i(y)
    m, m_y         the mean of x, weighted by Σ_y g_i(y); and by g_i(y)
    S              the covariance of x about its label's mean, weighted by Σ_y g_i(y); a text of
                   several labels has the mean of these labels' means
    H_y            c · w_y / (w_y + PRIOR) · [½ S + ½ (tr S / d) I]⁻¹ (m_y - m), less its part along m

H are the weights of a linear discriminant with a shrunk covariance. Half the square of a head input
is that of m, which all inputs share: a row's part along m would favour a label whatever the input. A
label of less evidence than PRIOR texts begins near 0. A row that begins at 0 learns little in a
round: own labels' rows in the first, and rows of labels that only other models' devices hold later.
The root of e is the better weight: most targets of little evidence are right, too.

c keeps the size of the logits: their standard deviation on the device's own rows, over the labels
that have a row already, is that of these rows. Where no label has one, it is 1.

Source: Friedman 1989, Regularized Discriminant Analysis, JASA 84; the soft labels are ours.
"""

from edge_runtime.methods.interface import Array
from edge_runtime.methods.lazy import np

PRIOR = 0.1  # of a text
ALIKE = 1e-8  # the inputs' variance, as a share of the mean's square
LEAST = 1e-3  # tr S at least, as a share of the trace of the whole covariance


def rows(states: Array, weights: Array) -> Array:
    """H / c (labels, d) of head inputs (rows, d) with weights g (rows, labels); 0 where w_y is 0."""
    of_label, of_row = weights.sum(0), weights.sum(1)
    total, width = of_row.sum(), states.shape[1]
    mean = of_row @ states / total
    centred = states - mean
    means = weights.T @ centred / np.maximum(of_label, 1e-12)[:, None]
    whole = of_row @ np.square(centred).sum(1)
    if whole <= ALIKE * total * (mean @ mean):  # nothing but rounding tells inputs apart
        return np.zeros_like(means)
    # in place: the inputs may be many
    centred -= weights @ means / np.maximum(of_row, 1e-12)[:, None]
    centred *= np.sqrt(of_row / total)[:, None]
    matrix = 0.5 * (centred.T @ centred)
    # float32 is exact enough: this bounds the condition number by width + 1
    ridge = max(np.trace(matrix), 0.5 * LEAST * whole / total) / width
    matrix[np.diag_indices_from(matrix)] += ridge
    means *= (of_label / (of_label + PRIOR))[:, None]
    solved: Array = np.linalg.solve(matrix, means.T).T
    solved -= np.outer(solved @ mean, mean) / max(mean @ mean, 1e-12)
    return solved


def begun(head: Array, states: Array, weights: Array, own: int) -> Array:
    """The head (labels, d), with a row in closed form for each label whose row is 0.

    Args:
        states: head inputs, as for `rows`.
        weights: of the labels, as for `rows`.
        own: how many of the states, from the first, are of the device's own rows; if there are none,
            the logits of all states are compared.
    """
    fresh, asked = rows(states, weights), states[: own or None]
    empty, shown = (head == 0).all(1), weights.sum(0) > 0
    known = shown & ~empty
    has_size = known.sum() > 1  # logits of one label have no spread
    size = spread(asked @ head[known].T) if has_size else 1.0
    given = spread(asked @ fresh[known if has_size else shown].T)
    scale = size / given if given else 0.0  # one label alone is told from nothing
    return np.where(empty[:, None], np.float32(scale) * fresh, head)


def spread(logits: Array) -> float:
    """The standard deviation of logits (rows, labels) about each row's mean."""
    return float(np.sqrt(logits.var(1).mean()))
