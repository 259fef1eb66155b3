"""Which tests are the long form of a promise that a shorter test checks too, and what workers share.

`make test` runs the short tests, `make test-long` the long ones.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_broker.local import Broker, find_mosquitto, start_broker

LONG = (  # each is the beginning of a test's name
    "test_a_class_that_comes_late_starts_from_what_the_fleet_shares",
    "test_a_device_that_lost_power_together_with_the_broker_is_not_waited_for_again_and_again",
    "test_a_newcomer_gets_through_the_pages[long]",
    "test_a_page_runs_alone[long-",
    "test_a_server_ends_with_an_agent_that_is_killed",
    "test_all_parameters_can_be_trained_beside_ours",
    "test_completions_reach_a_model_of_another_tokenizer",
    "test_devices_of_unequal_ranks_learn_together[flora]",
    "test_devices_of_unequal_ranks_learn_together[hetlora]",
    "test_each_budget_gets_the_first_plan_in_that_order_that_fits[of1]",
    "test_each_deadline_gets_the_first_plan_that_fits_and_is_in_time[of1]",
    "test_every_variant_is_exact_or_refused_as_the_page_has_it[long",
    "test_steps_on_packed_weights_follow_pefts_on_the_same_weights_expanded[30-60]",
    "test_steps_on_the_real_model_follow_the_same_loss[30-60]",
    "test_the_prediction_is_near_the_servers_peak",
    "test_the_prediction_is_near_the_trainers_peak[10-q4_1-8-0]",
    "test_the_prediction_is_near_the_trainers_peak[4-float32-2-0]",
    "test_versions_are_swapped_under_load_without_a_lost_request[100]",
    "test_what_a_method_shares_travels_and_what_it_keeps_goes_on_from_round_to_round[fedsa",
    "test_what_a_method_shares_travels_and_what_it_keeps_goes_on_from_round_to_round[fedsb",
    "test_what_a_method_shares_travels_and_what_it_keeps_goes_on_from_round_to_round[ffa",
)

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before -m selects by the marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the long tests. In a run of the whole suite every entry of the table must name one."""
    unused = set(LONG)
    for item in items:
        if beginnings := [beginning for beginning in LONG if item.name.startswith(beginning)]:
            item.add_marker(pytest.mark.long)
            unused.difference_update(beginnings)
    if unused and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        raise pytest.UsageError(f"tests/conftest.py names long tests that are not there: {sorted(unused)}")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of prepared models and measurements of all processes that the tests start."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers' folders lie in the run's
        folder = folder.parent
    (folder / "prepared").mkdir(exist_ok=True)
    return folder / "prepared"


@pytest.fixture(scope="session", params=["mosquitto", "embedded"])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker of each kind; tests that share one have fleets of their own."""
    if request.param == "mosquitto" and not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    with start_broker(state_dir=tmp_path_factory.mktemp(request.param), kind=request.param) as running:
        yield running
