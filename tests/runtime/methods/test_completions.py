"""How devices complete public prompts: greedy decoding, what the node makes of it, and what a device learns from it."""

import types

import msgspec
import numpy as np
import pytest
import torch
from edge_kernels import LanguageHead, apply, expand, pack
from jobs import job_of

from edge_runtime import methods, settings
from edge_runtime.aggregator import check, merge
from edge_runtime.errors import InputError
from edge_runtime.methods import completions
from edge_runtime.models import structure
from edge_runtime.protocol import codec, completion
from edge_runtime.protocol.completion import Completion
from edge_runtime.protocol.payload import SECTIONS, Header, assemble
from edge_runtime.trainer import completions as public_texts
from edge_runtime.trainer import data
from edge_runtime.trainer.ends import answer_ends
from edge_runtime.trainer.examples import IGNORED, Example, in_shares
from edge_runtime.trainer.tokens import Asked, Tokenization
from edge_runtime.trainer.vocabulary import sweep

SPEC = settings.Codistill(tokens=8)
FLEET = settings.Fleet(
    "f",
    (settings.Model("m"),),
    adapter=settings.Adapter(rank=2),
    public=settings.Public("public.jsonl", 5),
    codistill=SPEC,
)
A = {"layers.0.q.A": np.ones((2, 4), np.float32)}


def payload(tensors, said=()):
    return codec.encode(tensors, completion.encode(said))


def completions_of(payload):
    return completion.decode(codec.answers(payload))


# --- greedy decoding


def by_hand(model, prompt, most):
    """Tokens and log-probabilities after one prompt, one token after another, the whole text again each time."""
    ids, logs = list(prompt), []
    for _ in range(most):
        row = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        ids.append(int(row.argmax()))
        logs.append(float(row.max()))
    return ids[len(prompt) :], logs


@pytest.mark.parametrize(
    ("family", "changes"),
    [(name, {}) for name in ("llama", "qwen2", "gemma3_text", "phi", "phi3", "gpt2")]
    + [("gemma3_text", {"sliding_window": 8})],
)
@torch.no_grad()
def test_a_batch_is_completed_as_each_prompt_alone(tiny, family, changes):
    model = tiny(family, **changes)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, 96, length).tolist() for length in (1, 9, 5, 16, 17, 3, 20)]
    alone = [by_hand(model, prompt, 6) for prompt in prompts]
    end = next(ids[at] for ids, _ in alone for at in range(5, 0, -1) if ids[at] not in ids[:at])
    wanted = {}
    for number, (ids, logs) in enumerate(alone):
        if end in ids[1:] and ids[0] != end:
            length = ids.index(end)
            wanted[number] = ids[:length], float(np.exp(np.mean(logs[: length + 1])))
    apply(model, structure.modules(model))
    found = public_texts.write(model, dict(enumerate(prompts)), [end], 6, 3, lambda _: None)
    assert wanted and {one.prompt: one.ids for one in found} == {
        number: ids for number, (ids, _) in wanted.items()
    }
    assert [one.confidence for one in found] == pytest.approx(
        [wanted[one.prompt][1] for one in found], rel=1e-3
    )


@torch.no_grad()
def test_completions_are_those_of_transformers_where_the_head_has_a_bias(tiny):
    """One prompt after another, as padding has no part in this."""
    model = tiny("phi")
    model.lm_head.bias.normal_(0, 2.0)
    prompts = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    config = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def theirs():
        return [model.generate(prompt[None], **config)[0, 12:].tolist() for prompt in prompts]

    wanted = theirs()
    apply(model, structure.modules(model))
    tokens = [public_texts._batch(model, [prompt.tolist()], [0], 6)[0][0].tolist() for prompt in prompts]
    assert tokens == wanted
    model.lm_head.bias.zero_()
    assert theirs() != wanted  # the bias decides


@pytest.mark.parametrize("bias", [None, 3 * torch.randn(300, generator=torch.Generator().manual_seed(1))])
def test_a_packed_head_is_swept_as_its_own_values_are(bias):
    draw = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(300, 64, generator=draw), torch.randn(5, 64, generator=draw)
    packed = pack(weight, "q8_0")
    targets = torch.tensor([0, 7, 299, 3, 150])
    found = sweep(hidden, LanguageHead(packed, bias), targets)
    logits = torch.nn.functional.linear(hidden, expand(packed, torch.float32), bias)
    assert torch.equal(found.likely, logits.argmax(-1))
    torch.testing.assert_close(found.log_sum, logits.logsumexp(-1))
    torch.testing.assert_close(found.best, logits.max(-1).values)
    torch.testing.assert_close(found.target, logits.gather(1, targets[:, None])[:, 0])


