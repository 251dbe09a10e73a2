"""Training that starts from another model: what it takes from there, that the weights are the same,
and what is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax import hf
from moe_jax.config.load import config_from_text, dump_config
from moe_jax.config.model import ModelConfig
from moe_jax.config.schema import Config
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.data.mixture import Mixture
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference.load import open_model
from moe_jax.model_io.export import publish
from moe_jax.model_io.source import HuggingFaceSource
from moe_jax.model_io.weights import Weights
from moe_jax.training import initial_state
from tests.support import ROOT, tiny_run
from tests.support.command import call
from tests.support.hf_folder import VOCAB, make_folder
from tests.support.texts import packed

YAML = """
devices: {{simulate: 8}}
mesh: {{data: 2, expert: 4}}
moe: {{dropless: true, aux_loss: 0.0, z_loss: 0.0}}
optimizer: {{warmup_steps: 2, learning_rate: 1.0e-2}}
train: {{steps: 3, global_batch: 16, seq_len: 16, eval_every: 50, eval_batches: 1,
  sample_prompt: ""}}
checkpoint: {{every: 1, keep_last: 9}}
data: {{source: {source}}}
init_from: {origin}
"""


@pytest.fixture
def tune(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Trains the small configuration from a folder, with `a.b=value` on top; gives the run's
    directory.
    """

    def run(origin: Path, directory: Path, *overrides: str, **options: bool) -> Path:
        file = directory.with_suffix(".yaml")
        file.write_text(YAML.format(source=tiny_run.corpus(folder), origin=origin))
        monkeypatch.setattr(tiny_run, "config_file", lambda _: file)
        return tiny_run.run(folder, directory, *overrides, **options)

    return run


