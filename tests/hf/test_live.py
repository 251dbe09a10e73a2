"""transformers itself, as installed here: it still computes what cases.py holds, and it loads what
we export.

Needs torch, which the other tests do not; without it all of this is skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import ROOT
from tests.support import hf_cases as cases

pytest.importorskip("torch", reason="compares with transformers itself, which needs torch")
sys.path.insert(0, str(ROOT / "scripts"))

import record_hf_cases

from moe_jax import hf
from moe_jax.hf.export import export

pytestmark = pytest.mark.slow  # `make test-live` runs it; test_logits.py holds the recorded values
EXACT = ("tokens", "lengths", "experts", "prompt", "greedy", "uncached")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    record_hf_cases.transformers.logging.set_verbosity_error()
    record_hf_cases.transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("case", cases.CASES)
def test_transformers_still_computes_what_was_recorded(case: str, tmp_path: Path) -> None:
    wanted = cases.expected(case)
    folder = cases.build(case, tmp_path)
    found = record_hf_cases.outcome(folder, case, cases.describe(case)["seed"])
    assert found is not None, "a choice in this case hangs on rounding"
    if case in cases.TRAINED:
        found |= record_hf_cases.training_step(folder, found["tokens"])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name in EXACT:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name


@pytest.mark.parametrize("case", cases.CASES)
def test_transformers_takes_the_checkpoints_tensors(case: str, tmp_path: Path) -> None:
    """The names and shapes on record are those that it saves."""
    assert (
        record_hf_cases.hub_tensors(cases.describe(case)["config"], tmp_path / "saved")
        == cases.describe(case)["tensors"]
    )


@pytest.mark.parametrize(
    "case", [case for case in cases.CASES if hf.FAMILIES[cases.family(case)].fused]
)
def test_the_experts_that_transformers_fuses_are_read(case: str, tmp_path: Path) -> None:
    folder = cases.build(case, tmp_path / "in")
    model = record_hf_cases.load(folder)
    model.save_pretrained(tmp_path / "out", save_original_format=False)
    wanted, found = hf.open_checkpoint(folder), hf.open_checkpoint(tmp_path / "out")
    for path in wanted.shapes():
        np.testing.assert_array_equal(found.leaf(path), wanted.leaf(path), err_msg=path)


@pytest.mark.parametrize("case", cases.CASES)
def test_transformers_loads_what_we_export(case: str, tmp_path: Path) -> None:
    checkpoint = hf.open_checkpoint(cases.build(case, tmp_path / "in"))
    export(
        tmp_path / "out",
        checkpoint.family,
        checkpoint.config,
        checkpoint.leaf,
        bias_LE=checkpoint.bias_LE(),
    )
    wanted = cases.expected(case)
    model = record_hf_cases.load(tmp_path / "out")
    found, _ = record_hf_cases.run(
        model, record_hf_cases.torch.from_numpy(wanted["tokens"].astype(np.int64))
    )
    assert np.abs(found[:, -1] - wanted["last"]).max() <= 1e-5 * np.abs(wanted["last"]).max()
