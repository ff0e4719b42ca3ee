"""The tutorials: every block is run in its order on small data, and what they show was printed."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
from typing import Any

import numpy as np
import pytest
from helpers.documents import read_document, without_blocks
from helpers.paths import ROOT
from helpers.tutorials import PAGES, SHORTER, SLURM, TUTORIALS, blocks, code_of, run_page


def notebooks_script() -> Any:
    """The module that makes notebooks."""
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / ".ci" / "notebooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Pages whose outputs are of more than the tests run.
LARGER = ("your_own_pictures", "imagenet_on_a_cluster")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def assert_shown(shown: str, printed: str) -> None:
    """Every line of a page's output was printed, in this order; `...` stands for any, numbers agree to a tenth."""
    rest = iter(printed.splitlines())
    for line in shown.splitlines():
        if line.strip() != "...":
            assert any(alike(line.strip(), other.strip()) for other in rest), f"{line!r} is not in\n{printed}"


def alike(line: str, other: str) -> bool:
    """Whether two lines have the same words, and numbers that agree to a tenth."""
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (line, other)]
    return NUMBER.sub("#", line) == NUMBER.sub("#", other) and bool(np.allclose(*numbers, rtol=0.1))


def test_outputs_are_compared_line_by_line():
    assert_shown("loss 0.50\n...\n(2, 3)", "warning\nloss 0.51\nx\ny\n(2, 3)\n")
    for shown in ("loss 0.70", "(2, 3)\nloss 0.5", "lost 0.5"):
        with pytest.raises(AssertionError, match="is not in"):
            assert_shown(shown, "loss 0.50\n(2, 3)\n")


def test_every_page_is_in_the_sites_order_and_in_the_list_of_what_is_shortened():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(SHORTER) == set(PAGES)
    assert [page for page in PAGES if f"tutorials/{page}.md" not in navigation] == []


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_well_formed_and_what_is_shortened_is_there(page):
    found = blocks(page)
    assert {block.language for block in found} <= {"python", "bash", "text"}
    code = "\n".join(block.code for block in found if block.language != "text")
    for text, shorter in SHORTER[page].items():
        assert text in code, text
        code = code.replace(text, shorter)
    for number, block in enumerate(found):
        if block.language == "python":
            compile(block.code, f"{page}.md", "exec")
            assert max(map(len, block.code.splitlines())) <= 120
        elif block.language == "bash":
            subprocess.run(["bash", "-n", "-c", block.code], check=True)
        else:
            assert number and found[number - 1].language in ("python", "bash"), "an output of no block"


def test_pages_are_short():
    words = {page: len(without_blocks(read_document(f"docs/tutorials/{page}.md")).split()) for page in PAGES}
    assert len(words) == 5 and max(words.values()) <= 950, words


def test_the_clusters_job_is_taken_by_the_launchers_parser_and_the_trainers(tmp_path):
    (script,) = [block.code for block in blocks("imagenet_on_a_cluster") if "#SBATCH" in block.code]
    says = {"accelerate": 'printf "%q " "$@" > called'}
    for name, line in {**SLURM, **says}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, check=True)
    called = shlex.split((tmp_path / "called").read_text())
    options = dict(itertools.pairwise(called))
    assert options["--num_processes"] == "16" and options["--machine_rank"] == "0"
    assert options["--main_process_ip"] == "127.0.0.1"
    assert "d_emo.train.train_dit" in code_of("accelerate", called)
    from d_emo.common.command_line import parser_of
    from d_emo.train.train_dit import main

    parser_of(main).parse_args(called[called.index("d_emo.train.train_dit") + 1 :])


def test_notebooks_are_made_of_their_pages():
    script = notebooks_script()
    assert sorted(script.NOTEBOOKS) == sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))
    for name in script.NOTEBOOKS:
        text = (TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8")
        page = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
        assert text == script.notebook(page), "python .ci/notebooks.py makes it anew"
        cells = json.loads(text)["cells"]
        code = ["".join(cell["source"]).removeprefix("%%bash\n") for cell in cells if cell["cell_type"] == "code"]
        assert code == [block.code.rstrip("\n") for block in blocks(name) if block.language != "text"]
        assert "a notebook" not in "".join(cells[0]["source"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_its_first_block_to_its_last(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables, ran = run_page(page, tmp_path)
    printed = dict(ran)
    found = blocks(page)
    for before, block in itertools.pairwise(found):
        if block.language == "text" and page not in LARGER:
            assert_shown(block.code, printed[before])
    CHECKS[page](tmp_path, variables)


def check_pictures(folder, variables):
    assert (folder / "runs" / "mine-2" / "model_index.json").is_file()
    assert variables["pictures"][0].size == (16, 16)
    assert {"classes.png", "guided.png", "flower.png", "nearest.png"} <= {path.name for path in folder.iterdir()}
    assert len(list((folder / "runs" / "mine" / "evaluation").glob("*/scores.json"))) == 1


def check_cluster(folder, variables):
    assert (folder / "runs" / "B-2" / "model_index.json").is_file()
    assert (folder / "runs" / "rehearsal" / "fid" / "fid.png").is_file()
    assert (folder / "runs" / "B-2" / "evaluation" / "dit-400k" / "scores.json").is_file()


def check_scoring(folder, variables):
    scores = [folder / "evaluation" / name / "scores.json" for name in ("damaged", "real", "digits-sit-ode")]
    *found, drawn = [json.loads(path.read_text())["scores"]["fid"] for path in scores]
    assert drawn > 0
    page = read_document("docs/tutorials/scoring.md")
    shown = re.findall(r"^\| `(?:real|damaged)` \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    assert found == pytest.approx([float(number) for number in reversed(shown)], rel=0.01)
    assert (folder / "evaluation" / "sweep" / "sweep.png").is_file()


def check_own_loop(folder, variables):
    assert variables["picture"].size == (8, 8) and variables["again"].id2label[3] == "three"


def check_backbone(folder, variables):
    assert variables["history"][-1] < variables["history"][0]
    assert variables["frozen"] > 0


CHECKS = {
    "your_own_pictures": check_pictures,
    "imagenet_on_a_cluster": check_cluster,
    "scoring": check_scoring,
    "own_loop": check_own_loop,
    "backbone": check_backbone,
}
