"""The launchers are well-formed; launch/local.sh also runs in test_train.py."""

import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.mark.parametrize("script", ["local.sh", "tpu_vm.sh"])
def test_usage_is_said(script):
    run = subprocess.run(["bash", LAUNCH / script], capture_output=True, text=True)
    assert run.returncode == 2
    assert "usage:" in run.stderr


def test_local_fails_with_its_processes():
    run = subprocess.run(["bash", LAUNCH / "local.sh", "2", "false"], capture_output=True, text=True)
    assert run.returncode == 1


def test_jobset_starts_one_pod_per_host():
    jobset = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"
    container = job["template"]["spec"]["containers"][0]
    rows, columns = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == int(rows) * int(columns)
    assert container["command"][:2] == ["ssljax", "train"]
