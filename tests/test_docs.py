"""What documents name exists: files, links, commands, settings and rooms."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_jax.config.load import field_types, load_config
from moe_jax.config.schema import Config
from tests.support import ROOT
from tests.support.command_line import check_command
from tests.test_structure import FLOORS, walk_steps

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = sorted(
    path
    for folder in ("moe_jax", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__)
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(text: str) -> list[str]:
    """Code within a paragraph, blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        target, _, heading = link.partition("#")
        if "://" in link:
            continue
        path = document.parent / target if target else document
        assert path.exists(), link
        headings = re.findall(r"(?m)^#+ (.*)$", path.read_text()) if heading else []
        anchors = [re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings]
        assert not heading or heading in anchors, link


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_documents_name_exist(document: Path) -> None:
    """Paths start at the project's folder or at `moe_jax/`; a module's name alone will do."""
    modules = {path.name for path in SOURCES}
    text = document.read_text()
    for code in code_of(text):
        if re.fullmatch(r"[\w./-]+\.(py|md|yaml)", code) and ("/" in code or code.endswith(".py")):
            found = [folder / code for folder in (ROOT, ROOT / "moe_jax")]
            assert any(path.exists() for path in found) or code in modules, code
    for path in re.findall(r"\b(?:configs|docs|scripts|tests)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_files_that_sources_name_exist(source: Path) -> None:
    pattern = r"(?<![\w/.-])(?:docs|moe_jax|scripts|tests)/[\w./-]+\.(?:py|md)\b"
    missing = [p for p in re.findall(pattern, source.read_text()) if not (ROOT / p).exists()]
    assert missing == []


def commands_in(text: str) -> Iterator[list[str]]:
    """The words after `moe-jax` of each command in a block or in a paragraph."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```$", text)
    blocks += re.findall(r"(?m)^    (.*)$", re.sub(r"(?ms)^```.*?^```$", "", text))
    for line in [line for block in blocks for line in block.splitlines()] + code_of(text):
        words = shlex.split(re.sub(r"[\[\]](?=\s|$|-)", " ", line), comments=True)
        if words[:1] == ["moe-jax"]:
            yield words[1:]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_and_their_options_exist(document: Path) -> None:
    for words in commands_in(document.read_text()):
        check_command(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_settings_that_commands_give_exist(document: Path) -> None:
    for words in commands_in(document.read_text()):
        given = [after for word, after in itertools.pairwise(words) if word == "--set"]
        configs = [
            word for word in words[1:2] if words[0] == "train" and word.startswith("configs/")
        ]
        for config in configs:
            settings = [one for one in given if not one.startswith("init_from=")]
            load_config(ROOT / config, settings)  # raises for an unknown key or a bad value


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_settings_that_documents_name_exist(document: Path) -> None:
    """`section.key`, or `section.key: value` and `section.key=value`."""
    sections = field_types(Config)
    for code in code_of(document.read_text()):
        named = re.match(r"([a-z]+)\.(?!py$)([a-z_]+)(?=$|[:=])", code)
        if named and dataclasses.is_dataclass(sections.get(named[1])):
            assert named[2] in field_types(sections[named[1]]), code


# The table of rooms and the walk in docs/architecture.md.


def test_the_rooms_of_the_architecture_are_the_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    rows = re.findall(r"(?m)^\| (\d+) \| ([^|]+) \|", text)
    table = {int(floor): tuple(re.findall(r"`(\w+)`", rooms)) for floor, rooms in rows}
    assert table == dict(enumerate(FLOORS))


def test_the_readme_counts_the_files_of_the_walk() -> None:
    files = {module for module, _ in walk_steps()}
    assert f"there are {len(files)} files to open" in (ROOT / "README.md").read_text()


def test_the_readme_has_each_room_once() -> None:
    text = (ROOT / "README.md").read_text().split("| room |")[1].split("\n\n")[0]
    first_column = "".join(line.split("|")[1] for line in text.splitlines()[2:])
    there = {path.name.removesuffix(".py") for path in (ROOT / "moe_jax").iterdir()}
    rooms = [room for floor in FLOORS for room in floor if room in there]
    assert sorted(re.findall(r"`(\w+)`", first_column)) == sorted(rooms)
