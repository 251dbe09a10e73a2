"""Which directories a run may write into."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_jax.config.schema import Config, DataConfig, MixtureSource
from moe_jax.errors import UserError
from moe_jax.tracking.run_dir import claim, read_run_config, write_description


def test_what_desktops_leave_does_not_make_a_directory_used(tmp_path: Path) -> None:
    for name in (".DS_Store", "._.DS_Store", "Thumbs.db", ".nfs0001"):
        (tmp_path / name).write_bytes(b"\0")
    claim(tmp_path, Config(), resume=False, overwrite=False)
    write_description(tmp_path, Config(), {})
    claim(tmp_path, Config(), resume=False, overwrite=True)
    (tmp_path / ".git").mkdir()
    with pytest.raises(UserError, match=r"--overwrite would delete .*\.git, which no run wrote"):
        claim(tmp_path, Config(), resume=False, overwrite=True)


def test_relative_paths_of_an_older_run_are_those_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data: {source: texts}")
    assert read_run_config(Path("run")).data.source == str(tmp_path / "texts")


def test_a_resumed_mixture_keeps_its_weights_and_may_be_elsewhere(tmp_path: Path) -> None:
    def mixed(*parts: tuple[str, float]) -> Config:
        sources = (MixtureSource(source=source, weight=weight) for source, weight in parts)
        return Config(data=DataConfig(mixture=tuple(sources)))

    run = tmp_path / "run"
    write_description(run, mixed(("/a", 1), ("/b", 2)), {})
    claim(run, mixed(("/c", 1), ("/b", 2)), resume=True, overwrite=False)
    for other in (mixed(("/a", 1), ("/b", 3)), mixed(("/a", 1)), Config()):
        with pytest.raises(UserError, match=r"^data\.mixture=.* began with \[1\.0, 2\.0\]"):
            claim(run, other, resume=True, overwrite=False)
    inside = mixed(("/a", 1), (str(run / "texts"), 2))
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.source=.* lies in"):
        claim(run, inside, resume=False, overwrite=True)
