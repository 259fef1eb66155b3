"""What a model itself writes after prompts: greedy decoding in batches, with the keys and values of earlier tokens kept."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from edge_runtime.planning.predict import LENGTH_STEP
from edge_runtime.trainer.evaluate import sweep
from edge_runtime.trainer.meter import release
from edge_runtime.trainer.step import head


class Written(NamedTuple):
    """prompt: its number. ids: of the completion, without its end. confidence: the geometric mean of their probabilities and the
    end's."""

    prompt: int
    ids: list[int]
    confidence: float


@torch.no_grad()
def write(
    model: PreTrainedModel,
    prompts: list[list[int]],
    ends: list[int],
    most_tokens: int,
    micro_rows: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Written]:
    """Complete the prompts that the model ends within most_tokens, the end among them.

    Args:
        prompts: token ids, at least one each. ends: tokens that end a completion.
        micro_rows: prompts at once. progress: told after each batch how many are done.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found = []
    for first in range(0, len(order), micro_rows):
        numbers = order[first : first + micro_rows]
        tokens, log_p = _batch(model, [prompts[number] for number in numbers], ends, most_tokens)
        for number, ids, logs in zip(numbers, tokens.tolist(), log_p, strict=True):
            length = next((at for at, token in enumerate(ids) if token in ends), 0)
            if length:
                found.append(Written(number, ids[:length], float(logs[: length + 1].mean().exp())))
        progress(first + len(numbers))
    return sorted(found)


def _batch(
    model: PreTrainedModel, prompts: list[list[int]], ends: list[int], most_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens after each prompt and their log-probabilities (rows, tokens), until all have ended."""
    weight, softcap = head(model)
    longest = -(-max(map(len, prompts)) // LENGTH_STEP) * LENGTH_STEP
    ids = torch.tensor(
        [[ends[0]] * (longest - len(prompt)) + prompt for prompt in prompts], device=weight.device
    )
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=weight.device
    )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    tokens: list[torch.Tensor] = []
    log_p: list[torch.Tensor] = []
    last = torch.tensor(ends, device=weight.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=weight.device)
    while len(tokens) < most_tokens and not ended.all():
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        swept = sweep(hidden, weight, softcap)
        tokens.append(swept.likely)
        log_p.append(swept.best - swept.log_sum)
        ended |= torch.isin(swept.likely, last)
        ids, positions = swept.likely[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    release()
    return torch.stack(tokens, 1), torch.stack(log_p, 1)
