"""Links of README and docs lead somewhere on GitHub and in the built site, and the site leaves nothing out."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import stars_fast
from stars_fast import methods, rewards

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def prose(page):
    """Its text without code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)


def anchors(page):
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def links(page):
    return [first or second for first, second in LINK.findall(prose(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_resolve(page):
    for link in links(page):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists() and target.is_relative_to(ROOT), f"{link}: nothing is there"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if "docs" in page.parts], ids=lambda page: page.name)
def test_pages_of_the_site_link_to_pages_of_the_site(page):
    """What lies outside docs/ is not on the site; inside, its Markdown file is named, not a folder."""
    for link in links(page):
        if not re.match(r"https?:|mailto:|#", link):
            target = (page.parent / link.partition("#")[0]).resolve()
            assert target.is_relative_to(ROOT / "docs") and target.suffix, link


def named(nav):
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else named(value)


def test_the_site_has_every_page_once():
    nav = list(named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if "docs" in page.parts}
    assert len(nav) == len(set(nav))
    assert not there - set(nav), "not in the nav of mkdocs.yml"
    assert not set(nav) - there, "in the nav of mkdocs.yml, but not in docs/"


@pytest.mark.parametrize("folder", ["docs", "docs/api"])
def test_its_first_page_leads_to_every_other(folder):
    first = ROOT / folder / "README.md"
    there = {page for page in first.parent.rglob("*.md") if folder == "docs/api" or page.parent.name != "api"}
    assert not there - {first, *((first.parent / link).resolve() for link in links(first))}


def test_the_reference_has_all_that_is_public():
    text = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    shown = set()
    for path in re.findall(r"^::: (\S+)$", text, re.M):
        module, name = path.rsplit(".", 1)
        try:
            shown.add(getattr(import_module(module), name))
        except ImportError as error:
            assert "install the extra '" in str(error), path
    assert {getattr(stars_fast, name) for name in stars_fast.__all__} <= shown
    for package in (methods, rewards):
        assert {getattr(package, name) for name in package.__all__ if name != "METHODS"} <= shown


def test_the_members_that_the_reference_names_are_there():
    text = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    listed = re.findall(r"^::: (\S+)\.(\w+)\n    options:\n      members: \[(.+)\]$", text, re.M)
    assert 0 < len(listed) == text.count("members: [")
    for module, name, members in listed:
        owner = getattr(import_module(module), name)
        assert [member for member in members.split(", ") if not hasattr(owner, member)] == [], name


def test_the_tests_that_a_page_names_are_there():
    named = [name for page in PAGES for name in re.findall(r"`(test_\w+)::(test_\w+)`", page.read_text())]
    assert len(named) > 20
    missing = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / f"{file}.py").read_text()
    ]
    assert not missing


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_programs_that_pages_name_find_what_they_import(folder, monkeypatch):
    """Examples are run by their path, and import what lies beside them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(rf"python3? (?:-m {folder}\.([\w.]+)|{folder}/(\w+)\.py)", text)
    modules = sorted({module or script for module, script in named})
    assert len(modules) > 3
    for module in modules:
        import_module(f"{folder}.{module}")
