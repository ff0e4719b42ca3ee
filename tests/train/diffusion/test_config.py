"""Options of the trainer: YAML under the command line."""

import pytest

from d_emo.train.diffusion.config import DiffusionRunOptions, parse_config
from d_emo.train.engine.batch_layout import batch_layout


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_the_papers():
    config = parse_config(["--train-data-dir", "photos"])
    optimization, run = config.optimization, config.run
    assert (optimization.learning_rate, optimization.weight_decay, optimization.ema_decay) == (1e-4, 0.0, 0.9999)
    assert (optimization.class_dropout_prob, optimization.max_grad_norm, optimization.ema_warmup) == (0.1, None, True)
    assert (run.global_batch_size, run.max_train_steps) == (256, None)


def test_yaml_is_converted_and_the_command_line_wins(tmp_path):
    path = write(
        tmp_path, "learning_rate: 3e-4\nmodel: DiT-S-2\nrandom_flip: false\nema_warmup: true\nmax_grad_norm: null\n"
    )
    config = parse_config(["--config", path, "--model", "D-EMOv2-B-2"])
    assert config.optimization.learning_rate == 3e-4
    assert config.model.model == "D-EMOv2-B-2"
    assert config.data.random_flip is False
    assert config.optimization.ema_warmup is True
    assert config.optimization.max_grad_norm is None


def test_dashes_and_underscores_are_the_same():
    assert parse_config(["--max-train-steps", "5"]) == parse_config(["--max_train_steps", "5"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "'learning_rat' is unknown; did you mean learning_rate"),
        ("colour: 1", "'colour' is unknown; did you mean color"),
        ("wallpaper: 1", "'wallpaper' is unknown; see --help"),
        ("- 1", "expected `option: value` lines"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_config(["--config", write(tmp_path, text)])


def test_missing_file_is_refused():
    with pytest.raises(ValueError, match=r"nowhere\.yaml: there is no such file"):
        parse_config(["--config", "nowhere.yaml"])


@pytest.mark.parametrize("arguments", [["--max-train-steps", "1.5"], ["--objective", "ddpm"], ["--modle", "x"]])
def test_wrong_types_and_unknown_flags_are_refused(arguments, capsys):
    with pytest.raises((SystemExit, ValueError)) as failure:
        parse_config(arguments)
    assert arguments[0] in capsys.readouterr().err + str(failure.value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_train_steps", 0, "must be positive"),
        ("micro_batch_size", 0, "must be positive"),
        ("sample_guidance_scale", 0.5, "must be 1"),
        ("seed", -1, "must be in"),
    ],
)
def test_values_out_of_range_are_refused(name, value, rule):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}: {rule}"):
        DiffusionRunOptions(**{name: value})


def test_two_sources_are_refused():
    with pytest.raises(ValueError, match="choose one"):
        parse_config(["--dataset", "a", "--train-data-dir", "b"])


@pytest.mark.parametrize(
    ("total", "micro", "world", "on_cpu", "expected"),
    [
        (256, None, 8, False, (32, 1)),
        (256, 8, 2, False, (8, 16)),
        (256, None, 1, True, (32, 8)),
        (20, None, 1, True, (20, 1)),
        (66, None, 1, True, (22, 3)),
        (64, 64, 2, False, (32, 1)),  # the digits' recipe on a machine of two GPUs
        (64, 64, 64, False, (1, 1)),
    ],
)
def test_global_batch_is_split_evenly(total, micro, world, on_cpu, expected):
    layout = batch_layout(total, micro, world, on_cpu)
    assert (layout.micro_batch_size, layout.accumulation) == expected
    assert layout.micro_batch_size * layout.accumulation * world == total


@pytest.mark.parametrize(
    ("total", "micro", "world", "message"),
    [
        (100, None, 8, "--global-batch-size 100 cannot be shared by 8 processes; use 96"),
        (64, 24, 2, "--micro-batch-size 24 does not divide the 32 images that .*; use 16"),
    ],
)
def test_uneven_batches_are_refused(total, micro, world, message):
    with pytest.raises(ValueError, match=message):
        batch_layout(total, micro, world, False)
