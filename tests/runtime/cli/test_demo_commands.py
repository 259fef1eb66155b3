"""The demo's data: equal on every machine, disjoint where it has to be, and valid."""

import json

import pytest

from edge_runtime.demo.commands import COMMON, COMMON_SHARE, DOMAINS, rows


def prompts(drawn):
    return {row["prompt"] for row in drawn}


def things(drawn):
    """The thing that each row's action is about."""
    return [next(iter(json.loads(row["completion"]))) for row in drawn]


@pytest.mark.parametrize("domain", DOMAINS)
def test_as_many_rows_as_asked_for_and_all_distinct(domain):
    drawn = rows(domain, train=300, held_out=65, seed=0)
    assert [len(prompts(part)) for part in drawn] == [len(part) for part in drawn] == [300, 65, 65]


def test_equal_seeds_give_equal_rows_and_others_do_not():
    assert rows("garage", 100, 20, seed=3) == rows("garage", 100, 20, seed=3)
    assert rows("garage", 100, 20, seed=3) != rows("garage", 100, 20, seed=4)
    assert rows("garage", 1, 0, seed=0).train == [
        {"prompt": "Command: turn off the clothes dryer\nAction:", "completion": ' {"dryer": "off"}'}
    ]


def test_no_device_trains_on_a_row_that_any_device_is_tested_on():
    drawn = [rows(domain, 300, 60, seed) for domain in DOMAINS for seed in (0, 1)]
    trained = set().union(*(prompts(device.train) for device in drawn))
    tested = set().union(*(prompts(device.held_out) | prompts(device.others_held_out) for device in drawn))
    assert trained and tested
    assert not trained & tested


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_domain_has_its_own_things_and_a_share_of_the_common_ones(domain):
    drawn = rows(domain, train=400, held_out=60, seed=0)
    assert set(things(drawn.train)) == set(DOMAINS[domain]) | set(COMMON)
    common = sum(thing in COMMON for thing in things(drawn.train)) / 400
    assert abs(common - COMMON_SHARE) < 0.06
    assert not set(things(drawn.others_held_out)) & (set(DOMAINS[domain]) | set(COMMON))


def test_the_other_domains_are_tested_in_equal_parts():
    tested = things(rows("kitchen", 10, 61, seed=0).others_held_out)
    assert sum(thing in DOMAINS["garage"] for thing in tested) == 31
    assert sum(thing in DOMAINS["garden"] for thing in tested) == 30


def test_no_thing_belongs_to_two_domains():
    names = [name for table in (*DOMAINS.values(), COMMON) for name in table]
    words = [word for table in (*DOMAINS.values(), COMMON) for spoken in table.values() for word in spoken]
    assert len(set(names)) == len(names)
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_action_is_one_json_object_in_few_words(domain):
    for part in rows(domain, 200, 40, seed=1):
        for row in part:
            assert row["prompt"].startswith("Command: ") and row["prompt"].endswith("\nAction:")
            (action,) = json.loads(row["completion"]).values()
            assert isinstance(action, str) and "{" not in action
            assert row["completion"].startswith(' {"')


def test_too_many_rows_and_an_unknown_domain_are_refused():
    with pytest.raises(ValueError, match="asked for 50000 distinct commands, the generator ran out at"):
        rows("garage", 50_000, 0, seed=0)
    with pytest.raises(KeyError, match="cellar"):
        rows("cellar", 1, 1, seed=0)
