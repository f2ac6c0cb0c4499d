from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import GenerationDefaults, describe_checkpoint
from hidream_grpc.model.checkpoint.sizes import ImageSize
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName, prompt_token_limits
from hidream_grpc.model.checkpoint.tokenizers.prompt_tokens import PromptTokenCounter
from hidream_grpc.model.checkpoint.variants import Variant
from tests.support.checkpoints import MAX_TOKENS_OF_T5, write_variant

MODEL_FLAG = "-m/--model-path"
EXTRA_FLAG = "-e/--extra-model-path"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_checkpoint_says_what_it_is(tiny_checkpoint: Path) -> None:
    description = describe_checkpoint(tiny_checkpoint, None)
    assert description.name == "tiny"
    assert description.variant is Variant.FULL
    assert description.scheduler_name == "UniPCMultistepScheduler"
    assert description.shift == 3.0
    assert description.size_limits.size_multiple == 16
    assert description.size_limits.max_pixels == 128 * 128
    assert description.prompt_token_limits == {
        "CLIP-L": 218,
        "CLIP-G": 218,
        "T5": MAX_TOKENS_OF_T5,
        "Llama": 256,
    }
    assert description.trained_prompt_tokens == MAX_TOKENS_OF_T5
    assert description.num_attention_heads == 4
    assert description.num_routed_experts == 4


@pytest.mark.parametrize(
    ("scheduler", "variant", "num_inference_steps", "guidance_scale"),
    [
        ("full", Variant.FULL, 50, 5.0),
        ("dev", Variant.DEV, 28, 0.0),
        ("fast", Variant.FAST, 16, 0.0),
        ("euler", Variant.CUSTOM, 50, 5.0),
    ],
)
def test_the_scheduler_decides_variant_and_defaults(
    scheduler: str,
    variant: Variant,
    num_inference_steps: int,
    guidance_scale: float,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    description = describe_checkpoint(write_variant(tiny_checkpoint, tmp_path / "variant", scheduler), None)
    assert description.variant is variant
    # 1024 x 1024 does not fit this checkpoint, so its largest square takes its place.
    assert description.defaults == GenerationDefaults(128, 128, num_inference_steps, guidance_scale)


def test_the_published_size_is_the_default_where_it_fits(own_checkpoint: Path) -> None:
    edit(own_checkpoint / "transformer" / "config.json", max_resolution=[128, 128])
    description = describe_checkpoint(own_checkpoint, None)
    assert (description.defaults.width, description.defaults.height) == (1024, 1024)
    assert ImageSize(1360, 768) in description.size_limits.recommended()


def test_a_checkpoints_own_defaults_win(own_checkpoint: Path) -> None:
    own = {"width": 64, "height": 96, "num_inference_steps": 9, "guidance_scale": 0.0}
    (own_checkpoint / "generation_config.json").write_text(json.dumps(own))
    assert describe_checkpoint(own_checkpoint, None).defaults == GenerationDefaults(**own)  # type: ignore[arg-type]


def test_own_defaults_may_be_some_of_them(own_checkpoint: Path) -> None:
    (own_checkpoint / "generation_config.json").write_text('{"num_inference_steps": 9}')
    assert describe_checkpoint(own_checkpoint, None).defaults == GenerationDefaults(128, 128, 9, 5.0)


def test_a_tokenizer_without_a_limit_of_its_own_leaves_the_models(own_checkpoint: Path) -> None:
    # transformers writes this where there is no limit.
    edit(own_checkpoint / "tokenizer_3" / "tokenizer_config.json", model_max_length=int(1e30))
    description = describe_checkpoint(own_checkpoint, None)
    assert description.prompt_token_limits[TextEncoderName.T5] == 256
    assert description.trained_prompt_tokens == 128


def test_both_clips_take_what_the_shorter_one_has_positions_for(own_checkpoint: Path) -> None:
    edit(own_checkpoint / "text_encoder" / "config.json", max_position_embeddings=248)
    limits = prompt_token_limits(own_checkpoint, None)
    assert (limits[TextEncoderName.CLIP_L], limits[TextEncoderName.CLIP_G]) == (218, 218)
    edit(own_checkpoint / "text_encoder_2" / "config.json", max_position_embeddings=230)
    assert set(prompt_token_limits(own_checkpoint, None).values()) == {230, MAX_TOKENS_OF_T5, 256}


def test_llama_may_lie_in_a_folder_of_its_own(split_checkpoint: tuple[Path, Path]) -> None:
    assert describe_checkpoint(*split_checkpoint).num_attention_heads == 4


def test_the_llama_folder_is_not_looked_at_when_the_checkpoint_has_one(tiny_checkpoint: Path) -> None:
    description = describe_checkpoint(tiny_checkpoint, Path("/no/such/folder"))
    assert description == describe_checkpoint(tiny_checkpoint, None)


def test_weights_may_be_in_several_files(own_checkpoint: Path) -> None:
    vae = own_checkpoint / "vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "part-1.safetensors")
    index = vae / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}')
    with pytest.raises(ModelNotFoundError, match=r"part-2.safetensors: no such file"):
        describe_checkpoint(own_checkpoint, None)
    index.write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    describe_checkpoint(own_checkpoint, None)


