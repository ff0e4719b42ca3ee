"""transformers' whole interface: Auto classes, Trainer, image processor, labels, types of numbers, bad calls."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from helpers.models import randomize
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from d_emo import (
    EMOv2Backbone,
    EMOv2Config,
    EMOv2ForImageClassification,
    EMOv2Model,
    create_classifier,
    list_classifiers,
    make_image_processor,
)
from d_emo.classification import image_processors
from d_emo.classification.checks import check_labels
from d_emo.classification.published import checkpoint_state, import_classifier, published_state
from d_emo.models import I2RMB

TINY = {"depths": [1, 1, 2, 2], "widths": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "image_size": 64,
        "clip_window": True, "layer_scale": 1.0}  # fmt: skip


def classifier(**options):
    """A tiny classifier in eval mode, whose logits are far from zero."""
    return randomize(EMOv2ForImageClassification(EMOv2Config(**{**TINY, "num_labels": 4, **options}))).eval()


def pixels(batch=2, height=64, width=64, channels=3, seed=0):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def picture(width=90, height=70):
    return PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8))


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_one_call_saves_all_that_a_pipeline_needs(tmp_path):
    model = classifier(id2label=["cat", "dog", "cow", "hen"])
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    found = pipeline("image-classification", model=str(tmp_path))(picture(), top_k=4)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.crop_size["height"] == 64
    with torch.no_grad():
        expected = model(processor(picture(), return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0]
    scores = {entry["label"]: entry["score"] for entry in found}
    assert list(scores) == [model.config.id2label[index] for index in expected.argsort(descending=True).tolist()]
    assert [scores[name] for name in ("cat", "dog", "cow", "hen")] == pytest.approx(expected.tolist(), abs=2e-3)


def test_a_processor_that_is_there_is_kept_and_other_channels_have_none(tmp_path):
    make_image_processor(96, crop_ratio=1.0).save_pretrained(tmp_path / "own")
    classifier().save_pretrained(tmp_path / "own")
    assert AutoImageProcessor.from_pretrained(tmp_path / "own").crop_size["height"] == 96
    classifier(num_channels=1).save_pretrained(tmp_path / "grey")
    assert not (tmp_path / "grey" / "preprocessor_config.json").exists()
    with pytest.raises(ValueError, match=r"save_directory='.*config\.json' is a file; pass a folder"):
        classifier().save_pretrained(tmp_path / "own" / "config.json")


def test_auto_classes_open_the_folder_each_as_its_kind(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EMOv2Config)
    features = AutoModel.from_pretrained(tmp_path)
    assert isinstance(features, EMOv2Model) and isinstance(AutoModel.from_config(model.config), EMOv2Model)
    with torch.no_grad():
        output = features(pixels(), output_hidden_states=True)
        expected = model.emov2.forward_features(pixels())
        torch.testing.assert_close(output.last_hidden_state, expected)
        torch.testing.assert_close(output.pooler_output, expected.mean((2, 3)))
        torch.testing.assert_close(list(output.hidden_states), model.emov2.forward_stages(pixels()))
    vectors = pipeline("image-feature-extraction", model=str(tmp_path))(picture())
    assert np.array(vectors).shape == (1, 16, 2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folders_load_in_half_precision(tmp_path, dtype):
    model = classifier()
    model.save_pretrained(tmp_path)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(
            half(pixels().to(dtype)).logits.float(), model(pixels()).logits, atol=0.05, rtol=0.05
        )
        with pytest.raises(ValueError, match=rf"pixel_values are torch.float32, .*pass pixel_values.to\({dtype}\)"):
            half(pixels())
        with torch.autocast("cpu", dtype):
            assert model(pixels()).logits.dtype == dtype
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "half", dtype="auto").dtype == dtype


# ---- names of classes ------------------------------------------------------------------------------------------------


def test_names_are_a_list_or_numbered_and_come_back_from_json(tmp_path):
    for names in (["a", "b", "c"], ("a", "b", "c"), {"2": "c", "0": "a", "1": "b"}):
        config = EMOv2Config(**TINY, id2label=names)
        config.save_pretrained(tmp_path)
        for known in (config, EMOv2Config.from_pretrained(tmp_path)):
            assert known.id2label == {0: "a", 1: "b", 2: "c"} and known.label2id == {"a": 0, "b": 1, "c": 2}
            assert known.num_labels == 3
    renamed = EMOv2Config.from_pretrained(tmp_path, id2label=["x", "y"])
    assert renamed.id2label == {0: "x", 1: "y"} and renamed.label2id == {"x": 0, "y": 1}


@pytest.mark.parametrize("names", ["ab", 3, {0: "a", 2: "b"}, {"a": 0}, {1: "a"}, {None: "a"}, {0.5: "a"}])
def test_other_names_are_refused(names):
    with pytest.raises(ValueError, match=r"id2label .*; pass a list of names, or a dictionary from 0, 1, 2 and so on"):
        EMOv2Config(**TINY, id2label=names)


# ---- training --------------------------------------------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    """Twelve images of three classes, told by their brightness."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"pixel_values": pixels(1, seed=index)[0] + index % 3, "labels": index % 3}


