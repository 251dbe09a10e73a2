"""What --mesh, --memory and the rest may say, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_jax.cli.model_options import ModelChoice, ModelOptions, load_model, parse_mesh
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.utils.units import parse_bytes
from tests.support.fake_model import Loaded, install, shout


def test_meshes() -> None:
    assert parse_mesh("expert=4,tensor=2") == MeshConfig(expert=4, tensor=2)
    assert parse_mesh(" data = 3 ") == MeshConfig(data=3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "expert",
        "exprt=4",
        "expert=4,",
        "expert=2,expert=2",
        "expert=x",
        "expert=4;tensor=2",
        "expert=0",
    ],
)
def test_meshes_that_are_none(text: str) -> None:
    words = r"--mesh '.*' cannot be read at|has expert twice|--mesh .*: expert=0 must"
    with pytest.raises(UserError, match=words):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5 mib", 3 * 2**19),
        ("2TB", 2 * 10**12),
        ("4096", 4096),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 potatoes", "-3GiB", "0", "1e9", "24 GiB and more"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--memory '.*' cannot be read as a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "--dtype 'float16' is unknown: choose float32 or bfloat16."),
        ({"quantize": "int3"}, "--quantize 'int3' is unknown: choose int8 or int4."),
        (
            {"mesh": "expert=4", "simulate": 2},
            "--simulate 2 is less than the 4 devices of --mesh expert=4",
        ),
        ({"memory": "much"}, "--memory 'much'"),
        ({"group": 33}, "--group 33 is odd, and int4 keeps two values per byte"),
        ({"group": 32}, "--group 32 is for --quantize int4: give that too, or leave --group out"),
        ({"group": 32, "quantize": "int8"}, "--group 32 is for --quantize int4"),
        ({"step": 3}, "is not a run directory"),
        ({"fallback": True}, "is not a run directory"),
        ({"path": Path("nowhere")}, "nowhere does not exist"),
        ({"path": Path("/no/where/at/all")}, "/no/where/at/all does not exist"),
    ],
    ids=str,
)
def test_mistakes_cost_nothing(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        path = options.pop("path", tmp_path)
        ModelChoice(path, ModelOptions(**options))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_engine_gets_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = install(monkeypatch, Loaded(shout))
    (tmp_path / "config.yaml").write_text("")
    options = ModelOptions(
        mesh="expert=4,tensor=2",
        dtype="bfloat16",
        quantize="int4",
        memory="1GiB",
        context=4096,
        step=7,
        fallback=True,
    )
    choice = ModelChoice(tmp_path, options)
    assert choice.is_run
    loaded = load_model(choice)
    assert loaded.model.name == "fake" and loaded.seconds > 0
    assert opened == [
        {
            "path": tmp_path,
            "mesh": MeshConfig(expert=4, tensor=2),
            "dtype": "bfloat16",
            "quantize": "int4",
            "memory": 2**30,
            "step": 7,
            "fallback": True,
            "group": 64,
            "context": 4096,
            "expert_cache": None,
            "redundant_slots": 0,
            "check": None,
            "check_plan": None,
        }
    ]
    assert ModelChoice(Path("someone/some-model"))  # a name on the hub: the engine's to find
    assert ModelOptions().mesh_config == MeshConfig()