def test_the_shipped_demo_checkpoint_is_whole() -> None:
    description = describe_checkpoint(demo_checkpoint_path(), None)
    assert description.name == "demo"
    assert description.variant is Variant.FULL


@pytest.mark.parametrize(
    "part",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2",
        "text_encoder_2/model.safetensors",
        "text_encoder_3",
        "text_encoder_3/model.safetensors",
        "text_encoder_4/config.json",
        "text_encoder_4/model.safetensors",
        "tokenizer",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/tokenizer.json",
        "tokenizer_3/tokenizer.json",
        "tokenizer_4/tokenizer.json",
    ],
)
def test_a_missing_part_is_one_line_naming_the_flag_and_the_part(part: str, own_checkpoint: Path) -> None:
    path = own_checkpoint / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelNotFoundError) as raised:
        describe_checkpoint(own_checkpoint, None)
    line = str(raised.value)
    assert line.startswith(f"{MODEL_FLAG}: {own_checkpoint}")
    assert part.split("/")[0] in line
    assert "\n" not in line


Break = Callable[[Path], None]


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        pytest.param(
            lambda folder: edit(folder / "model_index.json", _class_name="FluxPipeline"),
            "model_index.json says FluxPipeline, not HiDreamImagePipeline",
            id="another pipeline",
        ),
        pytest.param(
            lambda folder: (folder / "model_index.json").write_text("not json"), "malformed", id="not JSON"
        ),
        pytest.param(
            lambda folder: edit(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
            "scheduler DDIMScheduler is not one of UniPCMultistepScheduler, ",
            id="unknown scheduler",
        ),
        pytest.param(
            lambda folder: edit(folder / "transformer" / "config.json", patch_size=0),
            r"patch_size",
            id="bad number",
        ),
        pytest.param(
            lambda folder: edit(folder / "transformer" / "config.json", num_layers=5),
            "2 llama_layers for 6 blocks",
            id="blocks without Llama layer",
        ),
        pytest.param(
            lambda folder: edit(folder / "transformer" / "config.json", text_emb_dim=64),
            "CLIP gives 40 numbers, the transformer takes 64",
            id="other CLIP",
        ),
        pytest.param(
            lambda folder: edit(folder / "transformer" / "config.json", caption_channels=[64, 32]),
            "T5 gives 32 numbers a token, the transformer takes 64",
            id="other T5",
        ),
        pytest.param(
            lambda folder: edit(folder / "transformer" / "config.json", caption_channels=[32, 64]),
            "Llama gives 32 numbers a token, the transformer takes 64",
            id="narrower Llama",
        ),
        pytest.param(
            lambda folder: edit(folder / "transformer" / "config.json", llama_layers=[0, 31]),
            "Llama has 3 layers, the transformer reads layer 31",
            id="shallower Llama",
        ),
        pytest.param(
            lambda folder: edit(folder / "text_encoder" / "config.json", max_position_embeddings=77),
            "has room for 77 tokens, 128 are needed",
            id="short CLIP",
        ),
        pytest.param(
            lambda folder: (folder / "generation_config.json").write_text('{"width": 100}'),
            "100×128 cannot be generated",
            id="default size that cannot be generated",
        ),
        pytest.param(
            lambda folder: (folder / "generation_config.json").write_text('{"steps": 9}'),
            "unknown field `steps`",
            id="unknown default",
        ),
    ],
)
def test_parts_that_cannot_work_are_one_line_saying_why(
    break_: Break, reason: str, own_checkpoint: Path
) -> None:
    break_(own_checkpoint)
    with pytest.raises(ModelNotFoundError, match=reason) as raised:
        describe_checkpoint(own_checkpoint, None)
    assert raised.value.flag == MODEL_FLAG
    assert "\n" not in str(raised.value)