def trainer(folder, model, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=5, use_cpu=True,
        report_to="none", disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Pictures(), eval_dataset=Pictures())


@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")  # the new name is in 5.24 only
def test_transformers_trainer_trains_keeps_the_best_and_resumes(tmp_path):
    options = {"gradient_checkpointing": True, "label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 2,
               "save_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-3}  # fmt: skip
    model = classifier(num_labels=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = trainer(tmp_path, model, max_steps=4, **options)
    first.train()
    assert all(stage.gradient_checkpointing for stage in model.emov2.stages)
    losses = [entry["eval_loss"] for entry in first.state.log_history if "eval_loss" in entry]
    best = tmp_path / f"checkpoint-{2 + 2 * losses.index(min(losses))}"
    assert first.state.best_model_checkpoint == str(best) and len(losses) == 2
    assert (best / "preprocessor_config.json").is_file()
    again = AutoModelForImageClassification.from_pretrained(best)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels()).logits, model.eval()(pixels()).logits)
    assert sum(not torch.equal(before[key], value) for key, value in model.state_dict().items()) > 50
    resumed = trainer(tmp_path, classifier(num_labels=3), max_steps=6, **options)
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).global_step == 6
    assert resumed.predict(Pictures()).predictions.shape == (12, 3)


def test_the_trainers_accumulated_gradient_is_the_mean_of_the_batches(tmp_path):
    """A model that swallowed the Trainer's `num_items_in_batch` would get their sum instead."""
    model = classifier(num_labels=3)
    expected = classifier(num_labels=3).train()
    expected.load_state_dict(model.state_dict())
    order = []
    model.register_forward_pre_hook(lambda module, args, kwargs: order.append(kwargs), with_kwargs=True)
    run = trainer(tmp_path, model, max_steps=1, gradient_accumulation_steps=2, learning_rate=0.1, optim="sgd",
                  max_grad_norm=0.0, save_strategy="no", lr_scheduler_type="constant")  # fmt: skip
    run.train()
    for given in order:
        (expected(pixel_values=given["pixel_values"], labels=given["labels"]).loss / 2).backward()
    weight = expected.emov2.head.weight
    torch.testing.assert_close(model.emov2.head.weight, weight - 0.1 * weight.grad, atol=1e-6, rtol=1e-5)
    assert len(order) == 2


@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
def test_checkpointed_gradients_are_the_plain_ones():
    models = [classifier().train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for model in models:
        torch.manual_seed(0)  # of the blocks that stochastic depth leaves out
        model(pixels(), labels=torch.tensor([0, 3])).loss.backward()
    for (key, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=key)
    for (key, one), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=key)
    models[1].gradient_checkpointing_disable()
    assert not any(stage.gradient_checkpointing for stage in models[1].emov2.stages)


# ---- losses and outputs ----------------------------------------------------------------------------------------------


