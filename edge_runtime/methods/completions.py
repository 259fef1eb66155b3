"""codistill where the answer is text: devices say how they would complete public prompts, and how sure they are.

    v_k(a) = s_k(a) · exp(mean log-probability of the completion's tokens, its end among them), of device k's greedy completion
    votes(c | a) = Σ_k n_k v_k(a) where k's completion is c        e(a) = votes of the best / Σ_k n_k, 0 to 1
    loss of a device = own rows + weight · ramp · mean over the prompts of e(a) · loss on the best completion

s and ramp are those of codistill.py. Completions travel as text, so models of any two tokenizers can meet. What did not end
within the fleet's length, or is nothing, is no completion. The node goes through the updates twice, first for CANDIDATES of each
prompt, among which is every completion with more than a fifth of the votes, then to count theirs: its memory does not grow with
the number of devices.
The method is ours; that a student learns a teacher's best sequence in place of its distribution is sequence-level distillation,
Kim & Rush 2016 (arXiv 1606.07947); the candidates are those of Misra & Gries 1982.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from edge_runtime.methods.interface import Method
from edge_runtime.protocol.completion import Completion
from edge_runtime.settings import Codistill

CANDIDATES = 4  # of a prompt


def agreed(said: Callable[[], Iterable[tuple[int, Sequence[Completion]]]]) -> list[Completion]:
    """The best completion of each prompt, with its e as its confidence, of what devices of so many rows said."""
    frequent: dict[int, dict[str, float]] = defaultdict(dict)
    samples = 0
    for rows, completions in said():
        samples += rows
        for one in completions:
            _count(frequent[one.prompt], one.text, rows * one.confidence)
    votes = {prompt: dict.fromkeys(candidates, 0.0) for prompt, candidates in frequent.items()}
    for rows, completions in said():
        for one in completions:
            if one.text in votes[one.prompt]:
                votes[one.prompt][one.text] += rows * one.confidence
    best = {
        prompt: max(texts.items(), key=lambda item: (item[1], item[0]))
        for prompt, texts in votes.items()
        if texts
    }
    return [Completion(prompt, text, weight / samples) for prompt, (text, weight) in sorted(best.items())]


def _count(candidates: dict[str, float], text: str, weight: float) -> None:
    """Keep CANDIDATES texts: where there is no room, all of them lose what the least of them and the new one has."""
    if text in candidates or len(candidates) < CANDIDATES:
        candidates[text] = candidates.get(text, 0.0) + weight
        return
    least = min(weight, *candidates.values())
    for other in list(candidates):
        candidates[other] -= least
        if candidates[other] <= 0:
            del candidates[other]
    if weight > least:
        candidates[text] = weight - least


def added(method: Method, spec: Codistill) -> Method:
    """The method with completions beside what it exchanges."""
    return method._replace(completions="fleet" if spec.across else "class")
