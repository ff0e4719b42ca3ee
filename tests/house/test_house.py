"""The repository itself: what is installed, how long files are, what the README promises."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers.extras import needs
from helpers.import_graph import modules
from helpers.paths import ROOT

FOLDERS = {"d_emo": "d_emo", "pipelines": "d_emo/pipelines", "train": "d_emo/train", "eval": "d_emo/eval"}
# A network that only the repository has; nor does the package have documents, but for the cards of its own models.
KEPT_NETWORK = ROOT / "eval" / "benchmarks" / "gpu" / "cifar10_ti2"
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PACKAGED = ROOT / "d_emo" / "packaged"


@needs("test-all", "build")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--wheel"], id="from the tree"),
        pytest.param([], id="from the source distribution", marks=pytest.mark.slow),
    ],
)
def test_wheel_holds_the_tree_and_nothing_else(tmp_path, options):
    source = tmp_path / "source"  # a copy, so that no build folder is left in the tree
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", tmp_path, source]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, target in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            document = path.suffix == ".md" and not path.is_relative_to(PACKAGED)
            kept = "__pycache__" in path.parts or path.is_relative_to(KEPT_NETWORK) or document
            if path.is_file() and not kept:
                expected.add(f"{target}/{path.relative_to(ROOT / folder).as_posix()}")
    assert packed == expected
    assert {name.split("/")[0] for name in packed} == {"d_emo"}


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_files_stay_short_and_say_what_they_hold(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 500, path
        assert ast.get_docstring(ast.parse(text)), path


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


def test_the_readme_is_short():
    assert len(readme().split()) <= 900  # as `wc -w` counts, code and tables among them


@pytest.fixture(scope="module")
def sizes() -> str:
    """What the command of the table of sizes prints."""
    command = [sys.executable, str(ROOT / "eval" / "tables" / "model_table.py")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_the_table_of_sizes_is_what_its_command_prints(sizes):
    assert sizes in (ROOT / "docs" / "reference" / "models.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_readmes_counts_are_those_of_the_table_of_sizes(sizes):
    shown = re.findall(r"^\| ([\w-]+-2) \| ([\d,]+) \| ([\d.]+) \|", readme(), flags=re.MULTILINE)
    counted = re.findall(r"^\| ([\w-]+) \|[^|]+\| ([\d,]+) \| ([\d.]+) \|", sizes, flags=re.MULTILINE)
    assert [name for name, *_ in shown] == ["D-EMOv2-B-2", "DiT-B-2", "D-EMOv2-XL-2", "DiT-XL-2"]
    assert set(shown) <= set(counted)


def test_ci_installs_and_tests_with_the_readmes_commands():
    blocks = re.findall(r"```bash\n(.*?)```", readme(), flags=re.DOTALL)
    tests = next(block for block in blocks if "pytest" in block)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install = re.search(r'pip install .*-e "\.\[test\]"', tests)
    assert install and 'pip install -q -e ".[test]"\npip install -q -e ".[test-all]"\n' in ci
    assert tests.strip().endswith("pytest") and ci.strip().splitlines()[-1] == "pytest --cov"


def test_every_dependency_has_a_floor():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = project[project.index("\ndependencies = [") : project.index("\n[tool.")]
    requirements = [found for found in re.findall(r'"([^"\n]+)"', text) if not found.startswith("d-emo[")]
    assert len(requirements) > 20
    assert not [name for name in requirements if not re.match(r"[\w-]+>=\d", name)]


def test_hosted_ci_runs_what_the_local_one_does_on_the_oldest_and_the_newest():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    local = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "mypy", "mkdocs build --strict", "pytest --cov"):
        assert f"- run: {command}\n" in workflow and f"\n{command}\n" in local, command
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert oldest and f'python-version: "{oldest[1]}"\n            resolution: lowest-direct' in workflow


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS])
def test_files_and_modules_that_a_document_names_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:d_emo|pipelines|train|eval|tests)/[\w/.-]*\.(?:py|yaml|csv|json)\b", text):
        assert (ROOT / name).is_file(), name
    known = modules()
    for name in re.findall(r"`(d_emo(?:\.\w+)+)", text):
        module, _, attribute = name.rpartition(".")
        if name not in known:
            assert module in known, name
            assert re.search(rf"\b{attribute}\b", known[module].read_text(encoding="utf-8")), name


def test_version_has_one_source():
    import d_emo

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "d_emo.__version__" }' in project
    assert not re.search(r'^version = "', project, flags=re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", d_emo.__version__)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {d_emo.__version__}\n" in citation
    assert f"version = {{{d_emo.__version__}}}" in (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    released = re.findall(
        r"^## \[([\d.]+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert released[0][0] == d_emo.__version__ and f"\ndate-released: {released[0][1]}\n" in citation
