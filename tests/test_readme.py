"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest
from helpers_distributed import forked

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(path: Path, *argv: str, cwd: Path) -> str:
    done = forked(str(path), *argv, processes=1, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["drop-in", "pieces"])
def test_python_snippet_runs(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(snippet, "utf-8")
    output = run(tmp_path / "snippet.py", cwd=tmp_path)
    if "zscore(" in snippet:
        assert "0.7071" in output or "0.7070" in output  # two ranks, -1 and 1, standardised with unbiased std


def test_the_example_trains_and_prints_its_table(tmp_path: Path) -> None:
    output = run(ROOT / "examples/minimal_loop.py", "--steps", "2", "--eval_prompts", "8", cwd=tmp_path)
    rows = dict(re.findall(r"^(lab:\S+)\s+([\d.]+\s+[\d.]+\s+[+-][\d.]+)$", output, flags=re.MULTILINE))
    assert list(rows) == ["lab:math", "lab:math-hard", "lab:code"]
    for numbers in rows.values():
        before, after, change = map(float, numbers.split())
        assert 0 <= before <= 100 and 0 <= after <= 100
        assert change == pytest.approx(after - before, abs=0.11)


def test_every_file_and_folder_it_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_every_reward_stands_in_its_table() -> None:
    from vigor.commands.methods import FAMILIES
    from vigor.rewards import METHODS

    def _place(name: str) -> int:
        return FAMILIES.index(METHODS[name].family)

    table = README.split("## The rewards")[1].split("\n## ")[0]
    assert re.findall(r"\[`(\w+)`\]\(docs/methods/\1\.md\)", table) == sorted(METHODS, key=_place)


def test_the_annotated_tree_names_what_there_is() -> None:
    tree = README.split("src/vigor/\n")[1].split("tests/  benchmarks/")[0]
    named = set(re.findall(r"([a-z_]+(?:\.py|/))", tree))
    there = {f"{path.name}{'/' if path.is_dir() else ''}" for path in (ROOT / "src/vigor").iterdir()}
    there -= {"__init__.py", "__main__.py", "py.typed", "__pycache__/", "evaluation/"}
    assert there <= named, sorted(there - named)
