"""The loss in torch: one sweep over the vocabulary for as many tokens as the budget allows.

    dh = (1 - p) · (mean of W by softmax without the label - W[label])
    d = logsumexp without the label - l[label],   loss = softplus(d),   1 - p = sigmoid(d)

The logits of a piece of the vocabulary become their softmax without the label. The softmax goes
through the second product at once and joins a running mean of the head's rows. So the head is read,
or expanded, once for as many tokens as leave half of the byte budget to their float32 gradients.
The gradient is made in the forward pass: two products a token. Kept for backward: dh.
"""

import torch

from edge_kernels.quant import expanded_rows

NEVER = -1e30  # a logit whose exponential is 0 beside any other logit's


def losses(rows, head, batch, chunk_bytes, trains):  # type: ignore[no-untyped-def]
    """The loss of each labelled token, and dh of all, or None where h does not train."""
    tokens, width = len(batch.targets), rows.shape[1]
    dh = rows.new_empty(tokens, width) if trains else None
    result = torch.empty(tokens, device=rows.device)
    step = chunk_bytes // (8 * width)  # tokens whose float32 gradient takes half of the budget
    for chunk, x in batch.chunks(rows, step):
        dx = None if dh is None else dh[chunk]
        _sweep(x, head, batch.targets[chunk], chunk_bytes, result[chunk], dx)
    return result, dh


def _sweep(x, head, targets, chunk_bytes, losses, dh):  # type: ignore[no-untyped-def]
    """Fill in the loss of each token and, unless dh is None, its gradient."""
    log_sum = torch.full((len(x),), -torch.inf, device=x.device)  # without the label
    label_logits = torch.zeros(len(x), device=x.device)
    mean = None if dh is None else torch.zeros(x.shape, device=x.device)
    buffer = None
    for columns, weight in expanded_rows(head.weight, x.dtype, chunk_bytes // (x.element_size() * len(x))):
        # the first piece is the largest, so its memory serves all
        buffer = x.new_empty(len(x) * len(weight)) if buffer is None else buffer
        logits = head.product(x, columns, weight, out=buffer[: len(x) * len(weight)].view(len(x), -1))
        column = targets - columns.start
        inside = (column >= 0) & (column < len(weight))
        column.clamp_(0, len(weight) - 1)
        piece = _softmax_in_place(logits, column, inside, label_logits, head.softcap, chunk_bytes)
        joint = torch.logaddexp(log_sum, piece)
        if mean is not None:
            before, now = (log_sum - joint).exp_()[:, None], (piece - joint).exp_()[:, None]
            mean.mul_(before).addcmul_(logits @ weight, now)
            dh[inside] = weight[column[inside]]
        log_sum = joint
    losses.copy_(torch.nn.functional.softplus(log_sum - label_logits))
    if mean is not None:
        slope = 1.0 if head.softcap is None else 1 - (label_logits / head.softcap).square_()[:, None]
        dh.copy_(mean.sub_(slope * dh).mul_(torch.sigmoid(log_sum - label_logits)[:, None]))


def _softmax_in_place(logits, column, inside, label_logits, softcap, chunk_bytes):  # type: ignore[no-untyped-def]
    """Turn the logits of a piece into their softmax without the label, times cap'.

    Works in float32, on a strip of tokens at a time. Writes the label's logit to label_logits where
    the label is inside the piece. Returns the log-sum-exp of each token.
    """
    # Half of the budget: strips that fit a core's cache are no faster. They are much slower where
    # another process uses one of the cores, since each short operation then waits for it.
    step = max(chunk_bytes // ((8 if softcap is None else 24) * logits.shape[1]), 1)
    sums = torch.empty(len(logits), device=logits.device)
    tensors = (logits, column[:, None], inside[:, None], label_logits, sums)
    for strip, place, among, label, log_sum in zip(*(x.split(step) for x in tensors), strict=True):
        wide = strip.float()
        if softcap is not None:
            slope = wide.div_(softcap).tanh_().square().neg_().add_(1)
            wide.mul_(softcap)
        at_place = wide.gather(-1, place)
        label.copy_(torch.where(among, at_place, label[:, None])[:, 0])
        wide.scatter_(-1, place, torch.where(among, NEVER, at_place))
        highest = wide.amax(-1)
        torch.softmax(wide, -1, out=wide)
        torch.sub(highest, wide.amax(-1).log_(), out=log_sum)
        strip.copy_(wide if softcap is None else wide.mul_(slope))
    return sums
