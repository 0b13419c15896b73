import os
import subprocess
import sys

import pytest

from bench.chaos import CONFIG, ROOT, write_shards
from ssljax.distributed import Launch, detect


def test_a_laptop():
    assert str(detect({})) == "single process"


def test_slurm_needs_srun():
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "3"}
    assert detect(job) == Launch("single process")
    assert str(detect({**job, "SLURM_STEP_NUM_TASKS": "16"})) == "SLURM job 7, process 3 of 16"


def test_tpu_slices():
    pod = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
    assert detect(pod) == Launch("TPU pod slice", None, 4, 2)
    assert detect({**pod, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}).kind == "GKE TPU slice"
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost"}) == Launch("single process")


def test_kubernetes_job():
    env = {"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "job-0:1234", "JAX_NUM_PROCESSES": "2"}
    assert str(detect(env)) == "Kubernetes indexed job, process 1 of 2, coordinator job-0:1234"


def test_arguments_win_over_the_environment():
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert str(detect(slurm, "host:1", 2, 1)) == "--coordinator, process 1 of 2, coordinator host:1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "belong together"),
        (("host:1", 2, 2), "between 0 and 1"),
        (("host", 2, 0), "needs a port"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        detect({}, *arguments)


# What each of two processes runs: a training with a seed of its own, on shards of its own disk.
PROCESS = """
import os
import sys

from ssljax.config import experiment, load_config
from ssljax.distributed import initialize
from ssljax.train import train

config, folder, seeds, _, coordinator, _, processes, _, process = sys.argv[1:]
initialize(coordinator, int(processes), int(process))
os.chdir(f"{folder}/{process}")
seed = seeds.split()[int(process)]
overrides = ["data.train=tar:digits-{000..001}.tar", f"seed={seed}", "steps=1"]
train(experiment(load_config(config, overrides)), f"{folder}/run")
"""


@pytest.mark.parametrize(("pictures", "seeds", "message"), [
    ((320, 318), "0 0", "the number of records is 320 in process 0, but 318 in process 1"),
    ((40, 40), "0 7", "seed is 0 in process 0, but 7 in process 1"),
])  # fmt: skip
def test_processes_of_different_configs_or_data_do_not_start(tmp_path, pictures, seeds, message):
    for process, count in enumerate(pictures):
        (tmp_path / str(process)).mkdir()
        write_shards(tmp_path / str(process), count)
    command = ["bash", "launch/local.sh", "2", sys.executable, "-c", PROCESS, f"{CONFIG}:run", str(tmp_path), seeds]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    found = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    said = found.stdout + found.stderr
    assert said.count(f"ValueError: {message}: start all processes with the same command, code and files") == 2, said
    assert not (tmp_path / "run/checkpoints").exists()