def test_every_kind_of_problem_has_its_loss():
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1.0, 0, 0]])
    for options, given, loss in (
        ({}, torch.tensor([0, 3]), torch.nn.functional.cross_entropy),
        ({}, torch.tensor([0, -100]), torch.nn.functional.cross_entropy),
        ({}, torch.tensor([[0], [3]]), lambda logits, ids: torch.nn.functional.cross_entropy(logits, ids[:, 0])),
        (
            {"problem_type": "single_label_classification"},
            torch.tensor([0, 3], dtype=torch.uint8),
            torch.nn.functional.cross_entropy,
        ),
        ({"problem_type": "multi_label_classification"}, labels, torch.nn.functional.binary_cross_entropy_with_logits),
        ({"problem_type": "regression"}, labels, torch.nn.functional.mse_loss),
    ):
        model = classifier(**options)
        output = model(pixels(), labels=given)
        torch.testing.assert_close(output.loss, loss(output.logits, given))
    many = classifier(num_labels=300, problem_type="single_label_classification")
    ids = torch.tensor([156, 240])  # as bytes -100, and no class
    torch.testing.assert_close(many(pixels(), labels=ids.byte()).loss, many(pixels(), labels=ids).loss)
    one = classifier(num_labels=1)
    output = one(pixels(), labels=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(output.loss, torch.nn.functional.mse_loss(output.logits[:, 0], torch.tensor([0.5, 2.0])))


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({}, torch.tensor([0, 4]), "labels have 4, the model has 4 classes; pass a tensor (2,) of ids from 0 to 3"),
        ({}, torch.tensor([-1, 0]), "labels have -1"),
        ({}, torch.tensor([0, 1, 2]), "labels have the shape (3,)"),
        ({}, torch.tensor(1), "labels have the shape ()"),
        ({}, torch.tensor([0.0, 1.0]), "labels are torch.float32; pass a tensor (2,) of ids from 0 to 3, as integers"),
        ({}, torch.tensor([0, 1], dtype=torch.int32), "labels are torch.int32"),
        ({}, [0, 1], "labels is a list; pass a tensor (2,)"),
        ({}, torch.tensor([0, 1], dtype=torch.uint8), "labels are torch.uint8"),
        ({}, torch.ones(2, 4).long(), "as integers (labels.long()), or labels.float() for several labels an image"),
        ({"problem_type": "multi_label_classification"}, torch.ones(2, 4).long(), "takes numbers (labels.float())"),
        ({"problem_type": "regression", "num_labels": 1}, torch.tensor([0, 1]), "takes numbers (labels.float())"),
        ({}, torch.zeros(2, 3), "labels have the shape (2, 3); this model takes (2, 4)"),
        ({"problem_type": "regression"}, torch.zeros(2), "regression takes (2, 4)"),
        ({"num_labels": 0}, torch.tensor([0, 1]), "the model has no classes (num_labels=0)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(options, labels, message):
    with pytest.raises(ValueError) as caught:
        classifier(**options)(pixels(), labels=labels)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_problem_type_is_refused():
    # The configurations of older versions of transformers (5.5) take no such value in the first place.
    with pytest.raises(ValueError, match=r"^problem_type='ranking' is unknown; use regression, [^\n]*$"):
        check_labels(torch.tensor([0, 1]), 2, 4, "ranking")


@pytest.mark.parametrize("kind", [EMOv2ForImageClassification, EMOv2Model, EMOv2Backbone])
def test_a_tuple_is_returned_where_it_is_asked_for(kind):
    model = kind(EMOv2Config(**TINY)).eval()
    named = model(pixels(), output_hidden_states=True)
    plain = model(pixels(), output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple()) and len(plain[-1]) == 5
    model.config.return_dict = False
    assert isinstance(model(pixels()), tuple)
    model.config.return_dict, model.config.output_hidden_states = True, True
    assert len(model(pixels()).hidden_states) == 5


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 33, 47), (5, 224, 96), (2, 1, 1)])
def test_odd_batches_answer_as_their_images_one_by_one(shape):
    model = classifier()
    given = pixels(*shape)
    with torch.no_grad():
        together = model(given).logits
        alone = torch.cat([model(image[None]).logits for image in given])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


