"""Every training command that files and pages give can be read by this version, and its mesh is of the stated chips."""

import dataclasses
import math
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from dsv3_jax.command_line import parse_train
from dsv3_jax.layout import describe
from dsv3_jax.model.functional import skeleton_of
from sharding.mesh import axis_sizes
from tests.reference.hf_checkpoint import fabricate

ROOT = Path(__file__).parents[1]
LAUNCH = sorted((ROOT / "launch").iterdir())
JOBSET = ROOT / "launch" / "gke_jobset.yaml"


def _commands(path: Path) -> list[list[str]]:
    """The arguments of every `python train.py` of a file, up to where its shell command ends; variables as 1."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    text = re.sub(r"\$\{?\w+\}?", "1", text)
    found = re.findall(r"python train\.py((?: +(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s`&|;<>\"']+)+)*)", text)
    return [shlex.split(arguments) for arguments in found]


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if _commands(page)]


def _chips(path: Path) -> int:
    """How many the file asks for."""
    text = path.read_text(encoding="utf-8")
    if path == JOBSET:
        job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
        pod = job["template"]["spec"]
        chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
        assert chips == job["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
        assert job["completions"] == job["parallelism"]
        return chips
    if cores := re.search(r"--accelerator-type=v5p-(\d+)", text):
        return int(cores.group(1)) // 2
    nodes, tasks, devices = (
        int(re.search(rf"^#SBATCH --{name}=(\d+)$", text, re.MULTILINE).group(1))
        for name in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert tasks == devices, "jax gives each task of a node one device"
    return nodes * devices


@pytest.mark.parametrize("path", [*LAUNCH, *PAGES], ids=lambda path: path.name)
def test_training_commands_can_be_read(path, tmp_path, tiny_model):
    fabricate(tmp_path, tiny_model())
    commands = _commands(path)
    assert commands
    for arguments in commands:
        parse_train([argument.replace("HF_DIR", str(tmp_path)) for argument in arguments])


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_the_mesh_of_a_launch_file_takes_its_chips_and_the_model_fits_it(path):
    (arguments,) = _commands(path)
    config, chips = parse_train(arguments).config, _chips(path)
    sizes = axis_sizes(dataclasses.asdict(config.mesh), chips)
    assert math.prod(sizes.values()) == chips
    on_chips = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    assert f" = {chips} devices" in describe(on_chips, skeleton_of(config.model), devices=1)


@pytest.mark.parametrize("path", [path for path in LAUNCH if path != JOBSET], ids=lambda path: path.name)
def test_bash_reads_the_scripts(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("index", "ends", "stop", "code"),
    [
        (0, "mkdir -p $RUN; touch $RUN/summary.json; exit 0", False, 0),
        (1, "exit 0", False, 0),
        (0, "exit 1", False, 1),
        (1, "exit 1", False, 1),
        # Told to go, train.py saves and ends well; process 0 then has to fail, for the JobSet to start again.
        (0, "sleep 30 & wait", True, 1),
        (1, "sleep 30 & wait", True, 0),
    ],
)
def test_a_pod_counts_as_done_only_when_the_run_has_ended(tmp_path, index, ends, stop, code):
    container = yaml.safe_load(JOBSET.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\ntrap 'kill %1; exit 0' TERM\ntouch {tmp_path}/started\n{ends}\n")
    program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "JOB_COMPLETION_INDEX": str(index),
        "RUN": f"{tmp_path}/runs/v3_671b",
    }
    script = container["args"][0].replace("/shared", str(tmp_path))
    pod = subprocess.Popen([*container["command"], script], env=environment)
    while stop and not (tmp_path / "started").exists():
        time.sleep(0.01)
    if stop:
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=120) == code