def test_what_comes_before_the_first_learned_token_is_a_rows_prompt():
    assert public_texts.prompt_of(Example([1, 2, 3, 4], [IGNORED, IGNORED, 3, 4])) == Example([1, 2], [], 0)
    assert public_texts.prompt_of(Example([1, 2, 3], [1, 2, 3])) == Example(
        [1, 2], [], 0
    )  # without the end, which no prompt has
    assert public_texts.prompt_of(Example([1], [1])) == Example([1], [], 0)


def test_of_public_messages_the_last_turn_alone_is_learned():
    turns = Example([1, 2, 3, 4, 5, 6], [IGNORED, 2, IGNORED, IGNORED, 5, 6])
    assert public_texts.last_turn(turns).labels == [IGNORED] * 4 + [5, 6]
    assert public_texts.last_turn(Example([1, 2], [IGNORED, 2])).labels == [IGNORED, 2]
    followed = Example([1, 2, 3, 4, 5], [IGNORED, 2, IGNORED, 4, IGNORED])  # by a line break of the template
    assert public_texts.last_turn(followed).labels == [IGNORED, IGNORED, IGNORED, 4, IGNORED]
    assert public_texts.last_turn(Example([1, 2], [1, 2])).labels == [1, 2]


def test_what_is_learned_of_completions_weighs_by_the_prompts_that_have_one(tmp_path):
    """Of four prompts this model can be asked three, and its chat template refuses one of these with its completion."""
    said = [Completion(n, f" {n}", confidence) for n, confidence in enumerate((0.9, 0.3, 1.0, 1.0))]
    (tmp_path / "start").write_bytes(payload({}, said))
    distils = settings.Codistill(rows=10, weight=3.0)
    job = job_of(
        train=True,
        round=2,
        rounds=3,
        public=settings.Public("", 4),
        codistill=distils,
        facts=None,
        plan=None,
        depths=(),
        data="",
        evaluation={},
        start=(str(tmp_path / "start"),),
    )
    prompts = [{"text": f"{number}"} for number in range(4)]

    class How:
        def example(self, row):
            if row["completion"] == " 2":
                raise InputError("the chat template refuses it")
            return Example([1, int(row["prompt"])], [IGNORED, 2])

    lesson = public_texts.agreed(job, prompts, {0, 1, 2}, How())
    ramp = np.exp(-5 / 4)
    assert [text.ids[1] for text in lesson.texts] == [0, 1]
    assert lesson.shares == pytest.approx([0.9 * ramp, 0.3 * ramp], rel=1e-4)
    assert lesson.weight == 3.0 / 2 and lesson.rows == round(10 / 2 * ramp) and lesson.targets is None


class Words:
    """A tokenizer whose texts begin without their leading space, as some do."""

    def decode(self, ids, **_):
        return " ".join(f"w{number}" for number in ids)


def test_a_completion_keeps_the_space_before_it():
    written = [public_texts.Written(0, [7, 8], 0.5)]
    assert public_texts.as_text(written, [Asked([3, 4], "")], Words()) == [Completion(0, " w7 w8", 0.5)]


def test_a_completion_is_the_text_that_a_server_would_answer(demo_tokenizer):
    """Special tokens inside it are no text, which another device would take for tokens of its own."""
    ids = demo_tokenizer(" yes<|im_start|> no", add_special_tokens=False).input_ids
    assert demo_tokenizer.convert_tokens_to_ids("<|im_start|>") in ids
    written = [public_texts.Written(0, ids, 0.5)]
    asked = {0: Asked(demo_tokenizer("Say:").input_ids, "")}
    assert public_texts.as_text(written, asked, demo_tokenizer) == [Completion(0, " yes no", 0.5)]


# --- a real trainer

WORDS = ("red", "green", "blue")
ROWS = [{"prompt": f"{word} {n}:", "completion": f" {word}"} for n in range(6) for word in WORDS[:2]]
HELD_OUT = [{"prompt": f"{word} {n}:", "completion": f" {word}"} for n in range(6, 9) for word in WORDS]
PUBLIC = [{"text": f"{word} {n}:"} for n in range(10, 14) for word in WORDS]
CODISTILL = {
    "public": settings.Public("", len(PUBLIC)),
    "codistill": settings.Codistill(rows=6, tokens=8),
}
TRAINING = settings.Training(steps=60, rows_a_step=8, learning_rate=2e-2, max_tokens=32)


