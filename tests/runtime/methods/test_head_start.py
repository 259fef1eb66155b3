"""Rows of a head in closed form: their equation, their size beside trained rows, and what they tell apart."""

import numpy as np
import pytest

from edge_runtime.methods import head_start

LABELS, WIDTH, OWN = 4, 12, 24


def drawn(seed=0, texts=30, noise=0.0):
    """Head inputs of own rows of labels 0 and 1 and of texts of all labels, g, and the texts' labels."""
    draw = np.random.default_rng(seed)
    centres = 3 + 1.5 * draw.normal(0, 1, (LABELS, WIDTH))
    stretch = np.exp(draw.normal(0, 1, WIDTH))  # directions differ in how much they say
    own, public = draw.integers(0, 2, OWN), draw.integers(0, LABELS, texts)
    truth = np.concatenate([own, public])
    states = centres[truth] + stretch * draw.normal(0, 1, (len(truth), WIDTH))
    weights = np.eye(LABELS)[truth]
    evidence = draw.uniform(0.1, 0.9, (texts, 1))
    weights[OWN:] = evidence * ((1 - noise) * weights[OWN:] + noise * draw.dirichlet(np.ones(LABELS), texts))
    return states.astype(np.float32), weights.astype(np.float32), public


def reference(states, weights, shrink=0.5):
    """H / c row by row in float64, as the file's equations have it."""
    x, g = states.astype(np.float64), weights.astype(np.float64)
    m = sum(g_i.sum() * x_i for g_i, x_i in zip(g, x, strict=True)) / g.sum()
    w = g.sum(0)
    means = [sum(g_i[y] * x_i for g_i, x_i in zip(g, x, strict=True)) / w[y] for y in range(len(w))]
    S = np.zeros((x.shape[1],) * 2)
    for g_i, x_i in zip(g, x, strict=True):
        apart = x_i - sum(share * mean for share, mean in zip(g_i, means, strict=True)) / g_i.sum()
        S += g_i.sum() * np.outer(apart, apart) / g.sum()
    matrix = (1 - shrink) * S + shrink * np.trace(S) / len(S) * np.eye(len(S))
    share, across = w / (w + head_start.PRIOR), np.eye(len(S)) - np.outer(m, m) / (m @ m)
    return np.stack(
        [k * across @ np.linalg.solve(matrix, mean - m) for k, mean in zip(share, means, strict=True)],
        dtype=np.float64,
    )


def test_rows_are_their_equation():
    states, weights, _ = drawn(noise=0.4)
    found = head_start.rows(states, weights)
    np.testing.assert_allclose(found, reference(states, weights), rtol=1e-3, atol=1e-4)
    other = reference(states, weights, shrink=0.3)  # which the tolerance tells apart
    assert not np.allclose(found, other, rtol=1e-2, atol=1e-3)
    assert found.dtype == np.float32


@pytest.mark.parametrize("rows", [3, 100])
def test_more_inputs_than_rows_and_a_mean_far_from_zero_are_exact_enough(rows):
    draw = np.random.default_rng(0)
    states = (30 + draw.normal(0, 1, (rows, 200))).astype(np.float32)
    weights = np.eye(3, dtype=np.float32)[np.arange(rows) % 2]  # nothing shows the third label
    found = head_start.rows(states, weights)
    wide = head_start.rows(states.astype(np.float64), weights.astype(np.float64))
    np.testing.assert_allclose(found, wide, atol=1e-3 * np.abs(wide).max())
    assert not found[2].any()


def test_a_head_that_begins_has_logits_of_size_1_and_tells_its_rows_apart():
    states, weights, _ = drawn(texts=0)
    head = head_start.begun(np.zeros((LABELS, WIDTH), np.float32), states, weights, OWN)
    logits = states @ head[:2].T
    assert head_start.spread(logits) == pytest.approx(1, rel=1e-4)
    assert (logits.argmax(1) == weights.argmax(1)).mean() > 0.9
    assert not head[2:].any()  # of labels that nothing has shown


def test_new_rows_have_the_size_of_the_rows_that_are_there_which_stay():
    states, weights, public = drawn()
    first = head_start.begun(np.zeros((LABELS, WIDTH), np.float32), states[:OWN], weights[:OWN], OWN)
    for size in (1, 5):
        head = head_start.begun(size * first, states, weights, OWN)
        assert np.array_equal(head[:2], size * first[:2])
        fresh = head_start.rows(states, weights)
        scale = size / head_start.spread(states[:OWN] @ fresh[:2].T)
        np.testing.assert_allclose(head[2:], scale * fresh[2:], rtol=1e-3)
        right = (states[OWN:] @ head.T).argmax(1) == public
        assert right[public > 1].mean() > 0.8 and right[public < 2].mean() > 0.6


def test_a_device_without_rows_of_labels_takes_the_size_from_the_texts():
    states, weights, public = drawn()
    first = head_start.begun(np.zeros((LABELS, WIDTH), np.float32), states[OWN:], weights[OWN:], 0)
    assert head_start.spread(states[OWN:] @ first.T) == pytest.approx(1, rel=1e-4)
    assert ((states[OWN:] @ first.T).argmax(1) == public).mean() > 0.8


def test_new_rows_tell_nothing_apart_where_the_fleet_is_wrong():
    """The twin: the same texts, with targets of other texts."""
    states, weights, public = drawn(texts=300)
    first = head_start.begun(np.zeros((LABELS, WIDTH), np.float32), states[:OWN], weights[:OWN], OWN)
    weights[OWN:] = np.random.default_rng(1).permutation(weights[OWN:])
    head = head_start.begun(first, states, weights, OWN)
    right = (states[OWN:] @ head.T).argmax(1) == public
    assert right[public > 1].mean() < 0.5


def test_a_label_of_little_evidence_begins_near_zero():
    states, weights, _ = drawn()
    strong = head_start.rows(states, weights)
    weights[:, 3] *= 1e-4
    weak = head_start.rows(states, weights)
    assert np.linalg.norm(weak[3]) < 0.05 * np.linalg.norm(strong[3])
    assert np.linalg.norm(weak[2]) > 0.5 * np.linalg.norm(strong[2])


@pytest.mark.parametrize("labels", [1, 3])
def test_a_row_of_each_label_is_enough(labels):
    """The covariance within labels is 0 then; and of one label, there is nothing to tell apart."""
    states = 5 + np.random.default_rng(0).normal(0, 1, (labels, 40)).astype(np.float32)
    head = head_start.begun(
        np.zeros((labels, 40), np.float32), states, np.eye(labels, dtype=np.float32), labels
    )
    assert np.isfinite(head).all()
    assert head.any() == (labels > 1)
    assert ((states @ head.T).argmax(1) == range(labels)).all()


def test_inputs_that_are_all_alike_give_no_rows():
    states = np.repeat(np.random.default_rng(0).normal(0, 1, (1, 40)), 30, 0)
    states += 1e-7 * np.random.default_rng(1).normal(0, 1, states.shape)
    weights = np.eye(3, dtype=np.float32)[np.arange(30) % 3]
    zero = np.zeros((3, 40), np.float32)
    assert not head_start.begun(zero, states.astype(np.float32), weights, 30).any()
    states += 0.1 * np.random.default_rng(1).normal(0, 1, states.shape)
    assert head_start.begun(zero, states.astype(np.float32), weights, 30).any()
