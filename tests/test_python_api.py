"""The Python API: what `import moe_jax` offers, and the examples of docs/python_api.md."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import moe_jax
from tests.support import ROOT, hf_folder, tiny_programs
from tests.support.tiny_run import corpus

PAGE = ROOT / "docs" / "python_api.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: a model and a text."""
    place = tmp_path_factory.mktemp("api")
    hf_folder.make_folder("qwen3_moe-plain", place / "model")
    (place / "text.txt").write_bytes(corpus(place).read_bytes())
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> moe_jax.TextModel:
    return moe_jax.load(place / "model")


@pytest.mark.slow
def test_the_examples_run_as_the_page_has_them(place, monkeypatch):
    monkeypatch.chdir(place)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        example = place / f"example_{number}.py"
        example.write_text(block, encoding="utf-8")
        names |= runpy.run_path(str(example), init_globals=names)
    assert names["text"] == names["model"].generate("def add(a, b):", max_tokens=8, temperature=0)
    assert len(names["two_texts"]) == 2
    assert names["after"] == pytest.approx(names["losses"][-1], abs=0.5)
    np.testing.assert_array_equal(names["stats"].router.load_E.sum(), 2 * 8 * 5)


def test_every_name_is_there_documented_and_on_the_list():
    assert set(moe_jax._HOMES) < set(moe_jax.__all__) == set(dir(moe_jax))
    for name in moe_jax.__all__:
        value = getattr(moe_jax, name)
        assert name == "__version__" or inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moe_jax.nothing  # noqa: B018


def test_importing_it_imports_nothing_heavy():
    code = "import sys, moe_jax; print(*[n for n in ('jax', 'numpy', 'flax') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


def test_type_checkers_find_the_types():
    assert (Path(moe_jax.__file__).parent / "py.typed").is_file()


def test_logits_of_many_prompts_are_those_of_each(model):
    rows = [[1, 2, 3, 4, 5], [7], [1, 2]]
    together = model.logits(rows)
    assert [a.shape[0] for a in together] == [5, 1, 2]
    for row, logits in zip(rows, together, strict=True):
        alone = model.logits(row)
        assert alone.dtype == np.float32
        np.testing.assert_allclose(alone, logits, atol=1e-4)
    # A token depends on what is before it alone.
    np.testing.assert_allclose(together[2], together[0][:2], atol=1e-4)
    np.testing.assert_array_equal(model.logits("ab"), model.logits(model.encode("ab")))


def test_greedy_text_follows_the_logits(model):
    tokens = model.encode("ab")
    best = int(model.logits(tokens)[-1].argmax())
    text = model.generate("ab", max_tokens=1, temperature=0)
    assert text == model.decode([*tokens, best])[len(model.decode(tokens)) :]


def test_prompts_that_cannot_be_are_refused(model):
    with pytest.raises(moe_jax.UserError, match="empty"):
        model.generate("")
    with pytest.raises(moe_jax.UserError, match="empty"):
        model.logits([[1], []])
    with pytest.raises(moe_jax.UserError, match="context"):
        model.logits([1] * (model.context + 1))
    with pytest.raises(moe_jax.UserError, match="vocabulary"):
        model.logits([10_000])
    with pytest.raises(moe_jax.UserError, match="overrides"):
        moe_jax.train({}, "nowhere", overrides=["train.steps=1"])


def test_a_batch_from_tokens_pads_and_counts():
    batch = moe_jax.batch_from_tokens([[5, 6, 7, 8], [9, 10]])
    np.testing.assert_array_equal(batch["tokens"], [[5, 6, 7], [9, 10, 0]])
    np.testing.assert_array_equal(batch["targets"], [[6, 7, 8], [10, 0, 0]])
    np.testing.assert_array_equal(batch["mask"], [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2], [0, 0, 0]])
    with pytest.raises(ValueError, match="at least two"):
        moe_jax.batch_from_tokens([[5]])


@pytest.mark.slow
def test_gradients_of_a_loss_of_ones_own_are_those_of_training():
    """With cross-entropy for a loss. A step of plain gradient descent lowers it as the norm says,
    and by the same on every mesh, with replicas too.
    """
    import optax

    def cross_entropy(logits: jax.Array, hidden: jax.Array, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)

    @jax.jit  # one program, where each operation on each array would be one
    def descend(params: Any, grads: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 3e-4 * g, params, grads)

    after = []
    for mesh, redundant in (((1, 1, 1), 0), ((2, 2, 2), 1)):
        program = tiny_programs.make_program(*mesh, redundant=redundant)
        state, batch = program.init(0), program.shard(tiny_programs.make_batch())
        compute = moe_jax.loss_and_gradients(program, cross_entropy)
        (loss, layers), grads = compute(state, batch)
        params = descend(state.params, grads)
        (lower, _), _ = compute(state._replace(params=params), batch)
        after.append(float(lower))
        assert int(layers.dropped.sum()) == 0
        _, measured = program.train_step(state, batch)
        np.testing.assert_allclose(loss, measured.loss, rtol=1e-5)
        if not redundant:  # replicas would count twice in the sum of squares
            norm = float(jax.jit(optax.global_norm)(grads))
            np.testing.assert_allclose(norm, measured.grad_norm, rtol=1e-4)
            assert float(loss - lower) == pytest.approx(3e-4 * norm**2, rel=0.05)
    assert after[1] == pytest.approx(after[0], rel=1e-6)