TRANSFORMER = "transformer/config.json"
VAE = "vae/config.json"
CLIP = "text_encoder_2/config.json"
T5 = "text_encoder_3/config.json"
LLAMA = "text_encoder_4/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        (TRANSFORMER, {"num_activated_experts": 9}, "num_activated_experts is 9, num_routed_experts 4"),
        (TRANSFORMER, {"axes_dims_rope": [4, 4]}, "of length 3"),
        (TRANSFORMER, {"axes_dims_rope": [2, 2, 2]}, "axes_dims_rope is (2, 2, 2), not three even numbers"),
        (TRANSFORMER, {"axes_dims_rope": [1, 3, 4]}, "axes_dims_rope is (1, 3, 4), not three even numbers"),
        (TRANSFORMER, {"llama_layers": [-1, 2]}, ">= 0"),
        (TRANSFORMER, {"num_layers": 10**9}, "<= 512"),
        (TRANSFORMER, {"num_routed_experts": 10**9}, "<= 128"),
        (TRANSFORMER, {"in_channels": 8}, "in_channels is 8, latent_channels of the autoencoder 16"),
        (TRANSFORMER, {"out_channels": 8}, "out_channels is 8, latent_channels of the autoencoder 16"),
        (VAE, {"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types has 1, block_out_channels 4"),
        (VAE, {"up_block_types": ["UpDecoderBlock2D"] * 5}, "up_block_types has 5, block_out_channels 4"),
        (VAE, {"norm_num_groups": 7}, "block_out_channels (8, 8, 8, 8) are not all multiples of"),
        (VAE, {"act_fn": "nonsense"}, "'nonsense' - at `$.act_fn`"),
        (VAE, {"scaling_factor": 0}, "scaling_factor is 0"),
        (VAE, {"out_channels": 4}, "in_channels and out_channels are 3 and 4, an image has 3"),
        (VAE, {"layers_per_block": 10**9}, "<= 512"),
        (CLIP, {"num_attention_heads": 7}, "hidden_size is 32, no multiple of num_attention_heads, 7"),
        (CLIP, {"num_hidden_layers": 10**9}, "<= 512"),
        (T5, {"num_layers": 10**6}, "<= 512"),
        (LLAMA, {"num_hidden_layers": 10**6}, "<= 512"),
        (
            LLAMA,
            {"num_key_value_heads": 3},
            "num_attention_heads is 4, no multiple of num_key_value_heads, 3",
        ),
        (LLAMA, {"num_attention_heads": 5, "head_dim": None}, "hidden_size is 32, no multiple of"),
        (LLAMA, {"num_attention_heads": 32, "num_key_value_heads": None, "head_dim": 1}, "have 1 channels"),
        (SCHEDULER, {"flow_shift": 0}, "> 0"),
        (SCHEDULER, {"solver_order": "x"}, "Expected `int`, got `str` - at `$.solver_order`"),
        ("model_index.json", {"text_encoder_4": 5}, "got `int` - at `$.text_encoder_4`"),
        ("tokenizer_3/tokenizer_config.json", {"model_max_length": 0}, ">= 1"),
    ],
)
def test_a_configuration_that_cannot_work_is_one_line_naming_its_file(
    file: str, changes: dict[str, Any], reason: str, own_checkpoint: Path
) -> None:
    edit(own_checkpoint / file, **changes)
    with pytest.raises(ModelNotFoundError, match=re.escape(reason)) as raised:
        describe_checkpoint(own_checkpoint, None)
    assert str(raised.value).startswith(f"{MODEL_FLAG}: {own_checkpoint / file}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_4"])
