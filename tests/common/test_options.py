"""Command line and YAML file, derived from dataclasses: types, help, mistakes, other projects' names."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import pytest
from helpers.commands import COMMANDS as SWEPT
from helpers.commands import options_of
from helpers.paths import ROOT
from helpers.processes import offline_environment

from d_emo.common.aliases import ALIASES
from d_emo.common.command_line import CommandParser
from d_emo.common.options import OptionTable, kinds_of, option, parse_options
from d_emo.eval import evaluate_classifier, evaluate_fid
from d_emo.train.classification.config import ClassifierConfig, parse_classifier_config
from d_emo.train.diffusion.config import TrainConfig, parse_config

COMMANDS = {
    "train/train_dit.py": ("Model", "Data", "Optimization", "Run"),
    "train/train_classifier.py": ("Model", "Data", "Augmentation", "Distillation", "Optimization", "Run"),
    "train/train_video_classifier.py": ("Model", "Data", "Augmentation", "Optimization", "Run"),
    "train/make_camera_motion.py": (),
    "train/train_detector.py": ("Model", "Data", "Augmentation", "Optimization", "Run"),
    "train/encode_latents.py": ("Data", "Encoding"),
    "train/convert_dit.py": (),
    "train/convert_emov2.py": (),
    "train/make_packaged.py": (),
    "train/choose_average.py": (),
    "eval/evaluate_fid.py": ("what is scored", "running and output"),
    "eval/evaluate_classifier.py": ("model and images", "running and output"),
    "eval/evaluate_video_classifier.py": ("model and videos", "views", "running and output"),
    "eval/evaluate_detector.py": ("model and pictures", "running and output"),
    "eval/evaluate_segmenter.py": ("model and pictures", "running and output"),
    "eval/export_classifier.py": (),
    "eval/compare_runs.py": (),
    "eval/evaluate_digits.py": (),
}
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy")


@dataclass(frozen=True, kw_only=True)
class Things:
    """What is made."""

    count: int | None = option(3, "How many.")
    share: float = option(0.5, "A share, in % or so.")
    label: str = option("a", "A name.")
    precision: Literal["no", "bf16"] | None = option(None, "Type of numbers. Default: the machine's.")
    warm: bool = option(False, "Start warm.")
    mirrored: bool | None = option(None, "Mirror. Default: as it comes.")
    learning_rate: float = option(1e-4, "Rate.")
    resume_from: str | None = option(None, "A folder.")


@dataclass(frozen=True, kw_only=True)
class Table(OptionTable):
    """One group."""

    things: Things = field(default_factory=Things)


def parse(*arguments):
    return parse_options(list(arguments), Table, "make", "Makes things.\n\n    make --count 3\n\nAnd more.").things


def parse_file(tmp_path, text, *arguments):
    path = tmp_path / "make.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return parse("--config", str(path), *arguments)


def test_every_type_is_read():
    words = ("--count", "4", "--share=-1e-3", "--label", "x=y", "--precision", "no", "--warm", "--no-mirrored")
    expected = Things(count=4, share=-1e-3, label="x=y", precision="no", warm=True, mirrored=False, resume_from="a-b_c")
    assert parse(*words, "--resume_from", "a-b_c") == expected
    assert parse() == Things()
    assert parse("--share", "-1e-3").share == -1e-3  # argparse alone takes it for an option


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("False", False), ("yes", True), ("off", False), ("0", False)]
)
def test_booleans_take_a_word(text, value):
    assert parse("--warm", text).warm is parse(f"--mirrored={text}").mirrored is value


def test_yaml_means_what_the_command_line_means(tmp_path):
    text = (
        "count: 4\nshare: 1e-3\nlabel: no\nprecision: no\nwarm: on\nmirrored: false\nlearning-rate: 3.0e-4\n"
        "resume_from: null\n"
    )
    read = parse_file(tmp_path, text)
    assert read == Things(
        count=4, share=1e-3, label="no", precision="no", warm=True, mirrored=False, learning_rate=3e-4
    )
    assert parse_file(tmp_path, "precision: off").precision == "no"
    assert parse_file(tmp_path, text, "--count", "5", "--no-warm") == Things(
        **{**vars(read), "count": 5, "warm": False}
    )
    assert parse_file(tmp_path, "") == Things()


@pytest.mark.parametrize("given", ["--num-epochs 5", "--max-train-steps 7"])
def test_one_way_to_say_the_length_takes_the_place_of_the_other_in_a_file(tmp_path, given):
    name, value = given.split()
    fields = {"--num-epochs": "num_epochs", "--max-train-steps": "max_train_steps"}
    (tmp_path / "run.yaml").write_text("\n".join(f"{field}: 3" for option, field in fields.items() if option != name))
    for file in (["--config", str(tmp_path / "run.yaml")], []):  # without it, the digits' recipe
        run = parse_config([*file, name, value]).run
        assert {field: getattr(run, field) for field in fields.values()} == {
            field: float(value) if option == name else None for option, field in fields.items()
        }
    (tmp_path / "both.yaml").write_text("num_epochs: 3\nmax_train_steps: 3")
    with pytest.raises(ValueError, match="both say how long"):
        parse_config(["--config", str(tmp_path / "both.yaml")])


def test_a_mapping_in_yaml_is_json_with_numbers(tmp_path):
    text = "model_config: {attention_type: remote, layer_scale: 1e-6}"
    (tmp_path / "run.yaml").write_text(text)
    config = parse_classifier_config(["--config", str(tmp_path / "run.yaml")])
    assert config.model.overrides() == {"attention_type": "remote", "layer_scale": 1e-6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: 1\nshare: x", r"make\.yaml, line 2: share: 'x' is not a number"),
        ("count: 1.5", r"line 1: count: '1\.5' is not a whole number"),
        ("share: .nan", "'.nan' is not a number"),
        ("share: nan", "'nan' is not a finite number"),
        ("warm: maybe", "'maybe' is neither true nor false"),
        ("precision: fp8", "'fp8' is none of no, bf16"),
        ("count: [1, 2]", "count takes one value, not a list"),
        ("count: {a: 1}", "is not a whole number"),
        ("count: 1\n\tshare: 2", r"line 2: no YAML .*'\\t'.*indent with spaces"),
        ("count: 1\nshare: 'x", "no YAML"),
        ("count: 1\ncount: 2", "line 2: count is given twice"),
        ("learning_rate: 1\nlearning-rate: 1", "line 2: learning_rate is given twice"),
        ("3", "expected `option: value` lines"),
        ("[a]: 1", "expected `option: value` lines"),
        ("a: 1\n---\nb: 2", "no YAML"),
        (b"\xff\xfe\x00", "make.yaml"),
        ("lr: 1\ncolour: 2\nlabell: x", "'lr' is unknown; it is learning_rate here.*'colour' is unknown.*label"),
    ],
)
def test_mistakes_in_files_are_one_line_with_their_place(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as failure:
        parse_file(tmp_path, text)
    assert "\n" not in str(failure.value) and "--config" in str(failure.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--count 1.5", "make: --count: '1.5' is not a whole number"),
        ("--share x", "make: --share: 'x' is not a number"),
        ("--share inf", "make: --share: 'inf' is not a finite number"),
        ("--precision fp8", "make: --precision: 'fp8' is none of no, bf16"),
        ("--warm maybe", "make: --warm: 'maybe' is neither true nor false"),
        ("--count", "make: --count: expected one argument"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as failure:
        parse(*arguments.split())
    assert failure.value.code == 2 and capsys.readouterr().err == message + "\n"


def test_all_unknown_options_are_in_one_message():
    with pytest.raises(ValueError) as failure:
        parse("--lr", "1", "--colour", "red", "--counts", "3", "--ckpt=x", "-x")
    assert str(failure.value) == (
        "--lr is --learning-rate here. --colour is not an option; see --help for the options. "
        "--counts is not an option; did you mean count? "
        "--ckpt is --resume-from here. -x is not an option; see --help for the options."
    )
    with pytest.raises(ValueError, match="red: no option takes this"):
        parse("--count", "3", "red")


@pytest.mark.parametrize(
    ("arguments", "answers"),
    [
        ("--lr 1 --epochs 3 --results-dir x", ["--learning-rate", "--num-epochs", "--output-dir"]),
        ("--ckpt x --cfg-scale 4 --wandb", ["--resume-from", "--sample-guidance-scale", "--report-to wandb"]),
        ("--ema --image-size 3 --data-path x", ["--ema-decay", "--resolution", "--train-data-dir"]),
        ("--train_batch_size 3 --num_train_epochs 3", ["--global-batch-size", "--num-epochs"]),
    ],
)
def test_people_of_other_projects_are_answered(arguments, answers):
    with pytest.raises(ValueError) as failure:
        parse_config(arguments.split())
    for answer in answers:
        assert f"is {answer}" in str(failure.value)


# What people type who come from other projects, by the command that they type it after.
OTHERS = {
    "DiT, SiT": (parse_config, """--data-path --results-dir --num-classes --image-size --epochs --global-seed --ckpt
        --ckpt-every --cfg-scale --num-sampling-steps --path-type --loss-weight --sample-eps --train-eps --wandb --tf32
        --per-proc-batch-size --num-fid-samples --sample-dir --atol --rtol --sampling-method --diffusion-form
        --last-step --last-step-size --diffusion-norm --reverse --likelihood"""),
    "guided-diffusion": (parse_config, """--data_dir --lr --lr_anneal_steps --batch_size --microbatch --ema_rate
        --log_interval --save_interval --resume_checkpoint --use_fp16 --fp16_scale_growth --num_channels --num_heads
        --num_res_blocks --num_heads_upsample --num_head_channels --attention_resolutions --channel_mult --class_cond
        --use_checkpoint --use_scale_shift_norm --resblock_updown --use_new_attention_order --learn_sigma
        --diffusion_steps --noise_schedule --timestep_respacing --use_kl --predict_xstart --rescale_timesteps
        --rescale_learned_sigmas --clip_denoised --model_path --classifier_path --classifier_scale"""),
    "EDM": (parse_config, """--outdir --data --cond --arch --precond --duration --batch --batch-gpu --cbase --cres --lr
        --ema --augment --xflip --fp16 --ls --bench --workers --desc --nosubdir --tick --snap --dump --transfer
        --resume --network --sigma_min --sigma_max --rho --S_churn --status --snapshot --P_mean --P_std --guidance"""),
    "Diffusers": (parse_config, """--pretrained_model_name_or_path --revision --variant --dataset_name
        --dataset_config_name --caption_column --max_train_samples --validation_prompts --cache_dir --center_crop
        --train_batch_size --num_train_epochs --gradient_accumulation_steps --scale_lr --snr_gamma --dream_training
        --use_8bit_adam --allow_tf32 --use_ema --offload_ema --foreach_ema --dataloader_num_workers
        --adam_weight_decay --adam_epsilon --hub_token --prediction_type --logging_dir --local_rank
        --checkpointing_steps --checkpoints_total_limit --resume_from_checkpoint --noise_offset --validation_epochs
        --enable_xformers_memory_efficient_attention --tracker_project_name --instance_data_dir --class_data_dir
        --instance_prompt --class_prompt --with_prior_preservation --prior_loss_weight --train_text_encoder
        --num_validation_images --validation_prompt --set_grads_to_none --overwrite_output_dir --eval_batch_size
        --save_images_epochs --save_model_epochs --ema_inv_gamma --ema_power --ema_max_decay --logger
        --ddpm_num_steps --ddpm_num_inference_steps --ddpm_beta_schedule --hub_private_repo --rank"""),
    "timm": (parse_classifier_config, """--data-dir --train-split --val-split --class-map --pretrained --resume
        --initial-checkpoint --num-classes --gp --img-size --input-size --crop-pct --mean --std --interpolation -b -vb
        --channels-last --grad-accum-steps --model-kwargs --torchscript --torchcompile --device --amp --amp-dtype
        --local_rank --opt --opt-eps --opt-betas --momentum --clip-grad --clip-mode --layer-decay --sched --lr
        --lr-base --warmup-lr --min-lr --epoch-repeats --start-epoch --cooldown-epochs --patience-epochs --no-aug
        --train-crop-mode --scale --ratio --hflip --vflip --aa --aug-repeats --jsd-loss --bce-loss --reprob --remode
        --mixup-prob --mixup-off-epoch --smoothing --drop --drop-path --sync-bn --dist-bn --model-ema
        --model-ema-decay --model-ema-warmup --worker-seeding --log-interval --recovery-interval --checkpoint-hist
        -j --workers --pin-mem --output --experiment --eval-metric --tta --log-wandb --wandb-project"""),
    "torchvision": (parse_classifier_config, """--data-path -b -j --opt --lr --momentum --wd --norm-weight-decay
        --mixup-alpha --cutmix-alpha --lr-scheduler --lr-warmup-epochs --lr-warmup-method --lr-step-size --lr-gamma
        --lr-min --print-freq --resume --start-epoch --cache-dataset --sync-bn --test-only --ra-magnitude
        --random-erase --amp --world-size --dist-url --model-ema --model-ema-steps --val-resize-size
        --train-crop-size --clip-grad-norm --ra-sampler --weights --backend --use-deterministic-algorithms"""),
    "transformers": (parse_classifier_config, """--do_train --do_eval --fp16 --eval_strategy --save_strategy
        --per_device_train_batch_size --load_best_model_at_end --train_val_split --max_train_samples --token
        --max_eval_samples --trust_remote_code --warmup_ratio --lr_scheduler_type --metric_for_best_model"""),
    "FID tools": (evaluate_fid.main, """--input1 --input2 --isc --fid --kid --prc --gpu --device --dims --save-stats
        --feature-extractor --num-fid-samples --cfg-scale --num-sampling-steps --ckpt --data-path --global-seed
        --per-proc-batch-size --num_samples --use_ddim --timestep_respacing --model_path --images --ref --num --network
        --solver --class --guidance"""),
    "timm's validate": (evaluate_classifier.main, """--checkpoint --workers -j -b --pretrained --class-map --device
        --val-dir --data-path --num-gpu --tta --channels-last"""),
}  # fmt: skip


@pytest.mark.parametrize("project", OTHERS)
def test_every_option_of_another_project_gets_ours_or_a_reason(capsys, project):
    parser, typed = OTHERS[project]
    unanswered = []
    for name in typed.split():
        with pytest.raises((ValueError, SystemExit)) as failure:
            parser([name, "1"])
        said = capsys.readouterr().err + str(failure.value)
        if not re.search(f"{re.escape(name)} (is --[a-z]|has no counterpart here: .+)", said):
            unanswered.append(said)
    assert not unanswered


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("-b64 -j8",
         "-b64 is --global-batch-size (images a step, over all processes) here. -j8 is --num-workers here."),
        ("model=DiT-B-2 optimizer.lr=1 +seed=3",
         "model=DiT-B-2 is --model DiT-B-2 here. optimizer.lr=1 is --learning-rate here. +seed=3 is --seed 3 here."),
        ("imagenet/train --seed 3",
         "imagenet/train: no option takes this; values follow their option, and images are named with "
         "--train-data-dir."),
    ],
)  # fmt: skip
def test_other_ways_to_write_options_are_answered(arguments, answer):
    with pytest.raises(ValueError) as failure:
        parse_config(arguments.split())
    assert str(failure.value).startswith(answer)


def test_words_before_evaluators_options_are_answered_before_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        evaluate_fid.main(["reference.npz", "samples.npz"])
    said = capsys.readouterr().err
    assert "samples.npz: no option takes this" in said and "--samples and --reference" in said


def test_the_version_is_told(capsys):
    import d_emo

    with pytest.raises(SystemExit) as stop:
        parse_config(["--version"])
    assert not stop.value.code and capsys.readouterr().out == f"train_dit (d_emo {d_emo.__version__})\n"


def test_units_stand_for_values_in_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    printed = capsys.readouterr().out
    for line in ("--sample-every STEPS", "--num-epochs EPOCHS", "--train-data-dir FOLDER", "--resolution PIXELS",
                 "--fid-images IMAGES", "--learning-rate X", "--num-workers PROCESSES"):  # fmt: skip
        assert f"  {line} " in printed, line


def test_aliases_name_options_that_exist():
    """Every candidate is an option of some command, and no alias hides an option of a trainer that knows it."""
    tables = [{f.name for group in fields(table) for f in fields(group.default_factory)} for table in
              (TrainConfig, ClassifierConfig)]  # fmt: skip
    texts = [(ROOT / path).read_text() for path in (*COMMANDS, "eval/throughput.py")]
    known = set().union(*tables)
    for text in texts:
        known |= {name.replace("-", "_") for name in re.findall(r'add_argument\(\s*"--([a-z-]+)"', text)}
    known |= {"batch_size"}  # encode_latents
    for alias, candidates in ALIASES.items():
        for candidate in candidates:
            assert candidate.split()[0] in known, alias


def test_help_has_groups_types_examples_and_each_default_once(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    printed = capsys.readouterr().out
    assert "Things:\n  What is made." in printed and "examples:\n  make --count 3" in printed
    assert "--count N " in printed and "--precision {no,bf16}" in printed and "--warm [true|false]" in printed
    assert "How many. Default: 3." in printed and "A share, in % or so. Default: 0.5." in printed
    assert printed.count("Default: the machine's") == 1 and "no-warm" not in printed and "_" not in printed


def test_names_that_stand_in_for_heavy_modules_are_the_same():
    """Light modules repeat a few tuples of modules that import PyTorch."""
    from d_emo import export
    from d_emo.classification import checkpoint_files
    from d_emo.eval import export_classifier
    from d_emo.eval.fid.names import GUIDERS, PRESET_NOTES
    from d_emo.eval.fid.protocol import PRESETS, SamplerName
    from d_emo.images import latent_manifest
    from d_emo.pipelines import guidance, sample
    from d_emo.schedulers.flow_paths import PATHS
    from d_emo.train.diffusion import encode_config
    from d_emo.train.diffusion.config import OptimizationOptions
    from d_emo.train.diffusion.objectives import PREDICTIONS

    assert export_classifier.FORMATS == export.FORMATS and encode_config.DTYPES == latent_manifest.DTYPES
    assert list(PRESET_NOTES) == list(PRESETS)
    assert tuple(guidance.GUIDERS) == sample.GUIDERS == GUIDERS
    kinds = kinds_of(OptimizationOptions)
    assert kinds["flow_path"].choices == PATHS and kinds["prediction"].choices == tuple(PREDICTIONS)
    assert set(checkpoint_files.WEIGHTS) == {"averaged", "raw"}
    samplers = next(action for action in options_of(SWEPT["evaluate_fid"]) if action.dest == "sampler").choices
    assert tuple(samplers) == get_args(SamplerName)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_before_anything_heavy(command):
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        f"    print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    environment = {**offline_environment(), "HOME": os.environ.get("HOME", "")}
    done = subprocess.run([sys.executable, "-c", code, ROOT / command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    help_text, _, loaded = done.stdout.strip().rpartition("\n")
    assert loaded == "[]" and "examples:" in help_text
    for group in COMMANDS[command]:
        assert f"\n{group}:" in help_text or f"\n{group} (" in help_text, group


def test_commands_by_hand_have_the_same_manners(capsys):
    parser = CommandParser("do", "Does.")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="Guidance.")
    assert parser.parse_args(["--guidance_scale", "2"]).guidance_scale == 2
    for arguments, message in (
        (["--cfg-scale", "2", "--colour"], "--cfg-scale is --guidance-scale here. --colour is not an option"),
        (["--guidance-scale", "x"], "do: --guidance-scale: invalid float value: 'x'"),
    ):
        with pytest.raises(SystemExit) as failure:
            parser.parse_args(arguments)
        assert failure.value.code == 2 and message in capsys.readouterr().err
