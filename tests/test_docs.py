"""What the documents name exists, and what exists and matters is named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/*/README.md")] if path.is_file()
)
# A path of this repository: it begins with one of its folders. `<op>` and `*` stand for names.
PATH = re.compile(r"(?<![\w./-])((?:csrc|python|tests|bench|tools|docs|\.ci)/[\w./<>*-]*[\w/>*])")
TREE_LINE = re.compile(r"^( *)([\w./-]+/)(?: |$)")
SOURCE_FOLDERS = ("csrc", "python", "bench", "tools")


def exists(path: str) -> bool:
    pattern = re.sub(r"<\w+>", "*", path.rstrip("/"))
    return any(ROOT.glob(pattern)) if "*" in pattern else (ROOT / pattern).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_named_exists(document):
    named = set(PATH.findall(document.read_text()))
    missing = sorted(path for path in named if not exists(path))
    assert not missing


def test_the_path_pattern_finds_paths():
    text = "open `csrc/gemm/gemm.h` or docs/log.md, and `bench/kernels/<bench>.py`; not http://host/tests/x or build/csrc/y"
    assert PATH.findall(text) == ["csrc/gemm/gemm.h", "docs/log.md", "bench/kernels/<bench>.py"]
    assert not exists("csrc/gemm/nothing_here.h")


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "\n    pip install . && python -m runtime.serve\n" in text
    assert "\n    pip install '.[test]' && pytest\n" in text


def test_the_readme_tree_has_a_line_for_every_source_folder():
    tree = re.search(r"## The tree\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    listed, parents = set(), []
    for line in tree.splitlines():
        if match := TREE_LINE.match(line):
            depth = len(match.group(1)) // 2
            parents = [*parents[:depth], match.group(2).rstrip("/")]
            listed.add("/".join(parents))
    assert all((ROOT / folder).is_dir() for folder in listed), listed
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: tracked folders are unknown")
    folders = {str(Path(file).parent) for file in tracked.stdout.splitlines()}
    wanted = {"/".join(folder.split("/")[:2]) for folder in folders if folder.startswith("csrc/")}
    wanted |= {folder for folder in folders if re.fullmatch(r"python/(scheduler|runtime/\w+)", folder)}
    assert not wanted - listed


def switches_in_sources() -> set[str]:
    """Names that C++ or Python reads from the environment."""
    names = set()
    for folder in SOURCE_FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py":
                pattern = r"""environ(?:\.get\(|\[)\s*["'](\w+)["']|getenv\(\s*["'](\w+)["']"""
            elif path.suffix in (".cpp", ".h", ".cu", ".cuh"):
                pattern = r"""getenv\(\s*"(\w+)"()"""
            else:
                continue
            names |= {first or second for first, second in re.findall(pattern, path.read_text())}
    return {name for name in names if name.startswith("PARTITA_")}


def rows_of_table(heading: str) -> set[str]:
    section = (ROOT / "DEVELOPMENT.md").read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))


def test_the_table_of_environment_switches_is_complete():
    listed = {name for name in rows_of_table("Environment switches") if name.startswith("PARTITA_")}
    assert listed == switches_in_sources()


def test_the_table_of_build_options_is_complete():
    files = [
        ROOT / "CMakeLists.txt",
        *sorted((ROOT / "csrc").glob("*.cmake")),
        ROOT / "csrc" / "simt" / "CMakeLists.txt",
    ]
    text = "\n".join(path.read_text() for path in files)
    options = set(re.findall(r"^\s*option\((\w+)", text, re.MULTILINE))
    options |= set(re.findall(r"^\s*set\((\w+)[^)]*\bCACHE\b", text, re.MULTILINE))
    assert rows_of_table("Build options") == options


def test_every_contract_has_its_own_number_and_address():
    text = (ROOT / "docs" / "contracts.md").read_text()
    entries = re.findall(r"^(\d+)\. `([a-z0-9.-]+)` ", text, re.MULTILINE)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    addresses = [address for _, address in entries]
    assert len(set(addresses)) == len(addresses) > 20


def test_no_document_names_a_machine_path():
    pattern = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/")
    found = [str(path.relative_to(ROOT)) for path in DOCUMENTS if pattern.search(path.read_text())]
    assert not found