def test_home_folders_and_urls_as_on_the_command_line(tmp_path, monkeypatch):
    for use in (moe_jax.load, moe_jax.read_run, lambda url: moe_jax.train({}, url)):
        with pytest.raises(moe_jax.UserError, match=r"gs:/+bucket/run is a URL"):
            use("gs://bucket/run")
    with pytest.raises(moe_jax.UserError, match=r"data.source='s3://bucket/a'"):
        moe_jax.train({"data": {"source": "s3://bucket/a"}}, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(moe_jax.UserError, match=f"{tmp_path}/x.yaml: there is no such file"):
        moe_jax.train("~/x.yaml", "~/run")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m.generate("a", max_tokens=0), "max_tokens=0: give a whole number of 1 or more"),
        (lambda m: m.generate("a", max_tokens=1.5), "max_tokens=1.5: give a whole number"),
        (lambda m: m.generate("a", max_tokens="3"), "max_tokens='3': give a whole number"),
        (lambda m: m.generate("a", stop=3), "stop=3: give a text or a list of texts"),
        (lambda m: m.generate("a", stop=""), "stop='': give a text or a list of texts"),
        (lambda m: m.generate(5), "prompt=5: give a text"),
        (lambda m: m.generate(["a", 5]), "prompt=5: give a text"),
        (lambda m: m.generate([["a"]]), r"prompt=\['a'\]: give a text"),
        (lambda m: m.generate(b"a"), "prompt=b'a': give a text"),
        (lambda m: m.stream(["a", "b"]), "prompt=.*: give a text, or token ids"),
        (lambda m: m.chat("Hi"), "messages: give a list of messages"),
        (lambda m: m.chat([]), "messages: give a list of messages"),
        (lambda m: m.chat([{"content": "Hi"}]), "messages: give a list of messages"),
        (lambda m: m.logits([-1]), r"prompt=\[-1\]: give a text, or token ids"),
        (lambda m: m.logits([1.5]), r"prompt=\[1.5\]: give a text, or token ids"),
        (lambda m: m.logits([[1], [-2]]), r"prompt=\[-2\]: give a text, or token ids"),
        (lambda m: m.score(["a", "b"]), "text=.*: give a text"),
        (lambda m: m.decode(5), "tokens=5: give a text, or token ids"),
        (lambda m: m.decode([-1]), r"tokens=\[-1\]: give"),
    ],
)
def test_what_a_model_cannot_take_is_one_sentence(model, call, sentence):
    with pytest.raises(moe_jax.UserError, match=sentence):
        call(model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"path": None}, "path=None: give the path or name of a model"),
        ({"mesh": "expert=2"}, r"mesh='expert=2': give a moe_jax.MeshConfig"),
        ({"mesh": {"expert": 2}}, r"give a moe_jax.MeshConfig, such as .*expert=2"),
        ({"dtype": "bf16"}, "dtype='bf16': give 'float32' or 'bfloat16'"),
        ({"quantize": "int3"}, "quantize='int3': give 'int8' or 'int4'"),
        ({"group": 32}, "group=32 is for quantize='int4': give that too"),
        ({"group": 33, "quantize": "int4"}, "group=33: give an even number"),
        ({"memory": "1GiB"}, "memory='1GiB': give a whole number"),
        ({"context": 0}, "context=0: give a whole number of 1 or more"),
        ({"step": 5}, "is not a run directory"),
    ],
)
def test_what_load_cannot_take_is_one_sentence(place, options, sentence):
    with pytest.raises(moe_jax.UserError, match=sentence):
        moe_jax.load(**{"path": place / "model"} | options)


def test_one_string_to_stop_at_is_not_its_letters(model):
    text = model.generate("def add", max_tokens=12, temperature=0)
    end = text[4:7]  # a string that comes, none of whose letters may end the text before it
    kept = model.generate("def add", max_tokens=12, temperature=0, stop=end)
    assert kept == text[: text.index(end)] != ""
    assert kept == model.generate("def add", max_tokens=12, temperature=0, stop=[end])


def test_a_runs_files_are_named_by_text_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    (record,) = moe_jax.read_metrics(str(tmp_path / "metrics.jsonl"))
    assert record["loss"] == 2.0
    with pytest.raises(moe_jax.UserError, match="does not exist"):
        moe_jax.read_history("nothing/metrics.jsonl")
    with pytest.raises(moe_jax.UserError, match="there is no"):
        moe_jax.read_measured("nothing.json")
