from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf
from moe_jax.config.model import ModelConfig, MoEConfig, RopeConfig
from moe_jax.errors import UserError
from moe_jax.hf.config import map_config
from moe_jax.hf.families import FAMILIES
from moe_jax.models.layer_pattern import layer_kinds
from moe_jax.moe.load_balancing import switch_loss

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
MINIMAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 8},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": EXPERTS,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
}
MINIMAL["olmoe"] = {key: value for key, value in EXPERTS.items() if key != "moe_intermediate_size"}


def read(family: str, **changes: Any) -> tuple[ModelConfig, MoEConfig]:
    return map_config({"model_type": family} | SIZES | MINIMAL[family] | changes, "config.json")[1:]


def has_window(family: str, **changes: Any) -> list[bool]:
    return [kind.window is not None for kind in layer_kinds(*read(family, **changes))]


def has_experts(family: str, **changes: Any) -> list[bool]:
    return [kind.moe for kind in layer_kinds(*read(family, **changes))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_sizes_alone_takes_the_defaults_of_its_family(family: str) -> None:
    model, moe = read(family)
    assert (model.width, model.num_layers, model.num_heads, model.vocab_size) == (32, 4, 4, 64)
    assert moe.dropless and moe.z_loss == 0
    assert not model.tied_embeddings and model.rope.theta == {
        "mixtral": 1e6,
        "gpt_oss": 150_000.0,
    }.get(family, 1e4)
    assert model.norm_eps == (1e-5 if family in ("mixtral", "olmoe", "gpt_oss") else 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "rope_scaling.type='longrope' is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "stretch": 3}},
            "rope_scaling.stretch=3 is a setting",
        ),
        (
            {"logit_softcap": 30.0},
            "logit_softcap=30.0 is a setting that this family is not known to have",
        ),
        ({"hidden_size": "wide"}, "hidden_size='wide' must be a whole number"),
        ({"hidden_size": None}, "hidden_size=null must be a whole number"),
        ({"num_key_value_heads": 3}, "model.num_kv_heads=3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"rms_norm_eps": None}, "rms_norm_eps=null must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_arithmetic_is_refused_by_name(
    family: str, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        read(family, **change)
    assert str(error.value).startswith("config.json") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias=true"),
        ("mixtral", {"mlp_bias": True}, "mlp_bias=true"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=true"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=true"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5"),
        ("gpt_oss", {"experts_per_token": 3}, "experts_per_token=3"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types="),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "no sliding_window is in use"),
        ("olmoe", {"head_dim": 16}, "head_dim=16"),
        ("olmoe", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"rope_scalings": {"factor": 2}}, r"\(is rope_scaling meant\?\)"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=true"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm=true contradicts the model_type"),
        ("qwen3", {"use_qk_norm": False}, "use_qk_norm=false contradicts the model_type"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm=false"),
        (
            "qwen3_moe",
            {"shared_expert_intermediate_size": 64},
            "shared_expert_intermediate_size=64",
        ),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=false"),
        ("mixtral", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ("llama", {"is_causal": False}, "is_causal=false"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=true"),
        ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ("llama", {"add_cross_attention": True}, "add_cross_attention=true"),
        ("llama", {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        ("llama", {"logits_scaling": 0}, "logits_scaling=0"),  # 1 is off for a factor
        ("llama", {"output_multiplier_scale": 2}, "output_multiplier_scale=2"),
        ("llama", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers="),
        ("llama", {"some_feature": {"size": 0, "on": True}}, "some_feature="),
    ],
)
def test_what_one_family_cannot_do_is_refused_by_name(
    family: str, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read(family, **change)


def test_keys_that_change_nothing_are_passed_over() -> None:
    plain = read("llama")
    assert (
        read(
            "llama",
            attention_dropout=0.1,
            pretraining_tp=1,
            auto_map={"AutoModel": "x.y"},
            some_new_key=None,
        )
        == plain
    )
    assert read("mistral", attention_bias=False, use_cache=True) == read("mistral")


# Keys of configs on the hub that change nothing: Qwen3-Coder's, SmolLM2's, and what transformers
# and other tools leave behind.
HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"shared_expert_intermediate_size": 0, "use_qk_norm": True, "qkv_bias": False}),
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "use_qk_norm": False}),
    ("llama", {"transformers.js_config": {"dtype": "q4"}, "_attn_implementation_autoset": True}),
    ("llama", {"_commit_hash": "0a1b", "_from_model_config": True, "max_sequence_length": 512}),
    ("llama", {"early_stopping": True, "length_penalty": 0.8, "num_return_sequences": 3}),
    ("llama", {"add_cross_attention": False, "tie_encoder_decoder": False, "pruned_heads": {}}),
    ("llama", {"is_encoder_decoder": False, "use_mrope": False, "model_max_length": 4096}),
    ("llama", {"classifier_dropout": 0.1, "image_token_id": 7, "seq_length": 2048}),
    ("qwen2_moe", {"attention_bias": True}),
    ("mixtral", {"norm_topk_prob": True, "scoring_func": "softmax", "num_experts": 8}),
]


@pytest.mark.parametrize(("family", "keys"), HARMLESS, ids=lambda value: ",".join(value))
def test_keys_of_the_hub_that_change_nothing_say_nothing(
    family: str, keys: dict[str, Any], tmp_path: Path, capsys
) -> None:
    assert read(family, **keys) == read(family)
    described = {"model_type": family} | SIZES | MINIMAL[family] | keys
    (tmp_path / "config.json").write_text(json.dumps(described))
    hf.read_config(tmp_path)
    assert capsys.readouterr().err == ""


def test_unknown_keys_that_are_off_are_named(tmp_path: Path, capsys) -> None:
    off = {
        "some_feature": False,
        "another_size": 0,
        "some_list": [],
        "some_object": {"size": 0, "kind": "none"},
        "residual_multiplier": 1.0,
        "some_text": "",
        "rope_scaling": {"type": "linear", "factor": 2.0, "some_part": None, "stretch_more": False},
    }
    config = {"model_type": "llama"} | SIZES | off
    (tmp_path / "config.json").write_text(json.dumps(config))
    first, second = hf.read_config(tmp_path), hf.read_config(tmp_path)
    assert first == second and first.model.rope.factor == 2
    said = capsys.readouterr().err
    names = {
        name.strip() for name in said.partition("passed over ")[2].split(", which")[0].split(",")
    }
    assert said.count("\n") == 1 and str(tmp_path) in said
    assert names == off.keys() - {"rope_scaling"} | {"rope_scaling.stretch_more"}


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        (
            {"rope_type": "linear", "factor": 2.0},
            {"scaling": "linear", "factor": 2.0, "original_length": 512},
        ),
        # dynamic starts at the length that the config states, whatever the original one was
        (
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9},
            {"scaling": "dynamic", "original_length": 512},
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 64,
            },
            {"scaling": "llama3", "factor": 8.0, "original_length": 64, "high_freq_factor": 4.0},
        ),
        (
            {
                "rope_type": "yarn",
                "factor": None,
                "original_max_position_embeddings": 128,
                "truncate": False,
            },
            {
                "scaling": "yarn",
                "factor": 4.0,
                "original_length": 128,
                "truncate": False,
                "attention_factor": None,
            },
        ),
        ({"rope_type": "default"}, {"scaling": "none", "factor": 1.0}),
    ],
)
def test_rope_reads_the_same_in_the_old_style_and_in_the_new(
    scaling: dict[str, Any], wanted: dict[str, Any]
) -> None:
    old = {key.replace("rope_type", "type"): value for key, value in scaling.items()}
    before, _ = read("llama", rope_theta=5e5, rope_scaling=old)
    after, _ = read("llama", rope_parameters=scaling | {"rope_theta": 5e5})
    assert before.rope == after.rope and before.rope.theta == 5e5
    assert (
        wanted.items()
        <= {name: getattr(before.rope, name) for name in RopeConfig.__dataclass_fields__}.items()
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_both_names_of_the_rotation_may_say_the_same() -> None:
    old = {key.replace("rope_type", "type"): value for key, value in YARN.items()}
    both = {"rope_scaling": old, "rope_parameters": YARN | {"rope_theta": 5e5}, "rope_theta": 5e5}
    wanted = read("llama", rope_parameters=YARN | {"rope_theta": 5e5})
    assert read("llama", **both) == wanted
    one = {"rope_scaling": None, "rope_parameters": YARN | {"rope_theta": 5e5}}
    assert read("llama", **one) == wanted


@pytest.mark.parametrize(
    "other",
    [
        {"rope_type": "default"},
        YARN | {"factor": 2.0},
        YARN | {"rope_theta": 7.0},
        YARN | {"mscale_all_dim": 0.7},
    ],
    ids=str,
)
def test_two_rotations_that_differ_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"rope_parameters=.* than rope_scaling: remove"):
        read("llama", rope_scaling=YARN, rope_parameters=other)