def right(row):
    return f" {row['text'].split()[0]}"


def test_a_device_says_how_it_completes_public_prompts(trained, tmp_path):
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC))
    fleet = {"method": settings.MethodChoice("local"), **CODISTILL, "round": 2, "rounds": 3}
    folder, result = trained("says", ROWS, HELD_OUT, texts=texts, training=TRAINING, **fleet)
    said = {one.prompt: one for one in completions_of((folder / "payload.bin").read_bytes())}
    known = [number for number, row in enumerate(PUBLIC) if "blue" not in row["text"]]
    assert result.losses[-1] < result.losses[0]
    assert [said[number].text for number in known] == [right(PUBLIC[number]) for number in known]
    assert all(0 < one.confidence <= 1 for one in said.values())
    assert codec.shapes((folder / "payload.bin").read_bytes()) == {}  # nothing else leaves with `local`


def test_a_device_that_ends_no_completion_takes_part_with_nothing(trained, tmp_path):
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC))
    training = msgspec.structs.replace(TRAINING, steps=1, learning_rate=1e-6)
    common = {
        "method": settings.MethodChoice("local"),
        **CODISTILL,
        "texts": texts,
        "training": training,
    }
    folder, result = trained("silent", ROWS, HELD_OUT, **common)
    assert result.payload_bytes > 0 and completions_of((folder / "payload.bin").read_bytes()) == []


def test_prompts_that_a_model_cannot_be_asked_are_left_out(trained, tmp_path):
    """The tiny model's tokenizer has a chat template that wants users and assistants to take turns."""
    turns = [{"role": role, "content": "red 11:"} for role in ("tool", "nobody")]
    rows = [{"messages": turns}, *PUBLIC[1:]]
    texts = str(data.write_rows(tmp_path / "public.jsonl", rows))
    fleet = {"method": settings.MethodChoice("local"), **CODISTILL, "rounds": 3, "round": 2}
    folder, _ = trained("asked", ROWS, HELD_OUT, texts=texts, training=TRAINING, **fleet)
    assert completions_of((folder / "payload.bin").read_bytes())


def test_an_answer_is_learned_from_what_the_fleet_says_of_public_prompts(trained, tmp_path):
    """With completions that are right about blue the device that never saw it writes it; without them it cannot."""
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC))
    told = [Completion(number, right(row), 0.5) for number, row in enumerate(PUBLIC)]
    (tmp_path / "start").write_bytes(payload({}, told))
    fleet = {"method": settings.MethodChoice("local"), **CODISTILL, "round": 2, "rounds": 2}
    common = {**fleet, "texts": texts, "training": TRAINING}
    accuracy = {}
    for name, start in (("taught", {"start": (str(tmp_path / "start"),)}), ("alone", {})):
        folder, _ = trained(name, ROWS, HELD_OUT, **common, **start)
        private = str(folder / "state.bin")
        _, after = trained(f"{name} after", ROWS, HELD_OUT, train=False, private=private, **common, **start)
        accuracy[name] = after.evaluation["all"].accuracy
    assert accuracy["alone"] <= 2 / 3 < accuracy["taught"]


def test_messages_are_asked_and_answered_in_the_models_own_template(demo_facts, demo_tokenizer):
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    how = Tokenization(demo_tokenizer, len(demo_tokenizer), 512)
    ids, _ = how.asked({"messages": turns})
    row = public_texts.completed({"messages": turns}, "Paris")
    learned = how.example(row)
    assert learned.ids[: len(ids)] == ids and set(learned.labels[: len(ids)]) == {IGNORED}
    answer = demo_tokenizer("Paris", add_special_tokens=False).input_ids
    assert learned.ids[len(ids) :][: len(answer)] == answer
    assert learned.ids[len(ids) + len(answer)] in answer_ends(demo_facts, demo_tokenizer)
    assert how.asked({"text": "hi"}) == (demo_tokenizer("hi").input_ids, "")
    assert public_texts.completed({"text": "hi"}, " there") == {"prompt": "hi", "completion": " there"}


# --- the node


