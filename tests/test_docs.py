"""README, docs/ and the pages beside them: length, links, named result files, options; the README's picture."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from benchmarks import speed_quality
from benchmarks.envelope import RESULTS, ROOT

PAGES = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)")
README_LINES, DOCS_WORDS = 150, 12_000


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@functools.cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of all headings, as GitHub makes them: lower case, punctuation dropped, blanks to hyphens."""
    prose = re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/guide.md"} <= set(map(name, PAGES))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(text(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_pages_are_linked_from_the_readme() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(text(ROOT / "README.md"))}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


def test_pages_keep_to_their_length() -> None:
    assert len(text(ROOT / "README.md").splitlines()) <= README_LINES
    assert sum(len(text(page).split()) for page in ROOT.glob("docs/*.md")) <= DOCS_WORDS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_results_exist(page: Path) -> None:
    for result in re.findall(r"benchmarks/results/([\w.+-]+\.\w+)", re.sub(r"--out \S+", "", text(page))):
        assert (RESULTS / result).exists(), result


def test_every_result_file_is_listed_with_its_script() -> None:
    page = text(ROOT / "docs/notes/results.md")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `") and ".json" in line]
    listed = {file for row in rows for file in re.findall(r"`([\w.+-]+\.json)`", row[1])}
    assert listed == {file.name for file in RESULTS.glob("*.json")}
    for row in rows:
        (script,) = re.findall(r"`(\w+\.py)", row[2])
        assert (ROOT / "benchmarks" / script).exists(), script


def test_pages_that_sources_name_exist() -> None:
    for folder in ("offline_prune", "vllm_spense", "benchmarks", "scripts", "examples"):
        for source in (ROOT / folder).rglob("*.*"):
            if source.suffix in (".py", ".cu", ".cuh"):
                for page in re.findall(r"\bdocs/[\w/-]+\.md", source.read_text(encoding="utf-8")):
                    assert (ROOT / page).exists(), f"{source}: {page}"


#: Where pages name files from: the root, or the package that the text is about.
BASES = tuple(ROOT / base for base in ("", "offline_prune", "vllm_spense", "vllm_spense/kernels", "benchmarks"))


@functools.cache
def source_names() -> set[str]:
    folders = ("offline_prune", "vllm_spense", "benchmarks", "scripts", "examples", "tests")
    return {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_source_files_exist(page: Path) -> None:
    for path in re.findall(r"`([\w./-]+(?:\.py|\.cu|\.cuh|/))`", text(page)):
        if "/" in path:
            assert any((base / path).exists() for base in BASES), path
        else:
            assert path in source_names(), path


@pytest.mark.parametrize("page", ["docs/guide.md", "docs/pruning.md", "docs/notes/healing.md"])
def test_options_of_spense_exist(page: str) -> None:
    import typer.main

    from offline_prune.cli import app

    command = typer.main.get_command(app)
    known = {option for sub in command.commands.values() for param in sub.params for option in param.opts}  # type: ignore[attr-defined]
    of_others = {
        "--quantization",
        "--dtype",
        "--url",
        "--tasks",
        "--model",
        "--help",
        "--nproc-per-node",
        "--no-python",
        "--enable-lora",
        "--lora-modules",
        "--max-loras",
        "--max-model-len",
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text(ROOT / page))) - of_others
    assert named & {"--layout", "--sparsity", "--heldout"}
    assert named <= known, named - known


def test_the_picture_is_that_of_the_result_files() -> None:
    from PIL import Image

    with Image.open(speed_quality.PICTURE) as picture:
        drawn = json.loads(picture.text[speed_quality.POINTS])  # type: ignore[attr-defined]
        assert picture.text[speed_quality.TEXTS] == speed_quality.texts()  # type: ignore[attr-defined]
    found = speed_quality.points()
    assert drawn.keys() == found.keys()
    for method, points in found.items():
        assert drawn[method] == [pytest.approx(point, rel=1e-9) for point in points], method


def test_better_methods_lie_left_and_sparser_ones_higher() -> None:
    found = speed_quality.points()
    for better, worse in (("healed", "spensegpt++"), ("spensegpt++", "spensegpt+")):
        lines = [{sparsity: (left, speed) for sparsity, left, speed in found[name]} for name in (better, worse)]
        assert lines[0].keys() <= lines[1].keys()
        for sparsity, (left, speed) in lines[0].items():
            right, other_speed = lines[1][sparsity]
            assert left <= right
            assert speed == other_speed
    for points in found.values():
        assert [point[2] for point in points] == sorted(point[2] for point in points)
