"""codistill where the answer is text: devices complete public prompts, and say how sure they are.

    v_k(a) = s_k(a) · exp(mean log-probability of the tokens of k's greedy completion and its end)
    votes(c | a) = Σ_k n_k v_k(a) over the devices k whose completion is c
    e(a) = highest votes / Σ_k n_k, 0 to 1
    loss of a device = own rows + weight · ramp · mean over the prompts of e(a) · loss on the best

s and ramp are those of codistill.py. Completions travel as text, so models of any two tokenizers
understand each other. A completion that is empty, or did not end within the fleet's length, does
not count. The node reads the updates twice: the first pass finds CANDIDATES of each prompt, among
which is every completion with more than a fifth of the votes; the second pass counts the
candidates' votes. Memory does not grow with the number of devices.
Source: the method is ours; a student that learns a teacher's best sequence instead of its
distribution is sequence-level distillation, Kim & Rush 2016, arXiv 1606.07947; the candidates are
those of Misra & Gries 1982.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Method, PublicAnswers
from edge_runtime.protocol import completion
from edge_runtime.protocol.completion import Completion
from edge_runtime.settings import Codistill, Public

CANDIDATES = 4  # of a prompt
CHARACTERS_A_TOKEN = 32  # at most


def added(method: Method, public: Public, spec: Codistill) -> Method:
    """The method with completions beside its own exchange."""
    answers = PublicAnswers("fleet" if spec.across else "class", partial(check, public, spec), merged)
    return method._replace(answers=answers)


def check(public: Public, spec: Codistill, payload: bytes) -> None:
    """Refuse a device's completions.

    Raises:
        InputError: a completion is of no prompt of this fleet, repeats a prompt, or has a text or
            confidence out of range.
    """
    prompts: set[int] = set()
    longest = CHARACTERS_A_TOKEN * spec.tokens
    for answer in completion.decode(payload):
        if not 0 <= answer.prompt < public.texts or answer.prompt in prompts:
            raise InputError(
                f"the delta completes prompt {answer.prompt}, which it has completed or this fleet does not have"
            )
        if not answer.text.strip() or len(answer.text) > longest:
            raise InputError(
                f"the completion of prompt {answer.prompt} has {len(answer.text)} characters, "
                f"but has to have 1 to {longest}"
            )
        if not 0 <= answer.confidence <= 1:
            raise InputError(
                f"the confidence in the completion of prompt {answer.prompt} is {answer.confidence}, not 0 to 1"
            )
        prompts.add(answer.prompt)


def merged(devices: Callable[[], Iterable[tuple[int, bytes]]]) -> bytes:
    """The best completion of each prompt, of pairs of a device's rows and encoded completions."""
    # the first pass: completions that may have the most votes
    candidates: dict[int, dict[str, float]] = defaultdict(dict)
    samples = 0
    for rows, payload in devices():
        samples += rows
        for answer in completion.decode(payload):
            _count(candidates[answer.prompt], answer.text, rows * answer.confidence)
    # the second pass: the candidates' exact votes, as Misra-Gries counts too few
    votes = {prompt: dict.fromkeys(texts, 0.0) for prompt, texts in candidates.items()}
    for rows, payload in devices():
        for answer in completion.decode(payload):
            if answer.text in votes[answer.prompt]:
                votes[answer.prompt][answer.text] += rows * answer.confidence
    best = []
    for prompt, texts in sorted(votes.items()):
        if texts:
            text, weight = max(texts.items(), key=lambda item: (item[1], item[0]))
            best.append(Completion(prompt, text, weight / samples))
    return completion.encode(best)


def _count(candidates: dict[str, float], text: str, weight: float) -> None:
    """Count a vote for one of CANDIDATES texts (Misra-Gries)."""
    if text in candidates or len(candidates) < CANDIDATES:
        candidates[text] = candidates.get(text, 0.0) + weight
        return
    least = min(weight, *candidates.values())
    for candidate in list(candidates):
        candidates[candidate] -= least
        if candidates[candidate] <= 0:
            del candidates[candidate]
    if weight > least:
        candidates[text] = weight - least
