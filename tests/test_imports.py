"""Who may import whom: the table "Who imports whom" of docs/architecture.md, against the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, HEADING = ROOT / "docs/architecture.md", "## Who imports whom"
PACKAGES = ("vllm_spense", "offline_prune")
#: Folders from which the packages import nothing.
OUTSIDE = ("benchmarks", "examples", "scripts", "tests")


@dataclass(frozen=True)
class Row:
    """One row of the table; cells are full names, `*` for any characters.

    Attributes:
        modules: that the row is about.
        imports: modules of the project that they may import, at the top or in a function.
        loads: packages of others that are loaded once these modules are, by whatever they import at the top.
    """

    modules: tuple[str, ...]
    imports: tuple[str, ...]
    loads: tuple[str, ...]


def read_table(document: str) -> list[Row]:
    """The rows under the heading: the first cell and the last two hold names in backticks, or none."""
    _, _, section = document.partition(f"{HEADING}\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["modules", "are", "import", "load"], cells[0]
    names = [[tuple(re.findall(r"`([^`]+)`", cell)) for cell in row] for row in cells[2:]]
    return [Row(modules, imports, loads) for modules, _, imports, loads in names]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TABLE = read_table(DOCUMENT.read_text(encoding="utf-8"))


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def row_of(module: str) -> Row:
    (row,) = [row for row in TABLE if matches(module, row.modules)]
    return row


def statements(body: Iterable[ast.AST], functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run when a module is loaded, and with `functions` those that run later."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, functions)
        elif functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(ast.iter_child_nodes(node), functions)


def imports_in(source: str, functions: bool) -> set[str]:
    """Full names: modules of the project, and whatever else is imported."""
    names = set()
    for node in statements(ast.parse(source).body, functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert node.module, "relative imports hide who is imported"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in full}
    return names


@cache
def imported(module: str, functions: bool) -> frozenset[str]:
    return frozenset(imports_in(MODULES[module].read_text(encoding="utf-8"), functions))


def loaded(module: str) -> dict[str, tuple[str, ...]]:
    """Packages of others that loading a module loads, each with the way there."""
    found: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    queue: list[tuple[str, ...]] = [(module,)]
    while queue:
        way = queue.pop(0)
        here = way[-1]
        if here in MODULES:
            if here not in seen:
                seen.add(here)
                queue += [(*way, name) for name in sorted(imported(here, functions=False))]
                # Python loads the packages around a module before it.
                queue += [(*way, here.rpartition(".")[0])] if "." in here else []
        elif (package := here.partition(".")[0]) not in sys.stdlib_module_names:
            found.setdefault(package, way)
    return found


def test_every_module_has_one_row_and_every_name_a_module() -> None:
    assert TABLE
    rows = {module: [row for row in TABLE if matches(module, row.modules)] for module in MODULES}
    assert {module: found for module, found in rows.items() if len(found) != 1} == {}
    patterns = [pattern for row in TABLE for pattern in (*row.modules, *row.imports)]
    assert [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in MODULES)] == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_what_the_table_says(module: str) -> None:
    names = imported(module, functions=True)
    assert not {name for name in names if name.partition(".")[0] in OUTSIDE}
    row = row_of(module)
    ours = {name for name in names if name in MODULES and name != "vllm_spense"}
    assert {name for name in ours if not matches(name, (*row.modules, *row.imports))} == set()


@pytest.mark.parametrize("module", MODULES)
def test_loading_a_module_loads_what_the_table_says(module: str) -> None:
    row = row_of(module)
    assert {package: " → ".join(way) for package, way in loaded(module).items() if package not in row.loads} == {}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.modules[0])
def test_the_table_allows_nothing_that_nobody_does(row: Row) -> None:
    modules = [module for module in MODULES if matches(module, row.modules)]
    packages = {package for module in modules for package in loaded(module)}
    assert set(row.loads) - packages == set()
    names = {name for module in modules for name in imported(module, functions=True)}
    assert {pattern for pattern in row.imports if not any(fnmatchcase(name, pattern) for name in names)} == set()


def test_what_counts_as_an_import() -> None:
    source = """
import a.b
from c import d
if TYPE_CHECKING:
    import never
else:
    import e
try:
    import f
except ImportError:
    f = None
class C:
    import g
    def later(self):
        import h
"""
    assert imports_in(source, functions=False) == {"a.b", "c", "e", "f", "g"}
    assert imports_in(source, functions=True) == {"a.b", "c", "e", "f", "g", "h"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vllm_spense", ("torch", "vllm")),
        ("vllm_spense.format", ("torch", "vllm")),
        ("vllm_spense.conformance", ("torch", "vllm")),
        ("vllm_spense.doctor", ("torch", "vllm", "numpy")),
        ("vllm_spense.estimate", ("torch", "vllm", "numpy")),
        ("vllm_spense.kernels.tuning.plan_cache", ("torch", "vllm", "numpy")),
        ("offline_prune.cli", ("torch", "vllm", "transformers")),
        ("offline_prune.runtime.threads", ("torch", "vllm", "transformers")),
        ("offline_prune.pipeline", ("vllm",)),
    ],
)
def test_importing_stays_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set({absent!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", [*PACKAGES, *OUTSIDE])
def test_modules_stay_readable(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path
