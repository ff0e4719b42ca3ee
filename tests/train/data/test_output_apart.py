"""Output does not come to lie among the pictures that it is made of."""

import PIL.Image
import pytest
from helpers.extras import needs
from helpers.training import run_here

from d_emo.eval import evaluate_classifier, evaluate_detector, evaluate_segmenter, evaluate_video_classifier
from d_emo.train import encode_latents, make_camera_motion, train_classifier, train_dit

COMMANDS = [
    (train_dit.main, ["--train-data-dir", "{}", "--resolution", "16", "--vae", "none"]),
    (train_dit.main, ["--dataset", "{}", "--resolution", "16", "--vae", "none"]),
    (train_classifier.main, ["--train-data-dir", "{}", "--validation-dir", "{}"]),
    (encode_latents.main, ["--train-data-dir", "{}", "--vae", "nowhere"]),
    pytest.param(make_camera_motion.main, ["--photos", "{}"], marks=needs("video")),
    (evaluate_video_classifier.main, ["--model", "nowhere", "--data-dir", "{}"]),
    (evaluate_classifier.main, ["--model", "nowhere", "--data-dir", "{}"]),
    (evaluate_detector.main, ["--model", "nowhere", "--data-dir", "{}"]),
    (evaluate_segmenter.main, ["--model", "nowhere", "--data-dir", "{}"]),
]


@pytest.mark.parametrize("inside", ["run", "a/run", "."])
@pytest.mark.parametrize(("main", "options"), COMMANDS)
def test_an_output_folder_among_the_pictures_is_refused(capsys, tmp_path, offline, main, options, inside):
    pictures = tmp_path / "pictures"
    for name in ("a", "b"):
        (pictures / name).mkdir(parents=True)
        for index in range(3):
            PIL.Image.new("RGB", (16, 16)).save(pictures / name / f"{index}.png")
    before = sorted(pictures.rglob("*"))
    (tmp_path / "link").symlink_to(pictures)
    arguments = [option.format(pictures) for option in options]
    code, output = run_here(capsys, *arguments, "--output-dir", tmp_path / "link" / inside, main=main)
    assert code != 0 and "among the pictures; choose a folder outside" in output
    assert sorted(pictures.rglob("*")) == before
