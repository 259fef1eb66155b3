"""Greedy decoding of completions in batches, with the keys and values of earlier tokens kept."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from edge_runtime.trainer.meter import release
from edge_runtime.trainer.micro_batch import padded_length
from edge_runtime.trainer.vocabulary import language_head, sweep


class Written(NamedTuple):
    """A completion that the model ended by itself."""

    prompt: int  # its number
    ids: list[int]  # token ids, without the end
    confidence: float  # geometric mean of the probabilities of the tokens and the end


@torch.no_grad()
def write(
    model: PreTrainedModel,
    prompts: list[list[int]],
    ends: list[int],
    most_tokens: int,
    micro_rows: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Written]:
    """Complete prompts.

    Args:
        prompts: token ids, at least one each.
        ends: tokens that end a completion.
        most_tokens: longest completion with its end; a longer one is left out.
        micro_rows: prompts at once.
        progress: called after each batch with the prompts completed so far.

    Returns:
        The completions in the order of their prompts.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    completions = []
    for first in range(0, len(order), micro_rows):
        numbers = order[first : first + micro_rows]
        tokens, log_p = _batch(model, [prompts[number] for number in numbers], ends, most_tokens)
        for number, ids, logs in zip(numbers, tokens.tolist(), log_p, strict=True):
            length = next((at for at, token in enumerate(ids) if token in ends), 0)
            if length:
                completions.append(Written(number, ids[:length], float(logs[: length + 1].mean().exp())))
        progress(first + len(numbers))
    return sorted(completions)


def _batch(
    model: PreTrainedModel, prompts: list[list[int]], ends: list[int], most_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after each prompt and their log-probabilities (rows, tokens), until all have ended."""
    head = language_head(model)
    device = head.weight.device
    pads = [padded_length(max(map(len, prompts))) - len(prompt) for prompt in prompts]
    # padded on the left, so that the next token follows every prompt at one position
    ids = torch.tensor(
        [[ends[0]] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)], device=device
    )
    mask = torch.tensor(
        [[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)], device=device
    )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    tokens: list[torch.Tensor] = []
    log_p: list[torch.Tensor] = []
    end_tokens = torch.tensor(ends, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while len(tokens) < most_tokens and not ended.all():
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        scores = sweep(hidden, head)
        tokens.append(scores.likely)
        log_p.append(scores.best - scores.log_sum)
        ended |= torch.isin(scores.likely, end_tokens)
        ids, positions = scores.likely[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    release()
    return torch.stack(tokens, 1), torch.stack(log_p, 1)
