"""Configuration files: what is read, how overrides merge, and the sentence that each mistake
gets.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config.load import (
    all_keys,
    config_from_text,
    dump_config,
    load_config,
    with_absolute_paths,
)
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import Config, DataConfig, MixtureSource, OptimizerConfig, TrainConfig
from moe_jax.errors import UserError
from tests.support import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def refusal(text: str | bytes, tmp_path: Path, *overrides: str) -> str:
    """The one sentence that a file with this text is refused with."""
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence[-1] in ".?"
    return sentence


def parameters(config: Config) -> tuple[int, int]:
    """(total, active a token) by the textbook formula, norms left out; all layers have experts."""
    model, moe = config.model, config.moe
    heads = model.num_heads * 2 + model.num_kv_heads * 2
    dense = model.num_layers * (
        model.width * model.head_width * heads + model.width * moe.num_experts
    )
    dense += (model.vocab_size or 257) * model.width * (1 if model.tied_embeddings else 2)
    expert = 3 * model.width * moe.hidden
    return (
        dense + model.num_layers * moe.num_experts * expert,
        dense + model.num_layers * moe.top_k * expert,
    )


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "a.yaml", []) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_round_trips_and_says_what_it_needs(path):
    config = load_config(path, [])
    assert config.name == path.stem
    assert config_from_text(dump_config(config)) == config
    comment = path.read_text().split("\n\n")[0]
    for heading in ("# For:", "# Needs:", "# Memory:", "# Run:"):
        assert heading in comment, heading
    assert "stimate" in comment and f"configs/{path.name}" in comment


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("tiny", 3.4e6, 1.0e6),
        ("small-gpu", 107e6, 19e6),
        ("mixtral-8x7b", 46.7e9, 12.9e9),
        ("qwen3-30b-a3b", 30.5e9, 3.3e9),
    ],
)
def test_configs_have_the_sizes_their_comments_state(name, total, active):
    counted = parameters(load_config(ROOT / "configs" / f"{name}.yaml", []))
    assert counted == (pytest.approx(total, rel=0.02), pytest.approx(active, rel=0.04))


def test_numbers_are_read_as_yaml_1_2():
    config = config_from_text(
        "optimizer: {learning_rate: 3e-4, eps: 1E-7}\nmodel: {rope: {theta: 10000}}\ntrain: "
        "{steps: 1_000}\nname: no"
    )
    assert config.optimizer.learning_rate == 3e-4 and config.optimizer.eps == 1e-7
    assert config.model.rope.theta == 10_000.0 and isinstance(config.model.rope.theta, float)
    assert config.train.steps == 1000 and config.name == "no"


def test_file_goes_over_base_and_overrides_over_both(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        "train: {steps: 7, seed: 3}\nmoe: {top_k: 1, dense_layers: [0, 1]}\nname: below"
    )
    (tmp_path / "sub" / "top.yaml").write_text(
        "base: ../base.yaml\ntrain: {steps: 8}\nmoe: {dense_layers: [2]}"
    )
    config = load_config(
        tmp_path / "sub" / "top.yaml",
        ["train.steps=9", "moe.hidden=64", "moe={every: 2}", "train.steps=10"],
    )
    assert (config.train.steps, config.train.seed, config.name) == (10, 3, "below")
    assert (config.moe.top_k, config.moe.hidden, config.moe.every, config.moe.dense_layers) == (
        1,
        64,
        2,
        (2,),
    )


def test_override_values_are_yaml():

    def load(*overrides):
        return load_config(ROOT / "configs" / "tiny.yaml", overrides)

    assert load("model.sliding_window=128").model.sliding_window == 128
    assert load("model.sliding_window=null").model.sliding_window is None
    assert load("moe.dropless=true").moe.dropless is True
    assert load("data.source=/a/b=c").data.source == "/a/b=c"
    assert load("train.sample_prompt=''").train.sample_prompt == ""
    assert load("train.sample_prompt=").train.sample_prompt == ""
    assert load("model.sliding_window=").model.sliding_window is None
    assert load("init_from=").init_from is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[INST] hi", "[INST] hi"),
        ("User: hi", "User: hi"),
        ("# A title", "# A title"),
        ("the first #1", "the first #1"),
        ("2026", "2026"),
        ("true", "true"),
        ("- one\n- two", "- one\n- two"),
        ("one\ntwo", "one\ntwo"),
        ("'it''s '", "it's "),
        ('"def\\n"', "def\n"),
        ('"yes" or "no"', '"yes" or "no"'),
        ("null", None),
    ],
)
def test_an_override_of_a_text_is_taken_as_typed(typed, meant):
    """YAML would read a mapping, a list, a number, or cut a comment off."""
    tiny = ROOT / "configs" / "tiny.yaml"
    assert load_config(tiny, [f"train.sample_prompt={typed}"]).train.sample_prompt == meant
    if meant is not None and "\n" not in typed:
        path = load_config(tiny, [f"data.source={typed}"]).data.source
        assert path == str(Path.cwd() / meant)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("moe: {num_expert: 8}", ["run.yaml", "'moe.num_expert'", "did you mean moe.num_experts?"]),
        ("num_experts: 8", ["did you mean moe.num_experts?"]),
        ("optimzer: {}", ["did you mean optimizer?"]),
        ("moe: {seed: 1}", ["did you mean train.seed?"]),
        ("train.steps: 3", ["write it as `steps:` under `train:`"]),
        ("checkpoint: {zzzz: 1}", ["the keys of checkpoint are every, keep_last, keep_best"]),
        ("12: 3", ["no key '12'", "the keys are name, init_from, model"]),
        ("train: {steps: many}", ["run.yaml", "train.steps='many'", "a whole number, >= 1"]),
        ("train: {steps: true}", ["train.steps=true", "a whole number"]),
        ("train: {steps: 2.5}", ["train.steps=2.5", "a whole number"]),
        ("train: {steps: '5'}", ["train.steps='5'"]),
        ("moe: {dropless: 1}", ["moe.dropless=1", "true or false"]),
        ("moe: {z_loss: false}", ["moe.z_loss=false", "a finite number"]),
        ("moe: {capacity_factor: .inf}", ["moe.capacity_factor=inf", "finite"]),
        ("moe: {capacity_factor: .nan}", ["finite"]),
        ("moe: {score: soft}", ["moe.score='soft'", "one of softmax, sigmoid"]),
        ("moe: {dense_layers: [0, x]}", ["moe.dense_layers", "a list, each a whole number"]),
        ("moe: {dense_layers: 3}", ["moe.dense_layers=3", "a list"]),
        ("data: {mixture: texts}", ["data.mixture='texts' must be a list of {source: ..., weig"]),
        ("data: {mixture: [a, b]}", ["data.mixture=['a', 'b'] must be a list of {source"]),
        ("data: {mixture: [{weigth: 1}]}", ["'data.mixture[0].weigth'", "did you mean"]),
        ("data: {mixture: [{}, {weight: a}]}", ["data.mixture[1].weight='a'", "number, > 0"]),
        ("data: {mixture: [{weight: 0}]}", ["data.mixture[0].weight=0.0 is out of range", "> 0"]),
        ("data: {mixture: [{weight: -1}]}", ["data.mixture[0].weight=-1.0 is out of range"]),
        ("data: {mixture: [{weight: .nan}]}", ["data.mixture[0].weight=nan", "a finite number"]),
        ("data: {source: x, mixture: [{}]}", ["does not go with data.mixture"]),
        ("model: {vocab_size: x}", ["a whole number or null, >= 2"]),
        ("name: 12", ["name=12", "put it in quotes"]),
        ("moe:", ["moe=null", "a mapping", "moe.num_experts"]),
        ("moe: 3", ["moe=3", "a mapping"]),
        ("train: {steps: {x: 1}}", ["train.steps={'x': 1}"]),
        ("- 1", ["run.yaml holds [1]", "a mapping"]),
        ("just text", ["a mapping"]),
        ("a: [1\n", ["run.yaml, line 2", "broken YAML"]),
        ("train:\n\tsteps: 1", ["line 2", "broken YAML"]),
        ("train: {steps: 1}\nmoe: {}\ntrain: {seed: 1}", ["line 3", "'train' stands twice"]),
        ("moe:\n  top_k: 1\n  top_k: 2", ["line 3", "'top_k' stands twice"]),
        ("name: \x00", ["broken YAML", "position 6"]),
        (b"\x80\x81", ["run.yaml is not UTF-8"]),
        ("--- {}\n--- {}", ["broken YAML"]),
        ("moe: !!python/object:os.system {}", ["broken YAML"]),
        ("train: !!int x", ["broken YAML"]),
        ("[" * 3000, ["nested too deep"]),
        ("base: 3", ["base=3", "must be text"]),
        ("base: nowhere.yaml", ["run.yaml: base='nowhere.yaml': ", ": there is no such file"]),
        ("base: run.yaml", ["run.yaml: base='run.yaml' is this file itself: name another"]),
        ("moe: {top_k: 99}", ["moe.top_k=99", "moe.num_experts=8"]),
        ("moe: {capacity_factor: -1}", ["moe.capacity_factor=-1", "> 0"]),
        ("train: {global_batch: 0}", ["train.global_batch=0", ">= 1"]),
        ("mesh: {data: 3}\ndevices: {simulate: 8}", ["mesh.data=3", "devices.simulate=8"]),
        ("model: {forecast: {patch: 4}}", ["moe.route_by=token does", "set moe.route_by=sequ"]),
        ("model: {sinks: true, forecast: {patch: 4}}", ["model.sinks=True does not go with mod"]),
        ("model: {forecast: {quantiles: [0.1, 0.9]}}", ["[0.1, 0.9] must be", "0.5 among"]),
        ("model: {forecast: {quantiles: [0.5, 0.2]}}", ["must be ascending levels"]),
        ("model: {forecast: {quantiles: [0.5, 1.0]}}", ["1.0 is no level"]),
    ],
)
def test_a_mistake_in_a_file_gets_one_sentence(text, parts, tmp_path):
    sentence = refusal(text, tmp_path)
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ["'train.steps'", "key=value"]),
        ("=3", ["key=value"]),
        ("train.steps=", ["--set", "train.steps=null"]),
        ("train.stepz=3", ["--set", "did you mean train.steps?"]),
        ("train..steps=3", ["no key 'train.'"]),
        ("train.steps.x=3", ["train.steps={'x': 3}"]),
        ("moe=3", ["moe=3", "a mapping"]),
        ("moe.top_k=[1", ["--set moe.top_k", "broken YAML"]),
        ("moe.top_k=99", ["moe.top_k=99"]),
        ("base=other.yaml", ["no key 'base'"]),
    ],
)
def test_a_mistake_in_an_override_gets_one_sentence(override, parts, tmp_path):
    sentence = refusal("", tmp_path, override)
    assert all(part in sentence for part in parts), sentence


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothere\.yaml: there is no such file"):
        load_config(tmp_path / "nothere.yaml", [])
    with pytest.raises(UserError, match="is a directory"):
        load_config(tmp_path, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        load_config(tmp_path / "file" / "a.yaml", [])


def test_mistakes_in_the_base_name_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {steps: x}")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntrain: {steps: 3}")
    with pytest.raises(UserError, match=r"base\.yaml: train\.steps='x'"):
        load_config(tmp_path / "top.yaml", [])


# Paths: those of a file are relative to it, those of --set to the working directory.


@pytest.fixture
def places(tmp_path, monkeypatch):
    """configs/run.yaml and configs/parts/base.yaml in a project; the working directory is
    elsewhere. Returns the project.
    """
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "configs" / "parts", project / "data", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    return project


PATHS = ("init_from", "data.source", "data.tokenizer", "placement.file", "placement.topology")


def leaf(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def in_yaml(key, value):
    section, _, name = key.rpartition(".")
    strategy = "strategy: custom, " if name == "file" else ""
    return f"{section}: {{{strategy}{name}: {value}}}\n" if section else f"{name}: {value}\n"


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("there", [True, False], ids=["there", "missing"])
def test_a_path_in_a_file_is_relative_to_that_file(key, there, places):
    """In the base as well; the resolved path is absolute whether or not something is there."""
    if there:
        (places / "data" / "one").write_text("")
    (places / "configs" / "run.yaml").write_text(in_yaml(key, "../data/one"))
    assert leaf(load_config(places / "configs" / "run.yaml"), key) == str(places / "data" / "one")
    (places / "configs" / "parts" / "base.yaml").write_text(in_yaml(key, "../../data/one"))
    (places / "configs" / "run.yaml").write_text("base: parts/base.yaml")
    assert leaf(load_config(places / "configs" / "run.yaml"), key) == str(places / "data" / "one")


@pytest.mark.parametrize("key", PATHS)
def test_a_path_of_an_override_is_relative_to_the_working_directory(key, places):
    (places / "configs" / "run.yaml").write_text("")
    overrides = [f"{key}=one"] + ["placement.strategy=custom"] * (key == "placement.file")
    config = load_config(places / "configs" / "run.yaml", overrides)
    assert leaf(config, key) == str(places.parent / "elsewhere" / "one")


def test_the_paths_of_a_mixture(places):
    """Each by itself; a list above takes the place of the whole list below."""
    config = "data: {mixture: [{source: ../data/one, weight: 2}, {source: builtin}]}"
    (places / "configs" / "run.yaml").write_text(config)
    one, two = load_config(places / "configs" / "run.yaml").data.mixture
    assert (one.source, one.weight) == (str(places / "data" / "one"), 2)
    assert (two.source, two.weight) == ("builtin", 1)
    override = ["data.mixture=[{source: here, weight: 0.5}]"]
    (only,) = load_config(places / "configs" / "run.yaml", override).data.mixture
    assert (only.source, only.weight) == (str(places.parent / "elsewhere" / "here"), 0.5)


def test_a_file_relative_to_the_working_directory_is_refused_with_the_path_to_write(places):
    """As paths in a YAML once were."""
    (places.parent / "elsewhere" / "one.txt").write_text("")
    (places / "configs" / "run.yaml").write_text("data: {source: one.txt}")
    with pytest.raises(UserError) as caught:
        load_config(places / "configs" / "run.yaml")
    assert str(caught.value) == (
        f"{places}/configs/run.yaml: data.source='one.txt' is relative to the file's own folder, "
        f"where there is no {places}/configs/one.txt: write ../../elsewhere/one.txt."
    )
    # A path that an override replaces is nobody's business.
    config = load_config(places / "configs" / "run.yaml", ["data.source=one.txt"])
    assert config.data.source == f"{places.parent}/elsewhere/one.txt"


def test_words_and_names_on_the_hub_are_no_paths(places):
    path = places / "configs" / "run.yaml"
    for text in ("data: {source: builtin, tokenizer: bytes}", "data: {source: 'hf:a/b'}"):
        path.write_text(text)
        config = load_config(path)
        assert config.data.source in ("builtin", "hf:a/b") and config.data.tokenizer == "bytes"
    path.write_text("init_from: Qwen/Qwen3-30B-A3B")
    assert load_config(path).init_from == "Qwen/Qwen3-30B-A3B"
    (places / "configs" / "Qwen" / "Qwen3-30B-A3B").mkdir(parents=True)
    assert load_config(path).init_from == f"{places}/configs/Qwen/Qwen3-30B-A3B"


def test_the_home_folder_and_urls(places, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    path = places / "configs" / "run.yaml"
    path.write_text("data: {source: ~/texts}")
    assert load_config(path).data.source == "/home/someone/texts"
    assert load_config(path, ["data.source=~/more"]).data.source == "/home/someone/more"
    sentence = r"--set: data.source='gs://bucket/texts': gs://bucket/texts is a URL, and only paths"
    with pytest.raises(UserError, match=sentence):
        load_config(path, ["data.source=gs://bucket/texts"])


def test_a_configuration_made_by_hand_gets_absolute_paths(places):
    config = Config(data=DataConfig(source="one"), init_from="two")
    found = with_absolute_paths(config)
    elsewhere = places.parent / "elsewhere"
    assert found.data.source == str(elsewhere / "one") and found.init_from == str(elsewhere / "two")
    assert with_absolute_paths(found) == found


words = st.text(st.characters(codec="utf-8"))
finite = st.floats(min_value=1e-9, max_value=1e9)
mixtures = st.lists(st.builds(MixtureSource, source=words, weight=finite), max_size=2)
configs = st.builds(
    Config,
    name=words,
    model=st.builds(ModelConfig, norm_eps=finite, vocab_size=st.none() | st.integers(2, 10**6)),
    moe=st.builds(
        MoEConfig,
        capacity_factor=finite,
        dense_layers=st.lists(st.integers(0, 99)).map(tuple),
        dropless=st.booleans(),
    ),
    data=st.builds(
        DataConfig, source=words, tokenizer=st.sampled_from(["3e-4", "no", "~", "017", "1_0", ""])
    )
    | st.builds(DataConfig, mixture=mixtures.map(tuple)),
    optimizer=st.builds(OptimizerConfig, learning_rate=finite, eps=finite),
    train=st.builds(TrainConfig, seed=st.integers(0, 2**32 - 1), sample_prompt=words),
)


@settings(deadline=None, max_examples=50)
@given(configs)
def test_dump_and_read_give_an_equal_config(config):
    again = config_from_text(dump_config(config))
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_all_keys_name_every_field_of_the_tree():
    keys = all_keys()
    assert {
        "name",
        "model.rope.theta",
        "moe.num_experts",
        "mesh.tensor",
        "devices.simulate",
        "checkpoint.every",
    } <= set(keys)
    leaves = [key for key in keys if not any(other.startswith(key + ".") for other in keys)]
    for key in leaves:
        value = Config()
        for part in key.split("."):
            value = getattr(value, part)
        assert not dataclasses.is_dataclass(value)


def test_configuration_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location(
        "config_docs", ROOT / "scripts" / "config_docs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.render(), "run `make docs`"