@pytest.mark.parametrize(
    ("stated", "scaling", "context"),
    [
        (160, YARN, 512),  # as Qwen's model cards say to add it
        (512, YARN, 512),
        (600, YARN, 600),  # never less than is stated
        (512, YARN | {"factor": None}, 512),
        (128, {"type": "yarn", "factor": 4.0}, 512),
        (512, {"type": "linear", "factor": 4.0}, 512),
        (512, {"type": "dynamic", "factor": 4.0}, 512),
        (512, None, 512),
    ],
    ids=str,
)
def test_yarn_lengthens_the_context(
    tmp_path: Path, stated: int, scaling: dict[str, Any] | None, context: int
) -> None:
    config = {"model_type": "llama"} | SIZES
    config |= {"max_position_embeddings": stated, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hf.read_config(tmp_path).context == context


def test_yarn_scales_of_deepseek() -> None:
    scaling = {
        "type": "yarn",
        "factor": 8.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 64,
    }
    model, _ = read("deepseek_v3", rope_scaling=scaling)
    whole, part = 0.1 * math.log(8) + 1, 0.05 * math.log(8) + 1
    assert model.rope.attention_factor == pytest.approx(whole / part)
    assert model.attention_scale == pytest.approx(16**-0.5 * part**2)
    assert read("deepseek_v3")[0].attention_scale is None


def test_partial_rotation_and_head_width() -> None:
    model, _ = read("llama", partial_rotary_factor=0.5, head_dim=16)
    assert (model.rope.fraction, model.head_width) == (0.5, 16)
    assert (
        read("qwen3")[0].head_width == 128
        and read("gpt_oss")[0].head_width == 64
        and read("llama")[0].head_width == 8
    )


def test_windows_are_in_the_layers_that_the_family_gives_them() -> None:
    assert (
        has_window("mistral") == [True] * 4
        and has_window("mistral", sliding_window=None) == [False] * 4
    )
    assert (
        has_window("mixtral") == [False] * 4
        and has_window("mixtral", sliding_window=8) == [True] * 4
    )
    assert has_window("gpt_oss") == [True, False, True, False]
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert (
        has_window("qwen3_moe", sliding_window=8) == [False] * 4
        and has_window("qwen3_moe", **used) == [True] * 4
    )
    assert has_window("qwen3", **used, max_window_layers=1) == [False, True, True, True]
    assert has_window("qwen2_moe", **used, max_window_layers=3) == [True, False, True, False]
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert has_window("qwen3", **used, layer_types=types) == [False, True, False, False]


def test_experts_are_in_the_layers_that_the_family_gives_them() -> None:
    assert has_experts("llama") == [False] * 4 and has_experts("mixtral") == [True] * 4
    assert has_experts("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]) == [
        False,
        True,
        False,
        False,
    ]
    assert has_experts("qwen2_moe", num_experts=0) == [False] * 4
    assert has_experts("deepseek_v2") == [True] * 4 and has_experts("deepseek_v3") == [
        False,
        False,
        False,
        True,
    ]
    assert has_experts("deepseek_v3", first_k_dense_replace=1, moe_layer_freq=2) == [
        False,
        False,
        True,
        False,
    ]


def test_routing_of_each_family() -> None:
    def routing(family: str, **changes: Any) -> tuple[Any, ...]:
        moe = read(family, **changes)[1]
        return (
            moe.score,
            moe.normalize,
            moe.num_groups,
            moe.top_groups,
            moe.routed_scale,
            moe.shared_width,
        )

    assert routing("mixtral") == ("softmax", "after", 1, 1, 1.0, 0)
    assert routing("qwen3_moe") == ("softmax", "before", 1, 1, 1.0, 0)
    assert routing("qwen3_moe", norm_topk_prob=True)[1] == "after"
    assert routing("qwen2_moe") == ("softmax", "before", 1, 1, 1.0, 40)
    assert routing("deepseek_v2", n_group=4, topk_group=2) == ("softmax", "before", 1, 1, 1.0, 48)
    assert routing("deepseek_v2", n_group=4, topk_group=2, topk_method="group_limited_greedy")[
        2:4
    ] == (4, 2)
    assert routing("deepseek_v3") == ("sigmoid", "after", 4, 2, 2.5, 24)
    gpt = read("gpt_oss")[1]
    assert (
        gpt.router_bias and gpt.expert_bias and gpt.swiglu_limit == 7.0 and gpt.normalize == "after"
    )


def test_the_balance_loss_of_one_layer_is_that_of_transformers() -> None:
    """Theirs counts every choice: E x sum over experts of (choices a token) x (mean
    probability).
    """
    rng = np.random.default_rng(0)
    prob_TE = rng.dirichlet(np.ones(8), size=50)
    chosen_TK = np.argsort(-prob_TE)[:, :2]
    choices_E = np.bincount(chosen_TK.reshape(-1), minlength=8) / 50
    theirs = 0.02 * 8 * np.sum(choices_E * prob_TE.mean(axis=0))
    _, moe = read("mixtral", num_hidden_layers=1, router_aux_loss_coef=0.02)
    ours = moe.aux_loss * switch_loss(jnp.asarray(choices_E / 2), jnp.asarray(prob_TE.mean(axis=0)))
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


def test_folders_that_describe_no_model(tmp_path: Path) -> None:
    assert not hf.is_hf_folder(tmp_path)
    with pytest.raises(UserError, match=r"has no config\.json"):
        hf.read_config(tmp_path)
    for text, says in (
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ('{"model_type": "gpt2"}', "model_type='gpt2' .* mistral"),
        ("{}", "None"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=says):
            hf.read_config(tmp_path)


def test_folders_without_a_config_say_what_they_are(tmp_path: Path) -> None:
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"
    one = "models--a--b/snapshots/0f"
    for place, file, text, says in (
        ("lora", "adapter_config.json", "{}", r"adapter \(LoRA\) without its model"),
        ("gguf", "model-Q4.gguf", "GGUF", r"holds GGUF \(model-Q4.gguf\), which is not read"),
        (one, "config.json", "{}", "and .*snapshots/0f has: name that folder"),
        ("many/a", "config.json", "{}", "many/a has: name that folder"),
        ("many/b", "config.json", "{}", "name a model in it, such as .*many/a"),
        ("lfs", "config.json", lfs, "is a pointer of Git LFS, so run `git lfs pull`"),
    ):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / file).write_text(text)
        folder = tmp_path / place.split("/")[0]
        with pytest.raises(UserError, match=says):
            hf.read_config(folder)


def test_ends_of_text_are_those_of_generation_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "eos_token_id": 2} | SIZES
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hf.read_config(tmp_path).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    found = hf.read_config(tmp_path)
    assert (
        found.eos_ids == (3, 4)
        and found.context == 512
        and found.vocab_size == 64
        and found.family == "llama"
    )