BAD_PIXELS = [
    (None, "pixel_values is a NoneType; pass a tensor (B, 3, H, W), as the image processor makes it"),
    ([1.0], "pixel_values is a list"),
    (np.zeros((2, 3, 64, 64)), "pixel_values is a ndarray"),
    (torch.zeros(3, 64, 64), "pixel_values have the shape (3, 64, 64), not (B, 3, H, W); for one image pass pixel_val"),
    (torch.zeros(2, 64), "pixel_values have the shape (2, 64)"),
    (torch.zeros(2, 1, 64, 64), "pixel_values have 1 channels, the model takes 3"),
    (torch.zeros(2, 64, 64, 3), "the model takes 3 (channels come second: permute(0, 3, 1, 2))"),
    (torch.zeros(0, 3, 64, 64), "pixel_values have the shape (0, 3, 64, 64): no pixel; leave out empty batches"),
    (torch.zeros(2, 3, 0, 64), "no pixel"),
    (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "pixel_values are torch.uint8; pass normalised floating-point"),
    (torch.zeros(2, 3, 64, 64, dtype=torch.float64), "pass pixel_values.to(torch.float32)"),
]


@pytest.mark.parametrize("name", ["EMOv2", "EMOv1"])
@pytest.mark.parametrize(("given", "message"), BAD_PIXELS)
def test_images_that_do_not_fit_are_refused(name, given, message):
    small = {key: value for key, value in TINY.items() if key != "image_size"}
    for model in (create_classifier(f"{name}-1M", 64, **small), EMOv2Backbone(EMOv2Config.of(f"{name}-1M", **TINY))):
        with pytest.raises(ValueError) as caught:
            model(given)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_small_image_is_refused_in_training_only():
    model = classifier().train()
    with pytest.raises(ValueError, match="one image of 32 x 32 leaves BatchNorm a single value to train on; pass 2"):
        model(pixels(1, 32, 32))
    assert model(pixels(1, 33, 32)).logits.shape == model.eval()(pixels(1, 32, 32)).logits.shape == (1, 4)
    model.train()
    for module in model.modules():  # as fine-tuning with frozen norms does
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert model(pixels(1, 32, 32)).logits.shape == (1, 4)


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traces_answer_as_the_model_for_any_batch():
    for model in (classifier().emov2, classifier(version=1, attention_type="remote").emov2):
        with torch.no_grad():
            traced = torch.jit.trace(model, pixels())
            for batch in (1, 5):
                torch.testing.assert_close(traced(pixels(batch, seed=1)), model(pixels(batch, seed=1)))
    block, tokens = randomize(I2RMB(32, 2)).eval(), torch.randn(2, 16, 16, 32)
    torch.testing.assert_close(torch.jit.trace(block, tokens)(tokens), block(tokens), atol=1e-5, rtol=1e-4)


def test_torch_export_takes_the_transformers_model_for_any_batch():
    model = classifier()
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), {"pixel_values": pixels()}, dynamic_shapes=shapes)
    with torch.no_grad():
        answer = program.module()(pixel_values=pixels(5, seed=1)).logits
        torch.testing.assert_close(answer, model(pixels(5, seed=1)).logits, atol=1e-5, rtol=1e-4)


# ---- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, -1, 2.5, "224", None, True, float("nan"), 10**12, [224]])
def test_a_side_that_is_none_is_refused_everywhere(side):
    for call in (
        lambda: make_image_processor(side),
        lambda: create_classifier("EMOv2-1M", side),
        lambda: EMOv2Config.of("EMOv2-1M", side),
    ):
        with pytest.raises(ValueError, match=r"image_size=.* is not a whole number from 1 to 65536"):
            call()


@pytest.mark.parametrize("ratio", [0, -1, 1.5, "a", None, True, float("nan"), float("inf"), 1e-9])
def test_a_crop_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match="crop_ratio"):
        make_image_processor(224, ratio)


