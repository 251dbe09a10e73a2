"""A run's directory: claimed without harming another run, described by config.yaml and
environment.json.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from moe_jax.config.load import (
    config_from_text,
    dump_config,
    dump_value,
    with_absolute_paths,
)
from moe_jax.config.schema import Config
from moe_jax.data.tokenizer_files import copy_tokenizer
from moe_jax.errors import UserError
from moe_jax.tracking.process_files import ATTEMPTS, FOLDER
from moe_jax.tracking.run_lock import LOCK_FILE
from moe_jax.utils.files import PART, is_left_by_system, local_path, rename_folder, replace_text

# What a run writes.
CONTENTS = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "traffic.json",
    "forecasts.npz",
    "checkpoints",
    "report.html",
    "plots",
    "tensorboard",
    "tokenizer",
    "hf_config.json",
    FOLDER,
    ATTEMPTS,
    "logs",  # what each process wrote to stderr, by `moe-jax launch`
    LOCK_FILE,
)
BEFORE_A_RUN = {FOLDER, ATTEMPTS, LOCK_FILE}  # what a start that was killed may leave

# What a resumed run must share with its beginning: sections and keys, except those in FREE. These
# only say how to compute, or where the text is: its hash tells whether it is still the same.
FIXED = (
    "init_from",
    "model",
    "moe",
    "data",
    "train.seed",
    "train.global_batch",
    "train.seq_len",
    "optimizer.name",
)
FREE = (
    *("model.remat", "model.attention", "moe.grouped_matmul", "moe.dispatch"),
    *("moe.gather_below", "moe.overlap_chunks"),
    *("data.source", "data.tokenizer", "data.text_field", "data.split"),
)


def default_run_dir(config: Path, name: str) -> Path:
    """The run that `config` belongs to, wherever it was moved and whatever its name says; runs/NAME
    for any other configuration.
    """
    marks = ("environment.json", "checkpoints")  # the second alone where files were copied by hand
    if config.name == "config.yaml" and any((config.parent / mark).exists() for mark in marks):
        return config.parent
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(
            f"name={name!r} cannot name a directory in runs/: use letters, digits, - and _, or "
            f"give --run-dir."
        )
    return Path("runs") / name


def read_run_config(run_dir: Path) -> Config:
    """The configuration of a run. Raises UserError for one that cannot be read."""
    path = run_dir / "config.yaml"
    # Earlier versions kept relative paths as they were typed.
    return with_absolute_paths(config_from_text(path.read_text(encoding="utf-8"), str(path)))


def require_run_or_start(run_dir: Path) -> None:
    """Raises UserError for what is neither the directory of a run nor of one that is starting."""
    if not run_dir.exists():
        raise UserError(f"{run_dir} does not exist: give the --run-dir of a `moe-jax train`.")
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file: give the --run-dir of a `moe-jax train`.")
    names = {path.name for path in run_dir.iterdir()}
    if "config.yaml" not in names and not names & BEFORE_A_RUN:
        raise UserError(
            f"{run_dir} is not a run directory (it has no config.yaml): give the --run-dir of a "
            f"`moe-jax train`."
        )


def claim(run_dir: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Checks that the run may write to `run_dir`; changes nothing.

    Raises UserError for a directory that is in use without `resume` or `overwrite`, for one that is
    not a run or that holds what no run wrote (`overwrite` would delete it), for a file in it that
    the new run needs, and for a resumed run whose model or batch differ from what it began with.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file: name a directory.")
    names = (
        {
            path.name
            for path in run_dir.iterdir()
            if not path.name.endswith(PART) and not is_left_by_system(path)
        }
        if run_dir.exists()
        else set()
    )
    if not names - BEFORE_A_RUN:
        return
    if "config.yaml" not in names:
        raise UserError(
            f"--run-dir {run_dir} holds something other than a run (it has no config.yaml): name "
            f"another directory."
        )
    if resume:
        _check_unchanged(read_run_config(run_dir), config, run_dir)
    elif overwrite:
        # Earlier versions wrote files with the suffix .tmp.
        foreign = sorted(name for name in names if name.removesuffix(".tmp") not in CONTENTS)
        if foreign:
            raise UserError(
                f"--overwrite would delete {run_dir / foreign[0]}, which no run wrote: move it "
                f"away, or name another --run-dir."
            )
        _check_needs_nothing(config, run_dir)
    else:
        raise UserError(
            f"{run_dir} holds a run already: continue it with --resume, replace it with "
            f"--overwrite, or name another directory with --run-dir."
        )


def run_tokenizer(run_dir: Path, config: Config) -> str:
    """What `load_tokenizer` takes for a run: the tokenizer that it keeps for itself, else (`bytes`,
    and runs of earlier versions) what data.tokenizer names.
    """
    kept = run_dir / "tokenizer"
    return str(kept) if kept.is_dir() else config.data.tokenizer


def keep_tokenizer(run_dir: Path, tokenizer: str) -> None:
    """Copies the files of a run's tokenizer into its directory, whole or not at all, so that it can
    be used wherever it is moved.

    `tokenizer` is what `load_tokenizer` takes; one that lies in the directory already stays.
    """
    if tokenizer == "bytes" or run_dir in Path(tokenizer).parents:
        return
    part, whole = run_dir / f"tokenizer{PART}", run_dir / "tokenizer"
    for left in (part, whole):  # by a start that was killed
        if left.exists():
            shutil.rmtree(left)
    copy_tokenizer(tokenizer, part)
    rename_folder(part, whole)


def clear(run_dir: Path) -> None:
    """Deletes the run in a directory that `claim` has checked; config.yaml, by which it is known as
    one, goes last. The lock stays, and what the processes of the new run say already.
    """
    if run_dir.exists():
        for path in sorted(run_dir.iterdir(), key=lambda path: path.name == "config.yaml"):
            if path.name in (FOLDER, LOCK_FILE):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted key; of the sources of a mixture their weights, as the texts are
    known by their hash.
    """
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return {prefix: tuple(part.weight for part in value)}
    if not dataclasses.is_dataclass(value):
        return {prefix: value}
    fields = (field.name for field in dataclasses.fields(value))
    return {
        key: leaf
        for name in fields
        for key, leaf in _flat(getattr(value, name), f"{prefix}.{name}".lstrip(".")).items()
    }