def first_loss(origin: Path, config: Config, corpus_from: str) -> float:
    """What the engine, which recorded cases of transformers hold to account, makes of the first
    batch.
    """
    corpus = load_corpus(
        dataclasses.replace(config.data, tokenizer=corpus_from),
        config.train.seq_len,
        config.train.seed,
    )
    batch = next(corpus.train_batches(config.train.global_batch))
    loaded = open_model(origin)
    # Documents that begin within a row stand alone in training; the engine reads a row as one text.
    assert (batch["segments"] == 1).all()
    nats, count = loaded.engine.score(batch["tokens"], batch["targets"], batch["mask"])
    return nats / count


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_moe-plain", "deepseek_v3-plain"])
def test_fine_tuning_resuming_and_exporting(case: str, tmp_path: Path, tune) -> None:
    origin = make_folder(case, tmp_path / "in")
    mesh = (
        ("mesh.data=1", "devices.simulate=4") if case.startswith("deepseek") else ()
    )  # whose ranks 8 devices do not divide
    run = tune(origin, tmp_path / "run", *mesh)
    config = config_from_text((run / "config.yaml").read_text())
    checkpoint = hf.open_checkpoint(origin)
    assert config.model == dataclasses.replace(checkpoint.model, vocab_size=VOCAB)
    kept = [
        key.removeprefix("moe.")
        for key in (*initial_state.OWN, "moe.aux_loss", "moe.z_loss")
        if key.startswith("moe.")
    ]
    assert config.moe == dataclasses.replace(
        checkpoint.moe, **{key: getattr(config.moe, key) for key in kept}
    )
    assert (
        config.moe.aux_loss == 0.0 and config.moe.aux_over == checkpoint.moe.aux_over
    )  # the one was set, the other was not
    lines = tiny_run.training_lines(run)
    assert lines[0]["ce_loss"] == pytest.approx(
        first_loss(origin, config, str(run / "tokenizer")), rel=1e-5
    )
    assert lines[2]["loss"] < lines[0]["loss"]

    # The folder is needed no more.
    kept = tiny_run.copy_until(run, tmp_path / "cut", 1)
    shutil.move(origin, tmp_path / "gone")
    assert (
        tiny_run.training_lines(tune(origin, kept, *mesh, resume=True))[-1]["loss"]
        == lines[2]["loss"]
    )
    loaded = open_model(run)
    assert loaded.context == 16 and loaded.tokenizer.chat is not None

    publish(run, tmp_path / "out")
    exported = open_model(tmp_path / "out")
    assert hf.read_config(tmp_path / "out").config["model_type"] == case.split("-")[0]
    assert hf.read_config(tmp_path / "out").context == checkpoint.context
    for one, other in zip(
        jax.tree.leaves((loaded.engine.params, loaded.engine.tables)),
        jax.tree.leaves((exported.engine.params, exported.engine.tables)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_one_device_learns_what_the_assistant_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the configuration and the command of the README."""
    origin, talks = make_folder("qwen3_moe-plain", tmp_path / "in"), tmp_path / "talks.jsonl"
    turns = [
        {"role": role, "content": f"{word} {i}"}
        for i in range(80)
        for role, word in (("user", "gate"), ("assistant", "expert"))
    ]
    talks.write_text((json.dumps({"messages": turns}) + "\n") * 2)
    settings = [f"init_from={origin}", f"data.source={talks}", "model.compute_dtype=float32"]
    settings += ["train.steps=2", "train.seq_len=32", "train.sample_tokens=3"]
    given = [word for setting in settings for word in ("--set", setting)]
    file, run = ROOT / "configs" / "finetune-one-device.yaml", tmp_path / "run"
    assert call("train", file, *given, "--run-dir", run) == 0
    assert re.search(r"top-p 0\.95\):\n(.*\n)*assistant:", capsys.readouterr().out)
    config = config_from_text((run / "config.yaml").read_text())
    first = tiny_run.training_lines(run)[0]
    wanted = first_loss(origin, config, str(origin))
    assert first["ce_loss"] == pytest.approx(wanted, rel=1e-5)
    everything = dataclasses.replace(config.data, loss_on="all")
    other = first_loss(origin, dataclasses.replace(config, data=everything), str(origin))
    assert abs(other - wanted) > 0.01


@pytest.mark.slow
def test_from_a_run(folder: Path, tmp_path: Path, tune) -> None:
    origin = tiny_run.finished(folder)
    run = tune(
        origin,
        tmp_path / "run",
        "train.steps=1",
        "mesh.expert=2",
        "mesh.data=1",
        "devices.simulate=2",
        "moe.z_loss=0.001",
    )
    config, before = (
        config_from_text((place / "config.yaml").read_text()) for place in (run, origin)
    )
    assert (
        config.model == dataclasses.replace(before.model, vocab_size=VOCAB)
        and config.moe.num_experts == 4
        and config.moe.dropless
    )
    assert tiny_run.training_lines(run)[0]["ce_loss"] == pytest.approx(
        first_loss(origin, config, "bytes"), rel=1e-5
    )
    assert not (run / "hf_config.json").exists() and not (run / "tokenizer").exists()


def test_the_weights_are_those_of_the_folder_on_any_mesh(
    tmp_path: Path, tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 becomes f32 masters; empty slots hold zeros; each process reads no more than its part
    once.
    """
    origin = make_folder(
        "qwen3_moe-mixed", tmp_path / "in"
    )  # 6 experts, of which 4 ranks hold 2, 2, 2 and none
    publish(origin, tmp_path / "half", dtype="bfloat16")
    checkpoint = hf.open_checkpoint(tmp_path / "half")
    monkeypatch.setattr(
        HuggingFaceSource, "weights", lambda _: Weights(checkpoint.leaf, checkpoint.bias_LE())
    )
    seen = {}
    monkeypatch.setattr(
        "moe_jax.training.trainer.Trainer.run", lambda _, state, held_out: seen.update(state=state)
    )
    tune(tmp_path / "half", tmp_path / "run", "mesh.data=1", "mesh.tensor=2")
    shapes = checkpoint.shapes()
    scales = sum(2 * math.prod(shape) for path, shape in shapes.items() if path.endswith("scale"))
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    assert checkpoint.bytes_read <= 1.02 * (
        size + 7 * scales
    )  # norms, of which every device holds all
    params = seen["state"].params
    for path in shapes:
        found = functools.reduce(
            lambda node, key: node[int(key) if key.isdigit() else key], path.split("/"), params
        )
        assert found.dtype == np.float32
        whole = np.asarray(found)
        if "/experts/" in path:
            assert whole.shape[1] == 8 and not whole[:, 6:].any()
            whole = whole[:, :6]
        np.testing.assert_array_equal(whole, checkpoint.leaf(path).astype(np.float32))
    assert int(seen["state"].step) == 0 and not any(
        np.asarray(leaf).any() for leaf in jax.tree.leaves(seen["state"].opt_state)
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.width=64"], "model.width=64 but init_from=.* has 32 there: leave model.width out"),
        (["moe.num_experts=16"], "moe.num_experts=16 but"),
        (["model.rope.theta=77.0"], "model.rope.theta=77.0 but"),
        (["mesh.tensor=4", "mesh.expert=1"], "mesh.tensor=4 does not divide model.num_kv_heads=2"),
        (
            ["mesh.data=8", "mesh.expert=1", "model.latent.q_rank=20", "init_from=null"],
            "model.latent.q_rank=20 is not divisible",
        ),
        (["init_from=nowhere"], r"init_from='.*nowhere' is not a folder"),
    ],
)
def test_contradictions_are_refused_by_name(
    overrides: list[str], message: str, tmp_path: Path, tune
) -> None:
    with pytest.raises(UserError, match=message):
        tune(make_folder("qwen3_moe-plain", tmp_path / "in"), tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_what_the_model_has_already_may_be_repeated(tmp_path: Path) -> None:
    origin = make_folder("qwen3_moe-plain", tmp_path / "in")
    config = Config(init_from=str(origin))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, width=32, num_heads=4, remat="full")
    )
    run = tmp_path / "run"
    found = initial_state.resolve(config, run, initial_state.Origin(config, run), resume=False)
    assert (
        found.model.remat == "full"
        and found.model.width == 32
        and found.data.tokenizer == str(origin)
    )
    with pytest.raises(UserError, match="the run's own directory"):
        initial_state.resolve(config, origin, initial_state.Origin(config, origin), resume=False)


