"""What lies where: which folder imports which, the links, and what a wheel holds."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from raygraft.kernels import ENTRY_POINTS

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "graph": set(),
    "kernels": {"graph"},
    "placement": {"graph"},
    "actors": {"graph", "kernels", "placement"},
}
"""Folder -> folders that it may import. `raygraft` itself may import all."""
FOLDERS = (*MAY_IMPORT, "raygraft")
MODULE_NAME = re.compile(r"raygraft(\.\w+)+(:\w+)?")
"""A module named in a string, to be imported later."""


def sources(*folders: str) -> list[Path]:
    """Python files below these folders, each once: what lies behind a link is left out."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if path.resolve() == path)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """The dotted name that a source is imported by, without `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "raygraft" else ("raygraft", *parts)
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> Iterator[str]:
    """Full names of all that a source imports, in functions and in strings too."""
    package = module_name(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and MODULE_NAME.fullmatch(str(node.value)):
            yield node.value


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_what_it_may(folder: str) -> None:
    paths = sources(folder)
    assert paths
    wrong = [
        f"{relative(path)}: {name}"
        for path in paths
        for name in imported(path)
        if name.split(".")[0] == "raygraft"
        and name != ENTRY_POINTS  # a group's name, no module
        and name.split(".")[1:2] not in [[one] for one in {folder} | MAY_IMPORT[folder]]
    ]
    assert not wrong


def test_nothing_is_imported_by_its_bare_folder() -> None:
    """`import graph` could be anybody's module."""
    wrong = [
        f"{relative(path)}: {name}"
        for path in sources(*FOLDERS, "tests", "bench", "examples")
        for name in imported(path)
        if name.split(".")[0] in MAY_IMPORT
    ]
    assert not wrong


def test_links_are_relative() -> None:
    for folder in MAY_IMPORT:
        link = ROOT / "raygraft" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder
        assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("path", sources(*FOLDERS, "bench", "examples"), ids=relative)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_bytes())), f"{relative(path)} has no docstring"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for folder in (*FOLDERS, "tests", "bench", "docs", "examples"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", copy.parent, copy],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = copy.parent.glob("*.whl")
    return found


@pytest.mark.process
def test_wheel_holds_raygraft_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        infos = [name for name in archive.namelist() if ".dist-info/" in name]
        (entry_points,) = (name for name in infos if name.endswith("entry_points.txt"))
        scripts = archive.read(entry_points).decode()
    packaged = {
        name if name.startswith("raygraft/") else f"raygraft/{name}"
        for name in map(relative, sources(*FOLDERS))
    }
    assert {name for name in names if name.endswith(".py")} == packaged
    assert "raygraft/py.typed" in names
    assert all(name.startswith("raygraft/") for name in names)
    assert all(re.match(r"raygraft-[^/]+\.dist-info/", name) for name in infos)
    assert "raygraft = raygraft.cli:main" in scripts


@pytest.mark.process
def test_wheel_can_be_imported(wheel: Path) -> None:
    modules = ", ".join(f"raygraft.{folder}" for folder in MAY_IMPORT)
    script = f"import sys; sys.path.insert(0, {str(wheel)!r}); import {modules}; "
    script += "print(raygraft.__file__, raygraft.graph.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=wheel.parent, check=True
    )
    for file in found.stdout.split():
        assert file.startswith(str(wheel))
