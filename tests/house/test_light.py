"""`import d_emo` loads nothing heavy, and Diffusers and transformers find its classes in whichever order they come."""

import importlib
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.pipelines import tiny_pipeline
from helpers.processes import offline_environment

import d_emo
from d_emo import EMOv2Config, EMOv2ForImageClassification, make_video_processor, registration
from d_emo.classification.transformers_models import make_image_processor

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "datasets", "sklearn", "matplotlib", "timm")

# Ways to come to the package and to the libraries. The rarer ones enter transformers in the middle.
ORDERS = {
    "d_emo_first": "import d_emo",
    "libraries_first": "from diffusers import DiffusionPipeline; from transformers import AutoBackbone; import d_emo",
    "pipeline_only": "from d_emo import DEMOPipeline",
}
RARER = {
    "libraries_untouched": "import diffusers, transformers, d_emo",
    "kernels_only": "import d_emo.kernels",
    "attribute_first": "import d_emo; d_emo.list_models()",
    "private_path": "import d_emo; from diffusers.pipelines.pipeline_utils import DiffusionPipeline",
    "hooks_first": "import d_emo, diffusers.hooks",
    "configuration_first": "import d_emo; from transformers import AutoConfig",
    "models_first": "import d_emo; from transformers import PreTrainedModel",
    "trainer_first": "import d_emo; from transformers import Trainer",
    "processor_first": "from transformers import AutoImageProcessor; import d_emo",
    "auto_models_inside": "import d_emo, transformers.models.llava.modeling_llava",
    "modeling_first": "import d_emo, transformers.models.auto.modeling_auto",
    "ours_first": "import d_emo; d_emo.EMOv2Config.of('EMOv2-1M')",
    "timm_first": "import d_emo, timm",
    "a_configurations_module": "import d_emo.classification.transformers_config",
    "another_configurations_module": "import d_emo.segmentation.unet_config",
}


