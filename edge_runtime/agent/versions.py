"""The files a round starts from: a global version, and the fleet's public texts."""

from pathlib import Path

from edge_broker.messages import Artifact

from edge_runtime.protocol.round import FLEET, Round


def artifacts_of(announced: Round, model_class: str) -> dict[str, Artifact]:
    """What a model class starts the round from, by name: start and anchors, if there are any."""
    versions = announced.versions
    named = {"start": versions.get(model_class, versions.get(FLEET)), "anchors": announced.anchors}
    return {name: artifact for name, artifact in named.items() if artifact is not None}


def forget_others(folder: Path, artifacts: dict[str, Artifact]) -> None:
    """Delete the files that earlier rounds have fetched into a folder, but for these artifacts."""
    needed = {artifact.digest for artifact in artifacts.values()}
    for path in folder.glob("*"):
        if path.name.partition(".")[0] not in needed:
            path.unlink(missing_ok=True)
