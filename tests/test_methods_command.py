"""`vigor methods`, the registry, and the pages that go with it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rows_agreement
import rows_intrinsic
import rows_reference
import rows_verifiable
import yaml

from vigor.cli import main
from vigor.commands import methods
from vigor.commands.methods import FAMILIES, index, needed, page_path, parts, select
from vigor.rewards import METHODS, parse_spec

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
ROWS = {**rows_intrinsic.ROWS, **rows_agreement.ROWS, **rows_reference.ROWS, **rows_verifiable.ROWS}
COSTS = {"none", "forward", "2 forwards", "backward", "extra sampling"}

names = pytest.mark.parametrize("name", METHODS)


# Every line of the registry ------------------------------------------------------------------------------------------


@names
def test_a_line_has_a_module_that_tells_its_departures(name: str) -> None:
    module = importlib.import_module(METHODS[name].module)
    assert callable(vars(module)[name])
    assert module.__doc__ is not None
    assert "Departures" in module.__doc__
    assert re.search(rf"\b{name}\b", module.__doc__.partition("Command:")[2]), "no command with the method"


@names
def test_a_line_uses_known_words(name: str) -> None:
    method = METHODS[name]
    assert method.family in FAMILIES
    assert parts(method.needs)[0] == "prompts"
    assert set(method.cost.split(" + ")) <= COSTS
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}|own", method.paper)


@names
def test_a_line_has_a_row_in_the_common_table(name: str) -> None:
    assert name in {parse_spec(spec)[0] for spec in ROWS}


@names
def test_a_line_has_a_page_with_every_section(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text("utf-8")
    assert page.startswith(f"# {name}\n")
    assert len(page.split("\n\n")[1]) > 40, "the page begins with what the method is"
    assert page.count("```") >= 4, "a formula and a command"
    assert re.search(rf"```bash\n(?s:.*?){name}(?s:.*?)```", page), "the command names the method"
    for section in ("**When it works.**", "**When it fails.**"):
        assert section in " ".join(page.split())
    if METHODS[name].paper.startswith("arXiv"):
        assert f"arxiv.org/abs/{METHODS[name].paper.removeprefix('arXiv ')}" in page


@names
def test_a_page_lists_every_option(name: str) -> None:
    import inspect

    page = (PAGES / f"{name}.md").read_text("utf-8")
    options = inspect.signature(vars(importlib.import_module(METHODS[name].module))[name]).parameters
    missing = [option for option in options if f"`{option}`" not in page and f"`{option}=" not in page]
    assert not missing


class _Loader(yaml.SafeLoader):
    """mkdocs.yml without its tags for Python objects."""


def test_every_page_is_in_the_navigation_and_there_are_no_others() -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Loader)["nav"]
    listed = next(entry["Methods"] for entry in nav if "Methods" in entry)
    files = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in listed]
    assert sorted(files) == sorted(["methods/index.md", *(f"methods/{name}.md" for name in METHODS)])
    assert sorted(page.stem for page in PAGES.glob("*.md")) == sorted(["index", *METHODS])


def test_the_index_is_the_registry() -> None:
    """Where this fails: vigor methods --markdown > docs/methods/index.md"""
    assert (PAGES / "index.md").read_text("utf-8") == index(list(METHODS.values()))


# The command ---------------------------------------------------------------------------------------------------------


def listed_names(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines()[1:]]


def test_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert listed_names(out) == list(METHODS)
    for method, line in zip(METHODS.values(), out.splitlines()[1:], strict=True):
        assert all(cell in line for cell in (method.family, method.needs, method.cost, method.paper, method.summary))


@pytest.mark.parametrize("family", FAMILIES)
def test_lists_a_family(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--family", family]) == 0
    wanted = [name for name, method in METHODS.items() if method.family == family]
    assert wanted
    assert listed_names(capsys.readouterr().out) == wanted


def test_lists_what_the_data_suffice_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--needs", "prompts"]) == 0
    free = listed_names(capsys.readouterr().out)
    assert {"vigor", "self_certainty", "format", "random"} <= set(free)
    assert {METHODS[name].needs for name in free} == {"prompts"}
    assert main(["methods", "--needs", "answers", "keywords", "--family", "verifiable"]) == 0
    more = listed_names(capsys.readouterr().out)
    assert {"accuracy", "keyword_chain", "overlong"} <= set(more)
    assert not {"unit_tests", "l1_max"} & set(more)


def test_everything_at_hand_leaves_nothing_out() -> None:
    everything = needed(METHODS.values())
    assert everything[0] == "prompts"
    assert select(METHODS.values(), available=everything) == list(METHODS.values())


def test_unknown_data_and_families_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--needs", "labels"]) == 2
    assert "no reward needs labels; choose from prompts, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["methods", "--family", "extrinsic"])


def test_json_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json", "--family", "control"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in read] == [name for name, m in METHODS.items() if m.family == "control"]
    assert all(set(entry) == {"name", "family", "needs", "cost", "paper", "summary"} for entry in read)


@names
def test_shows_the_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith((PAGES / f"{name}.md").read_text("utf-8").rstrip())
    assert "Departures" in out


def test_markdown_is_the_index(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == index(list(METHODS.values()))


def test_the_list_needs_no_torch() -> None:
    code = "import sys; from vigor.cli import main; main(['methods']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The pages of an installed package ------------------------------------------------------------------------------------


def test_an_installed_package_brings_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "vigor" / "rewards"
    (package / "pages").mkdir(parents=True)
    (package / "pages" / "vigor.md").write_text("# vigor\n", "utf-8")
    monkeypatch.setattr(methods.rewards, "__file__", str(package / "__init__.py"))
    assert page_path("vigor") == package / "pages" / "vigor.md"
    with pytest.raises(FileNotFoundError, match="no page of 'format'"):
        page_path("format")


def test_the_wheel_takes_the_pages_along() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"docs/methods": "vigor/rewards/pages"}
    assert page_path("vigor") == PAGES / "vigor.md"