def test_a_tokenizer_with_more_tokens_than_its_encoder_is_refused(encoder: str, own_checkpoint: Path) -> None:
    config = own_checkpoint / encoder / "config.json"
    num_tokens = json.loads(config.read_text())["vocab_size"]
    edit(config, vocab_size=num_tokens - 1)
    folder = own_checkpoint / encoder.replace("text_encoder", "tokenizer")
    with pytest.raises(ModelNotFoundError, match=f"gives token ids up to {num_tokens - 1}, ") as raised:
        PromptTokenCounter.from_checkpoint(own_checkpoint, None)
    assert str(raised.value).startswith(f"{MODEL_FLAG}: {folder}")


def test_a_repository_in_the_hubs_cache_says_where_its_snapshot_is(tmp_path: Path) -> None:
    repository = tmp_path / "models--HiDream-ai--HiDream-I1-Full"
    (repository / "snapshots" / "0123abcd").mkdir(parents=True)
    with pytest.raises(ModelNotFoundError) as raised:
        describe_checkpoint(repository, None)
    assert str(raised.value) == (
        f"{MODEL_FLAG}: {repository}: no model_index.json: not in diffusers format; "
        "name the folder of a revision: snapshots/0123abcd"
    )


def test_a_missing_folder_is_named_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as raised:
        describe_checkpoint(tmp_path / "nothing", None)
    assert str(raised.value) == f"{MODEL_FLAG}: {tmp_path / 'nothing'}: no such folder"


def test_no_llama_anywhere_says_how_to_name_one(split_checkpoint: tuple[Path, Path]) -> None:
    with pytest.raises(ModelNotFoundError, match=f"name a Llama-3.1-8B-Instruct folder with {EXTRA_FLAG}"):
        describe_checkpoint(split_checkpoint[0], None)


def test_a_llama_that_only_the_index_knows_is_none(own_checkpoint: Path) -> None:
    shutil.rmtree(own_checkpoint / "text_encoder_4")
    with pytest.raises(ModelNotFoundError, match=f"with {EXTRA_FLAG}"):
        describe_checkpoint(own_checkpoint, None)


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        pytest.param(shutil.rmtree, "no such folder", id="no folder"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), "no such file", id="no configuration"),
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), "no weights", id="no weights"),
        pytest.param(
            lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: no such", id="no tokenizer"
        ),
        pytest.param(
            lambda folder: edit(folder / "config.json", model_type="qwen3"),
            "is a qwen3 model, not llama",
            id="another model",
        ),
        pytest.param(
            lambda folder: edit(folder / "config.json", hidden_size=16),
            "Llama gives 16 numbers a token, the transformer takes 32",
            id="another size",
        ),
    ],
)
def test_a_wrong_llama_folder_is_one_line_naming_its_flag(
    break_: Break, reason: str, own_split_checkpoint: tuple[Path, Path]
) -> None:
    checkpoint, llama = own_split_checkpoint
    break_(llama)
    with pytest.raises(ModelNotFoundError, match=reason) as raised:
        describe_checkpoint(checkpoint, llama)
    assert str(raised.value).startswith(f"{EXTRA_FLAG}: {llama}")
