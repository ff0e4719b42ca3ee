"""The tutorials of docs/tutorials: their blocks, the data that they begin with, their commands as forked processes."""

import contextlib
import io
import json
import os
import re
import shlex
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from helpers.paths import ROOT
from helpers.processes import Script

TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted(path.stem for path in TUTORIALS.glob("*.md"))

# What the tests make smaller, by page: texts of its code, and what they become. Nothing else of a page is changed.
SHORTER: dict[str, dict[str, str]] = {
    "your_own_pictures": {
        "range(200)": "range(12)",
        "--resolution 32": "--resolution 16",  # distances of pixels take their number cubed
        "--max-train-steps 600": "--max-train-steps 4 --global-batch-size 4 --sample-steps 2",
        "every 150": "every 2",
        "--num-images 8": "--num-images 1",
        "--num-images 400": "--num-images 24 --steps 2",
        "num_images_per_label=4": "num_images_per_label=4, num_inference_steps=2",
        "--labels flower": "--labels flower --steps 2 --num-images 1",
    },
    "imagenet_on_a_cluster": {
        "--resolution 256": "--resolution 16",
        "--vae stabilityai/sd-vae-ft-ema": "--vae tiny-vae",
        # The paper's network and batch, without the comparison of its losses.
        "--model D-EMOv2-B-2": "--model D-EMOv2-N-2 --mixed-precision no --resolution 16 --vae tiny-vae",
        "--micro-batch-size 32": "--global-batch-size 4 --micro-batch-size 2 --sample-steps 2",
        "--micro-batch-size 16": "--global-batch-size 4 --micro-batch-size 2 --sample-steps 2 --max-train-steps 4",
        "--max-train-steps 100 --checkpoint-every 50": "--max-train-steps 4 --checkpoint-every 2",
        "--fid-every 50 ": "--fid-every 2 --fid-images 4 --fid-features pixels ",
        "--fid-every 50000": "--checkpoint-every 2 --fid-every 4 --fid-images 4 --fid-features pixels",
        "--preset dit-400k": "--preset dit-400k --num-images 4 --steps 2 --features pixels --metrics fid "
        "--vae tiny-vae",
    },
    "scoring": {
        "--preset quick --num-images 500": "--preset quick --num-images 40 --steps 2",
        "--preset sit-ode --num-images 500": "--preset sit-ode --num-images 40 --steps 2",
        "--sweep-images 200": "--sweep-images 20",
    },
    "own_loop": {"STEPS, BATCH, FOLDER = 1000, 128": "STEPS, BATCH, FOLDER = 3, 128"},
    "backbone": {},
}
# How long a command may take.
SECONDS = 900
# Of the cluster's commands, which no test has: SLURM's run here, in one process.
SLURM = {
    "sbatch": 'SLURM_JOB_NODELIST=here SLURM_NNODES=2 SLURM_NODEID=0 exec bash "$1"',
    "srun": 'exec "$@"',
    "scontrol": "echo 127.0.0.1",
}


class Block(NamedTuple):
    """A block of a page.

    Attributes:
        language: python, bash, or text: what the block before it printed.
        code: its lines.
    """

    language: str
    code: str


def blocks(page: str, place: Path = TUTORIALS) -> list[Block]:
    """A page's blocks in their order."""
    text = (place / f"{page}.md").read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)]


def shortened(page: str, code: str) -> str:
    """A block's code as the tests run it."""
    for text, shorter in SHORTER[page].items():
        code = code.replace(text, shorter)
    return code


def make_data(page: str, folder: Path) -> None:
    """What a page's reader has at hand: tiny pictures, a tiny autoencoder."""
    random = np.random.default_rng(0)
    if page == "imagenet_on_a_cluster":
        from helpers.autoencoders import tiny_autoencoder

        for name in ("n01440764", "n01443537"):
            place = folder / "imagenet" / "train" / name
            place.mkdir(parents=True)
            for number in range(6):
                pixels = random.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(place / f"{number}.png")
        tiny_autoencoder().save_pretrained(folder / "tiny-vae")
        images = random.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
        np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", images)


