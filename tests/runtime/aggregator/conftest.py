"""A broker of each kind for the tests of a file."""

from collections.abc import Iterator

import pytest
from edge_broker.local import Broker, find_mosquitto, start_broker


@pytest.fixture(scope="module", params=["mosquitto", "embedded"])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if request.param == "mosquitto" and not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    with start_broker(state_dir=tmp_path_factory.mktemp(request.param), kind=request.param) as running:
        yield running
