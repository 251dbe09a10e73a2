"""A run that goes on with the processes that are left, on a smaller mesh, and grows again.

The devices of each process and the tensor axis stay. Which meshes fit a run is asked where a start
would refuse them: the configuration, the share of the batch, and the files of placement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from moe_jax.config.load import load_config
from moe_jax.config.schema import MeshConfig
from moe_jax.data.corpus import process_rows
from moe_jax.errors import UserError
from moe_jax.launch.processes import Job, with_options
from moe_jax.placement.files import configured_topology, read_table
from moe_jax.utils.files import local_path


@dataclass(frozen=True)
class Elastic:
    """A training job that may shrink: as it was asked for, its configuration and its mesh."""

    full: Job
    config_path: str
    overrides: tuple[str, ...]
    mesh: MeshConfig
    simulated: bool  # whether the configuration says how many devices there are

    def on_fewer(self, job: Job, lost: int) -> Job | None:
        """The job without the `lost` processes of `job`: as many as a mesh fits for; None if none
        fits.
        """
        per_process = self.mesh.size // self.full.processes
        for processes in range(job.processes - lost, 0, -1):
            for mesh in smaller_meshes(self.mesh, processes * per_process):
                settings = self._settings(mesh)
                if self._fits(settings, processes):
                    return self._with(job, processes, mesh, settings)
        return None

    def again_in_full(self) -> Job:
        """All processes on the configured mesh, from the newest checkpoint."""
        return self.full.again()

    def _with(self, job: Job, processes: int, mesh: MeshConfig, settings: tuple[str, ...]) -> Job:
        words = self.full.again().command
        for setting in settings:
            words = tuple(with_options(list(words), "--set", setting))
        return dataclasses.replace(
            job, command=words, processes=processes, mesh=mesh.axes_text or "1 device"
        )

    def _settings(self, mesh: MeshConfig) -> tuple[str, ...]:
        found = (f"mesh.data={mesh.data}", f"mesh.expert={mesh.expert}")
        return (*found, f"devices.simulate={mesh.size}") if self.simulated else found

    def _fits(self, settings: tuple[str, ...], processes: int) -> bool:
        try:
            config = load_config(local_path(self.config_path), [*self.overrides, *settings])
            process_rows(config.train.global_batch, 0, processes)
            configured_topology(config.placement, config.mesh)
            if config.placement.strategy == "custom":
                read_table(local_path(str(config.placement.file)), ranks=config.mesh.expert)
        except UserError:
            return False
        return True


def smaller_meshes(mesh: MeshConfig, size: int) -> Iterator[MeshConfig]:
    """The meshes of `size` devices with the same tensor axis; first those whose data axis is as it
    was, then those whose expert axis changes least.
    """
    rest, remainder = divmod(size, mesh.tensor)
    if remainder:
        return
    found = [
        MeshConfig(data=data, expert=rest // data, tensor=mesh.tensor)
        for data in range(1, rest + 1)
        if rest % data == 0
    ]
    yield from sorted(
        found, key=lambda other: (other.data != mesh.data, abs(other.expert - mesh.expert))
    )
