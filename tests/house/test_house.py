"""The repository itself: what is installed, who imports whom, what the README promises."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.paths import ROOT

FOLDERS = {"d_emo": "d_emo", "pipelines": "d_emo/pipelines", "train": "d_emo/train", "eval": "d_emo/eval"}
# Imports flow one way: what each folder may import of this project.
MAY_IMPORT = {
    "d_emo": {"d_emo"},
    "pipelines": {"d_emo", "pipelines"},
    "eval": {"d_emo", "pipelines", "eval"},
    "train": {"d_emo", "pipelines", "eval", "train"},
}
PYTHON_FILES = sorted(path for folder in [*FOLDERS, "tests"] for path in (ROOT / folder).rglob("*.py"))


def test_wheel_holds_the_tree_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a copy, so that no build folder is left in the tree
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, target in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{target}/{path.relative_to(ROOT / folder).as_posix()}")
    assert packed == expected
    assert {name.split("/")[0] for name in packed} == {"d_emo"}


def imported_folders(path: Path) -> set[str]:
    """Which of the project's folders a module imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [module.split(".") for module in modules if module.split(".")[0] == "d_emo"]
    return {part[1] if len(part) > 1 and part[1] in FOLDERS else "d_emo" for part in parts}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_flow_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        if path == ROOT / "d_emo" / "__init__.py":
            continue  # the public face, which gathers the models and the pipeline
        assert imported_folders(path) <= MAY_IMPORT[folder], path


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short_and_say_what_they_hold(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 500
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_functions_have_docstrings(folder):
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [
            node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        ]
        assert not [node.name for node in public if not ast.get_docstring(node)], path


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_table_is_what_its_command_prints():
    command = [sys.executable, str(ROOT / "eval" / "tables" / "model_table.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert printed in readme()


def test_ci_installs_and_tests_with_the_readmes_commands():
    blocks = re.findall(r"```bash\n(.*?)```", readme(), flags=re.DOTALL)
    tests = next(block for block in blocks if "pytest" in block)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install = re.search(r'pip install .*-e "\.\[test\]"', tests)
    assert install and 'pip install -q -e ".[test]"' in ci
    assert tests.strip().endswith("pytest") and ci.strip().endswith("pytest")


def test_readme_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", readme()):
        assert (ROOT / target).exists(), target


def test_version_has_one_source():
    import d_emo

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "d_emo.__version__" }' in project
    assert not re.search(r'^version = "', project, flags=re.MULTILINE)
    assert f"version: {d_emo.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