def resolved(tmp_path: Path, *, resume: bool = False, **moe: bool | None) -> Config:
    config = Config(init_from=str(tmp_path / "in"))
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))
    run = tmp_path / "run"
    return initial_state.resolve(config, run, initial_state.Origin(config, run), resume=resume)


def test_a_checkpoints_experts_drop_nothing_unless_asked_to(tmp_path: Path) -> None:
    make_folder("qwen3_moe-plain", tmp_path / "in")
    assert resolved(tmp_path).moe.dropless is True
    assert resolved(tmp_path, dropless=True).moe.dropless is True
    dropping = resolved(tmp_path, dropless=False)
    assert dropping.moe.dropless is False
    # A run keeps what it began with, and what is said must agree with that.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(dropping))
    assert resolved(tmp_path, resume=True) == dropping
    assert resolved(tmp_path, resume=True, dropless=True) != dropping


def test_without_another_model_tokens_may_be_dropped(tmp_path: Path) -> None:
    config = Config()
    origin = initial_state.Origin(config, tmp_path)
    assert initial_state.resolve(config, tmp_path, origin, resume=False).moe.dropless is False


def test_another_origin_cannot_be_resumed(tmp_path: Path, tune) -> None:
    origin = make_folder("llama-plain", tmp_path / "in")
    run = tune(origin, tmp_path / "run", "train.steps=1")
    with pytest.raises(UserError, match=r"init_from=.*other but the run in .* began with"):
        tune(tmp_path / "other", run, resume=True)
    with pytest.raises(UserError, match="init_from=null but the run"):
        tune(origin, run, "init_from=null", resume=True)


def test_what_counts_is_that_no_token_of_the_text_is_beyond_the_embedding() -> None:
    """A tokenizer may have more ids than the model has rows: a padding token was added later."""
    tokenizer = dataclasses.replace(load_tokenizer("bytes"), num_ids=265, eos_id=255)
    text = Mixture([packed([np.array([1, 200])], 2, tokenizer)])

    def vocabulary(size: int | None, origin: str | None = None, text: Mixture = text) -> int:
        corpus = Corpus(tokenizer, "", text, text, seed=0)
        config = Config(model=ModelConfig(vocab_size=size), init_from=origin)
        return initial_state.vocabulary(config, corpus)

    assert vocabulary(256) == 256 and vocabulary(None) == 272
    more = Mixture([packed([np.array([1, 260])], 2, tokenizer)])
    assert vocabulary(264, text=more) == 264
    with pytest.raises(
        UserError, match="vocab_size=255 has no row for token 255, which ends a doc"
    ):
        vocabulary(255)
    with pytest.raises(UserError, match="name a token that ends a text as eos_token"):
        vocabulary(255, "m")
    with pytest.raises(UserError, match=r"has no row for token 260, in data\.source, .*: raise it"):
        vocabulary(256, text=more)
    with pytest.raises(
        UserError, match=r"name the tokenizer of m in data\.tokenizer, or take that"
    ):
        vocabulary(256, "m", more)
