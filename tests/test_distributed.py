import pytest

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
