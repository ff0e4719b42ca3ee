"""Which page a model gets is told by its folder; a classifier's answers, and the code for them."""

import signal
import socket
import tempfile

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from helpers.made import write_classifier, write_pipeline, write_segmenter

from d_emo.pipelines.demo import serving
from d_emo.pipelines.demo.app import DemoOptions, ModelOptions, main
from d_emo.pipelines.demo.classifying import classify
from d_emo.pipelines.demo.opening import Source, draws, open_model
from d_emo.pipelines.demo.snippets import classifying_code


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("models") / "classifier")


def some_picture(mode="RGB"):
    noise = np.random.RandomState(0).randint(0, 256, (40, 60, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


def test_the_folder_says_whether_a_model_draws(classifier, tmp_path):
    assert draws(open_model(Source(name=str(write_pipeline(tmp_path / "pipeline")), device="cpu")))
    assert not draws(open_model(Source(name=str(classifier), device="cpu")))


def test_models_that_do_neither_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"neither draws nor classifies pictures; name a pipeline's folder"):
        open_model(Source(name=str(write_segmenter(tmp_path / "segmenter"))))
    with pytest.raises(ValueError, match=r"nowhere"):
        open_model(Source(name=str(tmp_path / "nowhere")))


def test_a_device_that_is_not_there_is_refused(classifier):
    with pytest.raises(ValueError, match=r"--device abacus: .*; choose another, such as cpu"):
        open_model(Source(name=str(classifier), device="abacus"))


def test_a_damaged_classifier_is_refused_in_a_line(tmp_path):
    folder = write_classifier(tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"this classifier does not load") as refusal:
        open_model(Source(name=str(folder)))
    assert "\n" not in str(refusal.value)


def test_the_likeliest_classes_come_first_and_all_of_few(classifier, tmp_path):
    some_picture().save(tmp_path / "picture.png")
    size, answers = classify(open_model(Source(name=str(classifier), device="cpu")), tmp_path / "picture.png")
    assert size == (60, 40)
    assert set(answers) == {"0", "1", "2"} and sum(answers.values()) == pytest.approx(1, abs=1e-5)
    assert list(answers.values()) == sorted(answers.values(), reverse=True)


def test_grey_pictures_are_the_same_with_8_or_16_bits_or_in_transparency(classifier, tmp_path):
    grey = some_picture("L")
    inked = PIL.Image.new("LA", grey.size, 0)
    inked.putalpha(PIL.ImageOps.invert(grey))  # black on white paper
    wide = PIL.Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    model, answers = open_model(Source(name=str(classifier), device="cpu")), []
    for name, picture in {"grey": grey, "inked": inked, "wide": wide}.items():
        picture.save(tmp_path / f"{name}.png")
        answers.append(classify(model, tmp_path / f"{name}.png")[1])
    assert answers[1] == pytest.approx(answers[0]) and answers[2] == pytest.approx(answers[0])


def test_what_is_no_picture_is_refused_by_its_name(classifier, tmp_path):
    (tmp_path / "none.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"^none.png cannot be read \(no format that Pillow knows\)"):
        classify(open_model(Source(name=str(classifier), device="cpu")), tmp_path / "none.png")


def test_the_code_says_the_same(classifier, tmp_path, monkeypatch):
    source = Source(name=str(classifier), device="cpu")
    monkeypatch.chdir(tmp_path)
    some_picture().save("picture.png")
    space = {}
    exec(compile(classifying_code(source), "classify.py", "exec"), space)
    found = {answer["label"]: answer["score"] for answer in space["answers"]}
    assert found == pytest.approx(classify(open_model(source), "picture.png")[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model is missing"),
        (["--model", "x", "--port", "0"], "--port 0: ports are 1 to 65535"),
        (["--model", "x", "--port", "70000"], "--port 70000"),
        (["--model", "x", "--max-images", "0"], "--max-images 0: must be positive"),
    ],
)
def test_wrong_options_end_with_a_line(arguments, said, monkeypatch):
    monkeypatch.setattr(serving, "run", lambda options: pytest.fail("came to its work"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert said in str(stop.value.code)


def test_without_gradio_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(serving, "SILENT", {})
    with pytest.raises(SystemExit) as stop:
        main(["--model", "digits"])
    assert "pip install 'd-emo[demo]'" in str(stop.value.code)


def test_the_page_is_for_this_machine_alone_unless_asked():
    assert DemoOptions(model=ModelOptions(model="digits")).server.host == "127.0.0.1"


def test_sigterm_ends_the_page_and_leaves_no_folder_behind(tmp_path):
    with (
        pytest.raises(SystemExit) as stop,
        serving.ended_by_signals(),
        tempfile.TemporaryDirectory(dir=tmp_path),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_port_in_use_and_a_strange_host_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--host 127.0.0.1 --port {port}: nothing can listen there"):
            serving.check_address("127.0.0.1", port)
    serving.check_address("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"--host 192.0.2.7: nothing can listen there"):
        serving.check_address("192.0.2.7", None)