class Server(socketserver.ThreadingUnixStreamServer):
    """Runs `d-emo` and `accelerate launch` of a page's shell in processes forked from one that has imported it all."""

    daemon_threads = True
    block_on_close = False


class Handler(socketserver.StreamRequestHandler):
    """One command: {"program", "arguments", "folder"} in, {"code", "output"} out."""

    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        try:
            code = code_of(request["program"], request["arguments"])
        except SystemExit as stop:
            self.answer(int(stop.code or 1), f"{request} is not taken by its parser\n")
            return
        with tempfile.TemporaryDirectory() as folder:
            prefix = f"import os, sys\nos.chdir({request['folder']!r})\n"
            with Script(Path(folder) / "log", "-c", prefix + code) as running:
                try:
                    done = running.finish(SECONDS)
                except AssertionError:  # not in time
                    done = 124
                self.answer(done, running.output)

    def answer(self, code: int, output: str) -> None:
        self.wfile.write(json.dumps({"code": code, "output": output}).encode())


def code_of(program: str, arguments: list[str]) -> str:
    """Python code that does what a command does; of Accelerate's launcher, in one process."""
    if program == "d-emo":
        return f"from d_emo.cli.main import main\nsys.exit(main({arguments!r}))"
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    options = launch_command_parser().parse_args(arguments[1:])
    assert options.module and (options.config_file is None or (ROOT / options.config_file).is_file())
    called = [options.training_script, *options.training_script_args]
    return f"import runpy\nsys.argv = {called!r}\nrunpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = {{"program": sys.argv[1], "arguments": sys.argv[2:], "folder": os.getcwd()}}
    server.sendall(json.dumps(request).encode() + b"\\n")
    answer = json.loads(b"".join(iter(lambda: server.recv(65536), b"")))
sys.stdout.write(answer["output"])
sys.exit(answer["code"])
"""


@contextlib.contextmanager
def shell(folder: Path) -> Iterator[dict[str, str]]:
    """An environment whose PATH has `d-emo`, `accelerate` and SLURM's commands, as they run in the tests."""
    programs = folder / ".programs"
    programs.mkdir()
    with Server(str(programs / "socket"), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (programs / "client.py").write_text(CLIENT.format(address=str(programs / "socket")))
        client = shlex.join([sys.executable, "-S", "-E", str(programs / "client.py")])
        run = {name: f'exec {client} {name} "$@"' for name in ("d-emo", "accelerate")}
        for name, line in {**run, **SLURM}.items():
            (programs / name).write_text(f"#!/bin/bash\n{line}\n")
            (programs / name).chmod(0o755)
        yield {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        server.shutdown()


def run_page(page: str, folder: Path) -> tuple[dict, list[tuple[Block, str]]]:
    """Run a page's blocks in a folder, in which the process must be.

    Returns:
        The variables of its Python, and every block that was run with what it printed.
    """
    make_data(page, folder)
    variables: dict = {"__name__": "tutorial"}
    whole = blocks(page)
    ran = run_blocks([block._replace(code=shortened(page, block.code)) for block in whole], folder, variables)
    run_ones = [block for block in whole if block.language != "text"]
    return variables, [(block, printed) for block, (_, printed) in zip(run_ones, ran, strict=True)]


def run_blocks(found: list[Block], folder: Path, variables: dict) -> list[tuple[Block, str]]:
    """Run blocks in a folder, in which the process must be.

    Args:
        found: the blocks; those of text are passed over.
        folder: the folder.
        variables: of Python, which the blocks read and set.

    Returns:
        Every block that was run with what it printed.
    """
    ran = []
    with shell(folder) as environment:
        for block in found:
            code = block.code
            if block.language == "python":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(code, "<block>", "exec"), variables)
                ran.append((block, printed.getvalue()))
            elif block.language == "bash":
                command = ["bash", "-euo", "pipefail", "-c", code]
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
                ran.append((block, done.stdout))
    return ran
