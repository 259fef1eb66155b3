"""Last hidden states of rows and of public texts, and how much a text is like a device's own rows."""

import torch

from edge_runtime.planning.stages import MOST_ROWS
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.examples import Example, Examples, batches
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.objectives import hidden_states, label_states
from edge_runtime.trainer.vocabulary import language_head


def sample(examples: Examples) -> list[Example]:
    """The examples of the rows that are compared with public texts; of one row if none of these has one."""
    places = [place for number in sampled(examples.count) if (place := examples.place(number)) is not None]
    return [examples[place] for place in places or [0]]


def sampled(count: int) -> range:
    """The numbers of the rows that are compared with public texts, of so many: MOST_ROWS, evenly spaced."""
    return range(0, count, -(-count // MOST_ROWS) or 1)


@torch.no_grad()
def last_states(base: Base, examples: list[Example]) -> torch.Tensor:
    """The last token's hidden state of each: (examples, hidden) in float32, of equal length."""
    model, device = base.model, language_head(base.model).weight.device
    last = torch.empty(len(examples), model.config.get_text_config().hidden_size, device=device)
    numbered = [example._replace(answer=number) for number, example in enumerate(examples)]
    for batch in batches(numbered, base.plan.rows):
        last[[row.answer or 0 for row in batch]] = label_states(batch, hidden_states(model, batch)[0])
        release()
    return last


def likeness(own_states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """How much texts are like own rows: the root of a conformal p-value (texts,), at most 1.

    The p-value is the share of own rows whose nearest other row is no nearer than the text's
    nearest row, by cosine. Both arguments are (rows, hidden), of equal length each.

    Source: Vovk et al. 2005, Algorithmic Learning in a Random World, with the distance to the
    nearest neighbour.
    """
    among = (own_states @ own_states.T).fill_diagonal_(-torch.inf).amax(1)
    nearest = (texts @ own_states.T).amax(1)
    return (((among[None] <= nearest[:, None]).sum(1) + 1) / (len(own_states) + 1)).sqrt()