@pytest.mark.parametrize("name", [3, None, "", "EMOv2-6M", "emov2-1m", "emov2_1m", ["EMOv2-1M"]])
def test_unknown_names_are_refused_with_those_that_were_meant(name):
    meant = "did you mean EMOv2-1M" if str(name).lower().startswith("emov2") and "6" not in name else "EMOv2-5M"
    for call in (create_classifier, EMOv2Config.of):
        with pytest.raises(ValueError, match=f"classifier .* is unknown; .*{meant}"):
            call(name)


def test_patterns_are_strings():
    assert list_classifiers("EMOv1-*M")[0] == "EMOv1-1M" and list_classifiers("none*") == []
    with pytest.raises(ValueError, match="pattern=3 is a int; pass a string"):
        list_classifiers(3)


@pytest.mark.parametrize("classes", [-1, 2.5, "3", None, True])
def test_a_number_of_classes_that_is_none_is_refused(classes):
    with pytest.raises(ValueError, match=r"num_classes=.* is not a whole number from 0"):
        create_classifier("EMOv2-1M", 64, num_classes=3).reset_classifier(classes)


def test_configurations_survive_json(tmp_path):
    config = EMOv2Config.of("EMOv2-2M", num_labels=5, problem_type="single_label_classification")
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert len(stored["id2label"]) == 5 and stored["model_type"] == "emov2"
    again, ours = AutoConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    assert {key: value for key, value in again.items() if key != "_name_or_path"} == {
        key: value for key, value in ours.items() if key != "_name_or_path"
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_classes": 3}, "EMOv2Config has no num_classes; did you mean num_labels?"),
        ({"in_channels": 1}, "EMOv2Config has no in_channels; did you mean num_channels?"),
        ({"drop_pth": 0.1}, "EMOv2Config has no drop_pth; did you mean drop_path?"),
        ({"xyz": 1}, "EMOv2Config has no xyz; it has activations, arrangement"),
        ({"to_dict": 1}, "EMOv2Config has no to_dict; it has"),
        ({"more": 1}, "EMOv2Config has no more; it has"),
        ({"num_labels": -1}, "EMOv2Config: num_labels=-1 is not a whole number from 0"),
        ({"num_labels": "3"}, "EMOv2Config: num_labels='3' is not"),
        ({"num_labels": None}, "EMOv2Config: num_labels=None is not"),
        ({"num_labels": 10**12}, "EMOv2Config: num_labels=1000000000000 is not"),
    ],
)
def test_a_configuration_refuses_what_it_would_drop(overrides, message):
    with pytest.raises(ValueError) as caught:
        EMOv2Config.of("EMOv2-1M", **overrides)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("state", [None, 3, [], {}, {1: torch.ones(1)}, {"head.weight": 3}])
def test_what_is_no_state_dictionary_is_refused(state):
    for read in (published_state, checkpoint_state, lambda given: import_classifier(given, None)):
        with pytest.raises(ValueError, match="pass a dictionary of tensors by name"):
            read(state)


@pytest.mark.parametrize("features", [None, torch.zeros(2, 180), torch.zeros(2, 5, 2, 2)])
def test_a_head_takes_features_only(features):
    with pytest.raises(ValueError, match=r"features are .*; pass what forward_features returns, \(B, 180, h, w\)"):
        create_classifier("EMOv2-1M", 64).forward_head(features)


@pytest.mark.parametrize("folder", [None, 3, ""])
def test_a_folder_that_is_none_is_refused(folder):
    with pytest.raises(ValueError, match=r"save_directory=.* is no path of a folder"):
        classifier().save_pretrained(folder)


@pytest.mark.parametrize("there", [True, False])
def test_the_processor_on_torchvision_is_named_where_torchvision_is(monkeypatch, there):
    """transformers warns of it elsewhere."""
    registered = {}
    monkeypatch.setattr(image_processors, "is_torchvision_available", lambda: there)
    monkeypatch.setattr(transformers.AutoImageProcessor, "register", lambda _, **classes: registered.update(classes))
    image_processors.register_image_processor(EMOv2Config, "Bit")
    assert registered["slow_image_processor_class"] is transformers.BitImageProcessorPil
    fast = registered["fast_image_processor_class"]
    assert fast is (transformers.BitImageProcessor if there else None)
