"""Conversations: labels lie in the assistant's turns of the whole rendering, or the template is refused."""

import pytest
import small_tokenizers

from edge_runtime.errors import InputError
from edge_runtime.trainer.examples import IGNORED
from edge_runtime.trainer.tokens import Tokenization

ASK = "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
TURN = "<|s|>{{ m.role }}\n"
LOOP, END = "{% for m in messages %}", "{% endfor %}"
SHORT = "{% set c = m.content.split('</think>')[-1] if not loop.last else m.content %}"
PLAIN = LOOP + TURN + "{{ m.content }}<|e|>\n" + END + ASK
TEMPLATES = {
    "ChatML": PLAIN,
    "contents without white space": LOOP + TURN + "{{ m.content | trim }}<|e|>\n" + END + ASK,
    "empty reasoning in the last turn": LOOP
    + TURN
    + "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|e|>\n"
    + END
    + ASK,
    "reasoning in the last turn alone": LOOP + SHORT + TURN + "{{ c }}<|e|>\n" + END + ASK,
    "an end after everything": LOOP
    + TURN
    + "{{ m.content }}<|e|>\n"
    + END
    + ASK
    + "{% if not add_generation_prompt %}<eos>{% endif %}",
    "Llama 2": LOOP
    + "{% if m.role == 'assistant' %} {{ m.content | trim }} <eos>{% else %}[I] {{ m.content | trim }} [/I]{% endif %}"
    + END,
    "words, not tokens": LOOP
    + "{{ m.role }}: {{ m.content }}\n"
    + END
    + "{% if add_generation_prompt %}assistant:{% endif %}",
    "spaces before an answer": LOOP
    + "{{ m.role }}: {{ m.content }}\n"
    + END
    + "{% if add_generation_prompt %}assistant: {% endif %}",
    "written as JSON": LOOP + TURN + "{{ m.content | tojson }}<|e|>\n" + END + ASK,
    "marked by the template": LOOP
    + TURN
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|e|>{% endgeneration %}{% else %}"
    + "{{ m.content }}<|e|>{% endif %}{{ '\n' }}"
    + END
    + ASK,
}
ROW = {
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "turn off the light"},
        {"role": "assistant", "content": "<think>the user wants it off</think>the light is off "},
        {"role": "user", "content": "and\n<|e|> now?\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "thanks"},
    ]
}


def how_of(template, **how):
    tokenizer = small_tokenizers.byte_level(template, special=("<|s|>", "<|e|>", "[I]", "[/I]"), **how)
    return Tokenization(tokenizer, len(tokenizer), 4096)


def learned(how, row):
    """The texts that are learned, each a run of tokens."""
    example = how.example(row)
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))
    runs = [[]]
    for label in example.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [how.tokenizer.decode(run) for run in runs if run]


REASONED = "<think>the user wants it off</think>the light is off"
EXPECTED = {
    "ChatML": [REASONED + " <|e|>\n", "yes<|e|>\n"],
    "contents without white space": [REASONED + "<|e|>\n", "yes<|e|>\n"],
    "empty reasoning in the last turn": [REASONED + " <|e|>\n", "<think>\n\n</think>\n\nyes<|e|>\n"],
    "reasoning in the last turn alone": ["the light is off <|e|>\n", "yes<|e|>\n"],
    "an end after everything": [REASONED + " <|e|>\n", "yes<|e|>\n<eos>"],
    "Llama 2": [" " + REASONED + " <eos>", " yes <eos>"],
    "words, not tokens": [" " + REASONED + " \n", " yes\n"],
    "spaces before an answer": [" " + REASONED + " \n", " yes\n"],
    "written as JSON": [f'"{REASONED} "<|e|>\n', '"yes"<|e|>\n'],
    "marked by the template": [REASONED + " <|e|>", "yes<|e|>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_turns_of_the_whole_rendering_are_learned(name):
    how = how_of(TEMPLATES[name])
    assert learned(how, ROW) == EXPECTED[name]
    whole = how.tokenizer.apply_chat_template(ROW["messages"][:5], tokenize=False)
    assert how.tokenizer.decode(how.example(ROW).ids) == whole


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_is_asked_with_the_tokens_before_what_it_learned(name):
    how = how_of(TEMPLATES[name])
    example = how.example(ROW)
    first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    for count, length in ((2, first), (4, None)):
        asked = how.asked({"messages": ROW["messages"][:count]}).ids
        assert asked == example.ids[: len(asked)] and example.labels[len(asked)] != IGNORED
        assert length in (len(asked), None)


def test_the_check_sees_a_turn_that_is_rendered_apart():
    """Each turn as it is rendered as the last one: the tokens of another rendering."""
    how = how_of(TEMPLATES["empty reasoning in the last turn"])
    last = how.tokenizer.apply_chat_template(ROW["messages"][:3], tokenize=False)
    assert not how.tokenizer.apply_chat_template(ROW["messages"][:5], tokenize=False).startswith(last)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            PLAIN.replace(ASK, ASK.replace("assistant\n", "assistant\n<think>\n")),
            "asks for an answer with another text",
        ),
        (
            TEMPLATES["marked by the template"].replace(
                "{% generation %}", "<think></think>{% generation %}"
            ),
            "asks for an answer with another text",
        ),
        (
            TEMPLATES["marked by the template"].replace(
                ASK, ASK.replace("assistant\n", "assistant\n<think>")
            ),
            "asks for an answer with another text",
        ),
        (LOOP + TURN + "{{ m.content[:4] }}<|e|>\n" + END + ASK, "changes the assistant's messages"),
        (
            LOOP + TURN + "{{ m.content }}{{ m.content }}<|e|>\n" + END + ASK,
            "changes the assistant's messages",
        ),
        (
            "{% for m in messages | reverse %}" + TURN + "{{ m.content }}<|e|>\n" + END + ASK,
            "asks for an answer with",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "of the roles assistant, system, user: roles must alternate",
        ),
        ("{{ messages[1].content.no.such }}", "of the roles assistant, system, user: UndefinedError"),
        (None, "no chat template, so it cannot learn from messages: use prompt and completion rows"),
    ],
)
def test_a_template_whose_turns_cannot_be_told_apart_is_refused(template, message):
    how = how_of(template)
    with pytest.raises(InputError, match=message) as refused:
        how.example(ROW)
    assert "light" not in str(refused.value)  # rows are private


