"""What the key `vtprune` in `hf_overrides` may say. Needs no vLLM: configurations decide everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from vtprune import methods
from vtprune.errors import VTPruneError
from vtprune.eval.world import reference_dir
from vtprune.integrations.vllm_plugin.families import FAMILIES
from vtprune.integrations.vllm_plugin.settings import (
    Pruning,
    VLLMSettingsError,
    asked_for,
    pruning_of,
    runnable,
)
from vtprune.methods.files import dump

LLAVA, NEXT, INTERNVL = (f"{name}ForConditionalGeneration" for name in ("Llava", "LlavaNext", "InternVL"))


def read(settings: object, architecture: str = LLAVA, **others: Any) -> Pruning:
    """Reads settings for the reference LLaVA."""
    config = AutoConfig.from_pretrained(reference_dir("llava"))
    config.vtprune = settings
    return pruning_of(config, str(reference_dir("llava")), architectures=[architecture], **others)


def test_a_method_with_its_options() -> None:
    pruning = read({"method": "vtc-cls", "keep": 36, "first_layer": 2})
    assert pruning.method == methods.create("vtc-cls", keep=36, first_layer=2)
    assert pruning.left(144) == 36
    assert pruning.left(20) == 20
    assert read({"method": "vtc-cls", "keep": 0.5}).left(145) == 73


def test_several_methods_and_lists_as_tuples() -> None:
    pruning = read([{"method": "mstm", "keep": 64, "layers": [1, 2]}, {"method": "divprune", "keep": 36}])
    assert [stage.site.kind for stage in pruning.stages] == ["vit", "vit", "projector"]
    assert pruning.left(144) == 36


def test_a_file_of_a_search(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    dump(path, [methods.create("visionzip", keep=24)], 24, {"class": "LlavaForConditionalGeneration"})
    assert read({"method": str(path)}).left(144) == 24
    with pytest.raises(VLLMSettingsError, match="carries its own options; leave out keep"):
        read({"method": str(path), "keep": 3})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "vtc-cl", "keep": 36}, "no method 'vtc-cl'. Did you mean 'vtc-cls'"),
        ({"method": "vtc-cls", "kep": 36}, "no option 'kep'. Did you mean 'keep'"),
        ({"method": "vtc-cls", "keep": 0}, "keep=0 would leave no visual token"),
        ({"method": "vtc-cls", "keep": 1.5}, "keep=1.5 is no ratio"),
        ({"method": "vtc-cls", "keep": 145}, "keep=145 would remove nothing: .* has 144 tokens"),
        (
            {"method": "vtc-cls", "keep": 36, "positions": "original"},
            "numbers the tokens of a prompt without gaps",
        ),
        ({"method": "prumerge-plus"}, "reads cls_query of encoder layer 5, but vLLM loads only the 5 layers"),
        ({"method": "llava-scissor"}, "follows from the picture, .* give keep=N or keep=RATIO"),
        ({"method": "vtc-cls|outliers"}, "follows from the picture"),
        ({"method": "tome", "keep": 36}, "cannot weigh tokens by their size"),
        ({"method": "random-ltd", "keep": 0.5}, "acts in training only"),
        ({"method": "fastv", "keep": 36}, "no site 'decoder'.*encodes a picture once for all prompts"),
        ({"method": "cdpruner", "keep": 36}, "encodes a picture once for all prompts"),
        ({"method": "spatten", "keep": 36}, "encodes a picture once for all prompts"),
        ({"keep": 36}, "names no method"),
        ("vtc-cls", "names no method"),
        ([], "names no method"),
    ],
)
def test_what_cannot_be_followed(settings: object, says: str) -> None:
    with pytest.raises(VLLMSettingsError, match=says) as caught:
        read(settings)
    assert str(caught.value).startswith("hf_overrides['vtprune']: ")
    assert isinstance(caught.value, VTPruneError)
    assert not isinstance(caught.value, ValueError)  # vLLM would wrap it


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        (
            "LlamaForCausalLM",
            "LlamaForCausalLM cannot be pruned in vLLM. Supported: LlavaForConditionalGeneration, ",
        ),
        ("Qwen2_5_VLForConditionalGeneration", "M-RoPE positions"),
        ("Qwen3VLForConditionalGeneration", "M-RoPE positions"),
    ],
)
def test_other_models(architecture: str, says: str) -> None:
    with pytest.raises(VLLMSettingsError, match=says):
        read({"method": "vtc-cls", "keep": 36}, architecture)


def test_another_implementation_than_vllms() -> None:
    with pytest.raises(VLLMSettingsError, match="model_impl='transformers'"):
        read({"method": "vtc-cls", "keep": 36}, implementation="transformers")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vision_feature_select_strategy": "full"}, "makes \\[CLS\\] a visual token"),
        ({"vision_feature_layer": [-2, -3]}, "features of several layers"),
        ({"vision_config": PixtralVisionConfig()}, "'pixtral' vision tower"),
    ],
)
def test_configurations_that_cannot_be_pruned(change: dict[str, Any], says: str) -> None:
    config = LlavaConfig(vision_config=CLIPVisionConfig())
    for name, value in change.items():
        setattr(config, name, value)
    config.vtprune = {"method": "random", "keep": 3}
    with pytest.raises(VLLMSettingsError, match=says):
        pruning_of(config, None, architectures=[LLAVA])


def test_a_misspelt_key_is_noticed_and_other_keys_are_not() -> None:
    config = PreTrainedConfig()
    assert not asked_for(config)
    config.vision = {"method": "x"}
    assert not asked_for(config)
    config.vtprun = {"method": "vtc-cls"}
    with pytest.raises(VLLMSettingsError, match=r"'vtprun'\. Did you mean 'vtprune'"):
        asked_for(config)


def test_digests_tell_settings_apart() -> None:
    settings = [
        {"method": "vtc-cls", "keep": 36},
        {"method": "vtc-cls", "keep": 37},
        {"method": "vtc-cls", "keep": 0.25},
        {"method": "vtc-cls", "keep": 36, "first_layer": 1},
        {"method": "fastervlm", "keep": 36},
        [{"method": "vtc-cls", "keep": 64}, {"method": "divprune", "keep": 36}],
        [{"method": "vtc-cls", "keep": 65}, {"method": "divprune", "keep": 36}],
    ]
    assert len({read(one).digest for one in settings}) == len(settings)
    assert read(settings[0]).digest == read(json.loads(json.dumps(settings[0]))).digest


def test_no_method_is_forgotten() -> None:
    """Every method runs, or is refused with a reason of its own."""
    facts = read({"method": "random", "keep": 3}).facts
    works = {one.method for one in runnable(facts)}
    assert {"vtc-cls", "visionzip", "divprune", "vtprune", "tome", "flowcut"} <= works
    for name in methods.REGISTRY.keys() - works:
        with pytest.raises(VTPruneError) as caught:
            read({"method": name, "keep": 0.5})
        assert "vLLM" in str(caught.value)


def test_trained_methods_find_their_weights() -> None:
    assert read({"method": "ucofia", "keep": 32}).left(144) == 32
    with pytest.raises(VLLMSettingsError, match="Train them: `vtprune train ucofia"):
        read({"method": "ucofia", "keep": 33})


def test_encoders_without_cls() -> None:
    config = LlavaConfig(vision_config=SiglipVisionConfig(), vision_feature_select_strategy="full")
    config.vtprune = {"method": "vtc-cls", "keep": 36}
    with pytest.raises(VLLMSettingsError, match="has no \\[CLS\\] token; use scorer='received'"):
        pruning_of(config, None, architectures=[LLAVA])
    config.vtprune = {"method": "vtc-cls", "keep": 36, "scorer": "received"}
    assert pruning_of(config, None, architectures=[LLAVA]).left(729) == 36


def test_tiles_have_a_budget_each() -> None:
    config = LlavaNextConfig(vision_config=CLIPVisionConfig(image_size=336, patch_size=14))
    config.vtprune = {"method": "divprune", "keep": 100}
    pruning = pruning_of(config, None, architectures=[NEXT])
    assert pruning.family.packing is not None
    packing = pruning.family.packing(config, [(336, 672), (200, 672)])
    shown = [[u.layout.n_tokens for u in packing.units if u.image == image] for image in (0, 1)]
    # The whole picture and two tiles; of the flat picture the rows of its padding are gone.
    assert shown[0] == [576] * 3
    assert shown[1][0] == 576
    assert len(set(shown[1][1:])) == 1
    assert shown[1][1] < 576
    assert list(packing.sizes) == [576 * 3 + 24, sum(shown[1]) + shown[1][1] // 24]
    config.vtprune = {"method": "divprune", "keep": 577}
    with pytest.raises(VLLMSettingsError, match="has 576 tokens"):
        pruning_of(config, None, architectures=[NEXT])
    config.vtprune = {"method": "mstm", "keep": 100}
    with pytest.raises(VLLMSettingsError, match="no site 'vit'"):
        pruning_of(config, None, architectures=[NEXT])


def test_internvl_tokens_come_behind_pixel_shuffle() -> None:
    config = InternVLConfig()
    config.vtprune = {"method": "visionzip", "keep": 0.25}
    pruning = pruning_of(config, None, architectures=[INTERNVL])
    assert FAMILIES[INTERNVL].grid(config) == (16, 16)
    assert pruning.left(256) == 64


def test_the_plugin_does_not_import_vllm_or_models() -> None:
    """It is loaded in every process of vLLM, also of those who do not prune."""
    import subprocess

    code = (
        "import sys, vtprune.integrations.vllm_plugin; "
        "print([m for m in ('vllm', 'transformers.models.llava_next.modeling_llava_next') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
