"""Two nodes of one fleet: the second ends before a device hears of it; a node that was killed is back at once."""

from pathlib import Path

from fleet import Fleet


def test_a_second_node_ends_and_the_first_serves_also_after_it_was_killed(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.write()
    first = fleet.noise_node("--until-finished")
    first.phase("collecting")
    second = fleet.noise_node("--state", str(tmp_path / "second"))
    assert second.end() == 2
    assert f"fleet `{fleet.name}` has another node" in second.error() and second.seen == []
    first.kill()
    again = fleet.noise_node("--until-finished")
    again.phase("collecting", timeout_s=20)  # far below the wait for a node that may live
    agent = fleet.noise("a", "10kB", "--until-finished")
    assert (agent.end(), again.end()) == (0, 0)
