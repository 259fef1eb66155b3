"""codistill where the answer is text: devices say how they would complete public prompts, and how sure they are.

    v_k(a) = s_k(a) · exp(mean log-probability of the completion's tokens, its end among them), of device k's greedy completion
    votes(c | a) = Σ_k n_k v_k(a) where k's completion is c        e(a) = votes of the best / Σ_k n_k, 0 to 1
    loss of a device = own rows + weight · ramp · mean over the prompts of e(a) · loss on the best completion

s and ramp are those of codistill.py. Completions travel as text, so models of any two tokenizers can meet. What did not end
within the fleet's length, or is nothing, is no completion. Where more than CANDIDATES differ, the node keeps those with the
most votes so far: its memory does not grow with the number of devices.
The method is ours; that a student learns a teacher's best sequence in place of its distribution is sequence-level distillation,
Kim & Rush 2016 (arXiv 1606.07947).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from edge_runtime.methods.interface import Completion, Method
from edge_runtime.settings import Codistill

CANDIDATES = 4  # of a prompt


def agreed(said: Iterable[tuple[int, Sequence[Completion]]]) -> list[Completion]:
    """The best completion of each prompt, with its e as its confidence, of what devices of so many rows said."""
    votes: dict[int, dict[str, float]] = defaultdict(dict)
    samples = 0
    for rows, completions in said:
        samples += rows
        for one in completions:
            candidates = votes[one.prompt]
            candidates[one.text] = candidates.get(one.text, 0.0) + rows * one.confidence
            if len(candidates) > CANDIDATES:
                del candidates[min(candidates, key=lambda text: candidates[text])]
    best = {prompt: max(texts.items(), key=lambda item: (item[1], item[0])) for prompt, texts in votes.items()}
    return [Completion(prompt, text, weight / samples) for prompt, (text, weight) in sorted(best.items())]


def added(method: Method, spec: Codistill) -> Method:
    """The method with completions beside what it exchanges."""
    return method._replace(completions="fleet" if spec.across else "class")