def test_white_space_may_stand_before_a_marked_turn():
    how = how_of(
        TEMPLATES["marked by the template"].replace("{% generation %}", "{{ '\n' }}{% generation %}")
    )
    assert learned(how, ROW) == EXPECTED["marked by the template"]


def test_more_of_a_message_than_its_content_is_learned_where_it_closes_the_conversation_or_refused():
    calls = LOOP + TURN + "{{ m.content }}{% if m.call %}<call>{{ m.call }}{% endif %}<|e|>\n" + END + ASK
    call = {"role": "assistant", "content": "one moment", "call": "lamp()"}
    asked = [{"role": "user", "content": "turn it on"}]
    assert learned(how_of(calls), {"messages": [*asked, call]}) == ["one moment<call>lamp()<|e|>\n"]
    assert (
        learned(how_of(PLAIN), {"messages": [*asked, call, *ROW["messages"][3:5]]})[0] == "one moment<|e|>\n"
    )
    with pytest.raises(InputError, match="writes more of an assistant's message than its content"):
        how_of(calls).example({"messages": [*asked, call, *ROW["messages"][3:5]]})


def test_a_conversation_that_teaches_no_token_is_refused():
    marks = "{% generation %}{{ m.content }}{% endgeneration %}<|e|>\n"
    how = how_of(
        PLAIN.replace("{{ m.content }}<|e|>\n", f"{{% if m.role == 'assistant' %}}{marks}{{% endif %}}")
    )
    asked = {"role": "user", "content": "turn off the light"}
    answers = [{"role": "assistant", "content": content} for content in ("", "yes")]
    assert learned(how, {"messages": [asked, answers[1]]}) == ["yes"]
    with pytest.raises(InputError, match="a row of messages has no token to learn among its last") as refused:
        how.example({"messages": [asked, answers[0]]})
    assert "light" not in str(refused.value)  # rows are private


def test_special_tokens_take_the_white_space_after_them_where_their_file_says_so():
    """As Phi-3's do; there an end of text also closes the last turn alone."""
    from tokenizers import AddedToken

    how = how_of(TEMPLATES["an end after everything"])
    how.tokenizer.add_tokens(
        [AddedToken(name, rstrip=True, special=True) for name in ("<|s|>", "<|e|>")], special_tokens=True
    )
    example = how.example(ROW)
    ends = [
        place for place, token in enumerate(example.ids) if how.tokenizer.decode([token]).startswith("<|e|>")
    ]
    assert [example.labels[place] != IGNORED for place in ends] == [False, False, True, False, False, True]


def test_of_a_long_chat_the_end_is_kept(demo_tokenizer):
    chat = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "fine"}]
    cut = Tokenization(demo_tokenizer, len(demo_tokenizer), 10).example({"messages": chat})
    assert len(cut.ids) == 10
    assert demo_tokenizer.decode([label for label in cut.labels if label != IGNORED]) == "fine<|im_end|>\n"