def _check_unchanged(old: Config, new: Config, run_dir: Path) -> None:
    before, after = _flat(old), _flat(new)
    for key, value in after.items():
        fixed = any(key == name or key.startswith(name + ".") for name in FIXED) and key not in FREE
        if fixed and before[key] != value:
            raise UserError(
                f"{key}={dump_value(value)} but the run in {run_dir} began with "
                f"{dump_value(before[key])}: resume with the same value, or "
                "start another run."
            )


def _check_needs_nothing(config: Config, run_dir: Path) -> None:
    """Raises UserError for a path of the configuration that leads into the run to be deleted."""
    needed = {
        "data.source": config.data.source,
        "data.tokenizer": config.data.tokenizer,
        "placement.file": config.placement.file,
        "placement.topology": config.placement.topology,
    } | {
        f"data.mixture[{number}].source": part.source
        for number, part in enumerate(config.data.mixture)
    }
    for key, value in needed.items():
        if value and local_path(value).resolve().is_relative_to(run_dir.resolve()):
            raise UserError(
                f"{key}={value} lies in {run_dir}, which --overwrite would delete: copy it "
                f"elsewhere, or name another --run-dir."
            )


def write_description(run_dir: Path, config: Config, environment: dict[str, Any]) -> None:
    """Writes config.yaml (resolved), by which a run is known, and environment.json, each whole or
    not at all.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / "config.yaml", dump_config(config))
    replace_text(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")
