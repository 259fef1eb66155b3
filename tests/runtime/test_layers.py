"""Imports run one way: rooms import earlier rooms alone, and no file or folder is in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import edge_broker
import edge_kernels
import edge_profiles
import pytest

import edge_runtime

ROOMS = (
    *("errors", "settings", "state", "protocol", "compat", "models", "methods", "adapters", "planning"),
    *("trainer", "serving", "agent", "aggregator", "simulation", "demo", "cli"),
)
PACKAGES = {
    package.__name__: Path(next(iter(package.__path__)))
    for package in (edge_runtime, edge_kernels, edge_broker, edge_profiles)
}
# files whose imports break the order, and why
EXCEPTIONS: dict[tuple[str, str], str] = {}


def modules(package):
    """name -> (path, whether it is a folder's own file)."""
    root = PACKAGES[package]
    for path in sorted(root.rglob("*.py")):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(source, known):
    """The modules that a file imports, at its head or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


@pytest.fixture(scope="module")
def graph():
    """module -> the product's modules that it imports."""
    paths = {name: path for package in PACKAGES for name, path in modules(package)}
    return {
        name: {target for target in imports(path.read_text(encoding="utf-8"), paths) if in_product(target)}
        - {name}
        for name, path in paths.items()
    }


def in_product(module):
    return package_of(module) in {*PACKAGES, "benchmarks", "tests"}


def package_of(module):
    return module.partition(".")[0]


def room_of(module):
    return module.split(".")[1] if module.count(".") else ""


def against_the_order(graph):
    """(module, imported module) where a room imports a later one."""
    return [
        (name, target)
        for name, targets in graph.items()
        for target in targets
        if {room_of(name), room_of(target)} <= {*ROOMS}
        and name.startswith("edge_runtime.")
        and target.startswith("edge_runtime.")
        and ROOMS.index(room_of(target)) > ROOMS.index(room_of(name))
    ]


def folders(graph):
    """The graph of folders: a file belongs to the folder it lies in.

    A folder and the folders inside it are one: what lies on top may gather what lies below.
    """
    folder_of = {name: path.parent for package in PACKAGES for name, path in modules(package)}
    arrows = {}
    for name, targets in graph.items():
        home = folder_of[name]
        inside = {folder_of[target] for target in targets if target in folder_of}
        nested = {folder for folder in inside if home in (folder, *folder.parents) or folder in home.parents}
        arrows.setdefault(home, set()).update(inside - nested)
    return arrows


def circle(graph):
    """The members of a circle; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_its_place_in_the_order(graph):
    rooms = {room_of(name) for name in graph if name.startswith("edge_runtime.")}
    assert rooms - {*ROOMS} == set()


def test_no_room_imports_a_later_one(graph):
    assert sorted(against_the_order(graph)) == sorted(EXCEPTIONS)


def test_the_check_of_the_order_sees_an_import_inside_a_function():
    code = "def f():\n    from edge_runtime.trainer import step\n"
    known = {"edge_runtime.trainer.step"}
    assert set(imports(code, known)) == known
    assert against_the_order({"edge_runtime.models.weights": known})
    assert not against_the_order({"edge_runtime.agent.work": known})


def test_no_files_and_no_folders_are_in_a_circle(graph):
    assert circle(graph) == []
    assert circle(folders(graph)) == []


def test_the_check_of_circles_sees_one():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


def test_the_other_packages_know_neither_the_product_nor_each_other(graph):
    assert [
        (name, target)
        for name, targets in graph.items()
        for target in targets
        if package_of(name) not in ("edge_runtime", package_of(target))
    ] == []


def test_nothing_that_is_installed_imports_benchmarks_or_tests(graph):
    assert {package_of(target) for targets in graph.values() for target in targets} == {*PACKAGES}


def test_compat_imports_no_room(graph):
    assert not {
        target
        for name, targets in graph.items()
        if name.startswith("edge_runtime.compat.")
        for target in targets
    }