def in_a_fresh_process(code, *arguments):
    environment = {**offline_environment(), "HOME": os.environ.get("HOME", "")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A tiny pipeline as it is saved; what the file says of it is an interface."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DEMOPipeline" and index["transformer"] == ["d_emo", "DEMOTransformer2DModel"]
    return folder


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    """A tiny classifier with its processor."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 1, 1), "widths": (16, 16, 16, 16), "head_dims": (8, 8, 8, 8)}
    EMOv2ForImageClassification(EMOv2Config.of("EMOv2-1M", 64, num_labels=3, **sizes)).save_pretrained(folder)
    make_image_processor(64).save_pretrained(folder)
    return folder


def test_import_loads_none_of_the_libraries():
    printed = in_a_fresh_process(f"import sys, d_emo; print([name for name in {HEAVY} if name in sys.modules])")
    assert printed.strip() == "[]"


@pytest.mark.slow
def test_every_name_resolves_and_is_listed():
    assert set(d_emo._HOMES) == set(d_emo.__all__)
    code = (
        "import d_emo\n"
        "assert set(d_emo.__all__) <= set(dir(d_emo))\n"
        "names = {}\n"
        "exec('from d_emo import *', names)\n"
        "assert all(names[name] is getattr(d_emo, name) for name in d_emo.__all__)\n"
        "for module in ('detection', 'export', 'kernels', 'timm_models', 'models', 'pipelines', 'video'):\n"
        "    assert getattr(d_emo, module).__name__ == f'd_emo.{module}'\n"
        "assert not hasattr(d_emo, 'colour')\n"
    )
    in_a_fresh_process(code)


@pytest.mark.parametrize(
    "order", ["d_emo_first", *(pytest.param(name, marks=pytest.mark.slow) for name in [*ORDERS, *RARER][1:])]
)
def test_both_libraries_find_the_classes(order, pipeline_folder, classifier_folder, tmp_path):
    code = (
        f"{(ORDERS | RARER)[order]}\n"
        "import sys\n"
        "from diffusers import DiffusionPipeline\n"
        "from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModelForImageClassification\n"
        "from transformers import pipeline as task\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "pipeline.save_pretrained(sys.argv[3] + '/pipeline')\n"
        "config = AutoConfig.from_pretrained(sys.argv[2])\n"
        "model = AutoModelForImageClassification.from_pretrained(sys.argv[2])\n"
        "model.save_pretrained(sys.argv[3])\n"
        "AutoImageProcessor.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[3])\n"
        "import d_emo, diffusers, PIL.Image\n"
        "assert type(pipeline) is diffusers.DEMOPipeline is d_emo.DEMOPipeline\n"
        "assert type(pipeline.transformer) is diffusers.DEMOTransformer2DModel\n"
        "assert diffusers.FlowMatchODESolverScheduler is d_emo.FlowMatchODESolverScheduler\n"
        "assert not hasattr(diffusers, 'colour')\n"
        "assert type(model) is d_emo.EMOv2ForImageClassification and type(config) is d_emo.EMOv2Config\n"
        "assert type(AutoBackbone.from_config(config)) is d_emo.EMOv2Backbone\n"
        "import torch; from transformers import AutoModelForSemanticSegmentation\n"
        "with torch.device('meta'):\n"
        "    config = AutoConfig.for_model('emov2_segmentation', head='pspnet')\n"
        "    assert type(AutoModelForSemanticSegmentation.from_config(config)) is d_emo.EMOv2ForSemanticSegmentation\n"
        "    config = AutoConfig.for_model('u_emov2')\n"
        "    assert type(AutoModelForSemanticSegmentation.from_config(config)) is d_emo.UEMOv2ForSemanticSegmentation\n"
        "answer = task('image-classification', model=sys.argv[3])(PIL.Image.new('RGB', (70, 64)))\n"
        "assert len(answer) == 3, answer\n"
    )
    in_a_fresh_process(code, pipeline_folder, classifier_folder, tmp_path)
    texts = [(folder / "model_index.json").read_text() for folder in (pipeline_folder, tmp_path / "pipeline")]
    before, after = ({name: entry for name, entry in json.loads(text).items() if name[0] != "_"} for text in texts)
    assert before == after


# The video processor's name is in the folder, and AutoVideoProcessor looks at no configuration.
VIDEO_ORDERS = {
    "d_emo_first": "import d_emo; from transformers import AutoVideoProcessor",
    "auto_class_first": "from transformers import AutoVideoProcessor; import d_emo",
    "another_processor_first": "import transformers, d_emo; transformers.VideoMAEVideoProcessor",
    "ours_first": "import d_emo; d_emo.make_video_processor()",
    "pipelines_first": "import d_emo, transformers.pipelines",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["d_emo_first", *(pytest.param(name, marks=pytest.mark.slow) for name in [*VIDEO_ORDERS][1:])]
)
def test_transformers_finds_the_video_processor_by_its_name(order, tmp_path):
    make_video_processor(32).save_pretrained(tmp_path)
    code = (
        f"{VIDEO_ORDERS[order]}\n"
        "import sys\n"
        "from transformers import AutoVideoProcessor\n"
        "print(AutoVideoProcessor.from_pretrained(sys.argv[1]).size['shortest_edge'])\n"
    )
    assert in_a_fresh_process(code, tmp_path).strip() == "32"


@pytest.mark.parametrize("home", registration.CONFIGURATIONS)
def test_configurations_import_no_auto_class_which_would_import_the_other_configurations(home):
    source = inspect.getsource(importlib.import_module(home))
    assert "transformers.models.auto" not in source and "import Auto" not in source


@pytest.mark.slow
def test_the_hook_leaves_no_trace():
    code = (
        "import sys, d_emo, inspect\n"
        "from d_emo import registration\n"
        "assert registration._WAITING in sys.meta_path\n"
        "import diffusers.pipelines.pipeline_loading_utils as utils, diffusers.hooks, d_emo.models\n"
        "from transformers import AutoConfig, AutoVideoProcessor\n"
        "assert registration._WAITING not in sys.meta_path\n"
        "assert type(utils.__loader__).__name__ == type(utils.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "assert 'LOADABLE_CLASSES' in inspect.getsource(utils)\n"
    )
    in_a_fresh_process(code)


def test_a_diffusers_without_its_tables_is_named():
    from types import ModuleType

    from d_emo import registration

    with pytest.raises(ImportError, match=r"moved a table .* use diffusers>=0\.41,<0\.43 or a newer d_emo"):
        registration._extend_tables(ModuleType("diffusers.pipelines.pipeline_loading_utils"))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["d_emo.models", "diffusers.hooks"])
def test_the_blocks_are_known_to_the_caches(first):
    code = (
        f"import d_emo, {first}, d_emo.models, diffusers.hooks\n"
        "from diffusers.hooks._helpers import TransformerBlockRegistry\n"
        "metadata = TransformerBlockRegistry.get(d_emo.models.DEMOBlock)\n"
        "assert metadata.return_hidden_states_index == 0 and metadata._cls is d_emo.models.DEMOBlock\n"
        "for block in (d_emo.models.DiTBlock, d_emo.models.RotaryBlock):\n"
        "    assert TransformerBlockRegistry.get(block)._cls is block\n"
    )
    in_a_fresh_process(code)