def agreed(devices):
    """What the node makes of pairs of a device's rows and its completions."""
    return completion.decode(
        completions.merged(lambda: [(rows, completion.encode(said)) for rows, said in devices])
    )


def test_votes_are_rows_times_confidence_and_the_best_counts_by_its_share_of_all_rows():
    devices = [
        (100, [Completion(0, "red", 0.5), Completion(3, "x", 0.1)]),
        (60, [Completion(0, "blue", 0.9)]),
        (40, [Completion(0, "red", 0.2)]),
    ]
    found = agreed(devices)
    assert found == [
        Completion(0, "red", pytest.approx(58 / 200)),
        Completion(3, "x", pytest.approx(10 / 200)),
    ]


def test_equal_devices_agree_on_what_each_of_them_says_and_order_does_not_matter():
    said = [Completion(n, f"answer {n}", 0.25 + n / 10) for n in range(4)]
    alike = [msgspec.structs.replace(one, confidence=pytest.approx(one.confidence)) for one in said]
    assert agreed([(7, said)] * 3) == alike
    tied = [(1, [Completion(0, "b", 0.5)]), (1, [Completion(0, "a", 0.5)])]
    assert agreed(tied) == agreed(tied[::-1])


@pytest.mark.parametrize("order", [1, -1])
def test_the_node_holds_a_few_candidates_and_finds_what_many_say_whatever_the_order(order, monkeypatch):
    """Four sure devices that differ, a hundred less sure ones that agree, and a hundred that agree with nobody."""
    sure = [(1, [Completion(0, f"sure {n}", 0.9)]) for n in range(4)]
    many, noise = (
        [(1, [Completion(0, "x", 0.3)])] * 100,
        [(1, [Completion(0, f"{n}", 0.1)]) for n in range(100)],
    )
    held, count = [], completions._count
    monkeypatch.setattr(completions, "_count", lambda *each: (count(*each), held.append(len(each[0]))))
    devices = [*sure, *many, *noise][::order]
    assert agreed(devices) == [Completion(0, "x", pytest.approx(30 / 204))]
    assert len(held) == 204 and max(held) == completions.CANDIDATES


def test_nothing_said_is_nothing_agreed():
    assert agreed([]) == agreed([(10, [])]) == []


def update(path, model_class, tensors, said=(), samples=10):
    path.write_bytes(payload(tensors, said))
    return types.SimpleNamespace(
        manifest=types.SimpleNamespace(model_class=model_class, samples=samples), payload=path
    )


@pytest.mark.parametrize("name", ["local", "fedit", "fedadapter"])
@pytest.mark.parametrize("across", [True, False])
def test_completions_cross_models_or_stay_in_the_class(tmp_path, across, name):
    codistill = msgspec.structs.replace(SPEC, across=across)
    fleet = msgspec.structs.replace(FLEET, codistill=codistill, method=settings.MethodChoice(name))
    method = methods.of(fleet)
    assert method.exchanges
    tensors = {} if name == "local" else {"layers.0.q.B": np.ones((8, 2), np.float32)}
    updates = [
        update(tmp_path / "1", "m@1", tensors, [Completion(0, "red", 0.9)]),
        update(
            tmp_path / "2",
            "n@1",
            tensors,
            [Completion(0, "blue", 0.5), Completion(4, "é\n", 0.5)],
            samples=30,
        ),
    ]
    versions = {one.model_class: one for one in merge.merge(updates, {}, fleet, method, 1, tmp_path / "v")}
    told = {of: completions_of(version.artifact.read_bytes()) for of, version in versions.items()}
    if across:
        agreed = [Completion(0, "blue", 15 / 40), Completion(4, "é\n", 15 / 40)]
        assert told == {"m@1": agreed, "n@1": agreed, "*": agreed}
    else:
        assert told == {
            "m@1": [Completion(0, "red", 0.9)],
            "n@1": [Completion(0, "blue", 0.5), Completion(4, "é\n", 0.5)],
        }
    later = [update(tmp_path / "3", "n@1", tensors, [Completion(1, "new", 1.0)])]
    after = {one.model_class: one for one in merge.merge(later, versions, fleet, method, 2, tmp_path / "v")}
    assert completions_of(after["n@1"].artifact.read_bytes()) == [Completion(1, "new", 1.0)]
    if across:  # who was not there hears what the others say now
        assert completions_of(after["m@1"].artifact.read_bytes()) == [Completion(1, "new", 1.0)]
    elif name == "fedadapter":  # a core has crossed, so there is a new version
        assert completions_of(after["m@1"].artifact.read_bytes()) == [Completion(0, "red", 0.9)]
    else:
        assert "m@1" not in after


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([Completion(5, "a", 0.5)], "completes prompt 5, which"),
        ([Completion(-1, "a", 0.5)], "completes prompt -1, which"),
        ([Completion(1, "a", 0.5), Completion(1, "b", 0.5)], "completes prompt 1, which"),
        ([Completion(1, " ", 0.5)], "prompt 1 has 1 characters"),
        ([Completion(1, "a" * 257, 0.5)], "prompt 1 has 257 characters, but has to have 1 to 256"),
        ([Completion(1, "a", 1.5)], "is 1.5, not 0 to 1"),
        ([Completion(1, "a", -0.1)], "is -0.1, not 0 to 1"),
    ],
)
def test_what_completes_no_prompt_of_the_fleet_is_refused(said, reason):
    with pytest.raises(InputError, match=reason):
        check.check(payload(A, said), {}, FLEET, methods.of(FLEET))


