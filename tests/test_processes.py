"""What launched the processes of a run. Runs of several are in tests/slow/test_processes.py."""

import pytest

from dsv3_jax.processes import launched_by


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "SLURM"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "8"}, None),  # inside an allocation, not a task of it
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, "TPU"),
    ],
)
def test_who_started_the_processes_is_read_from_the_environment(environment, launcher):
    assert launched_by(environment) == launcher