def test_a_fleet_that_exchanges_no_completions_refuses_them_and_an_empty_delta():
    plain = msgspec.structs.replace(FLEET, codistill=None, public=None)
    headed = msgspec.structs.replace(FLEET, head=settings.Head())
    for fleet in (plain, headed):
        with pytest.raises(InputError, match="which this fleet does not exchange"):
            check.check(payload(A, [Completion(1, "a", 0.5)]), {}, fleet, methods.of(fleet))
    with pytest.raises(InputError, match="holds no factor"):
        check.check(codec.encode({}), {}, plain, methods.of(plain))
    assert (
        check.check(codec.encode({}), {}, FLEET, methods.of(FLEET)) == {}
    )  # a device that has nothing to say yet


# --- the codec


def test_completions_travel_as_they_are_beside_the_tensors():
    said = [Completion(0, "blå\t\u2028", 0.125), Completion(2, "x", 1.0)]
    made = payload(A, said)
    assert completions_of(made) == said
    np.testing.assert_array_equal(
        codec.decode(made)["layers.0.q.A"], codec.decode(codec.encode(A))["layers.0.q.A"]
    )
    assert completions_of(payload(A)) == []
    for length in range(len(made)):
        with pytest.raises(InputError):
            completions_of(made[:length])


def test_more_completions_than_a_payload_may_hold_are_not_sent():
    with pytest.raises(InputError, match="completions take"):
        payload({}, [Completion(n, "\x01" * 4096, 0.5) for n in range(700)])


def test_all_that_a_fleet_may_agree_on_fits_a_payload():
    longest = completions.CHARACTERS_A_TOKEN * 32
    worst = [Completion(n, "\x01" * longest, 0.123456789) for n in range(settings.MOST_TOKENS // 32)]
    assert len(completions_of(payload({}, worst))) == len(worst)


NESTED = b'[[0, "a", 0.5, ' + b"[" * 100_000 + b"]" * 100_000 + b"]]"


@pytest.mark.parametrize("body", [b"nonsense", b'[[0, "a"]]', b'[["x", "a", 0.5]]', b"\xff\xff", NESTED])
def test_completions_that_cannot_be_read_are_refused(body):
    with pytest.raises(InputError, match="completions cannot be read"):
        completions_of(codec.encode({}, body))


@pytest.mark.parametrize("length", [(1 << 24) + 1, 1 << 40])
def test_a_length_of_completions_that_cannot_be_is_refused_before_anything_is_expanded(length):
    made = assemble(Header({}, completions_bytes=length), [b""] * SECTIONS)
    for read in (codec.decode, codec.answers):
        with pytest.raises(InputError, match=f"declares {length} bytes of completions"):
            read(made)


# --- texts in shares


def test_texts_come_in_proportion_to_what_they_count():
    texts = [Example([n], []) for n in range(6)]
    shares = [1.0, 0.5, 0.25, 0.0, 1.0, 0.01]
    drawn = in_shares(texts, shares, "seed")
    seen = [next(drawn).ids[0] for _ in range(2760)]
    counts = np.bincount(seen, minlength=6)
    np.testing.assert_allclose(counts / 1000, shares, atol=0.01)
    gaps = np.diff([at for at, number in enumerate(seen) if number == 1])
    assert gaps.max() <= 16  # in every second pass, of four to six texts each
