"""Real jobs on a real Slurm of two nodes with CPU ranks: submitted, warned, preempted, resized, crashed, cancelled."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lut_ds.cli import main
from lut_ds.engine.submit import submit as write_script
from lut_ds.engine.tasks import Resources
from lut_ds.tracking import read_metrics
from tests.engine.launching import run_ranks
from tests.engine.test_resume import command, curve, write_recipe
from tests.launch.cluster import MISSING, WHY, Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=WHY),
]
STEPS = 80


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture
def folder(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """A folder of the test, with a blank in its name, below the cluster's so that failures show its logs."""
    path = cluster.folder / re.sub(r"\W+", " ", request.node.name)
    path.mkdir()
    return path


def recipe_of(folder: Path, digits: Path, steps: int = STEPS) -> Path:
    """A recipe of `steps` tiny steps into folder/run, metrics every 2, checkpoints every 40."""
    path = write_recipe(folder, digits, folder / "run", deepspeed="zero1")
    text = path.read_text().replace("max_steps: 14", f"max_steps: {steps}")
    path.write_text(text.replace("save_every: 4", "save_every: 40"))
    return path


def submit(cluster: Cluster, recipe: Path, *overrides: str, **wanted: Any) -> int:
    """Submit with one CPU rank a node, as `lut-ds submit` does but without starting an interpreter; returns the job."""
    resources = Resources(**{"gpus_per_node": 0, "cpus_per_task": 1, **wanted})
    made, _ = write_script(str(recipe), list(overrides), resources, os.environ, dry_run=True)
    script = recipe.parent / "job.sbatch"
    script.write_text(made["script"])
    (recipe.parent / "run" / "submit").mkdir(parents=True)
    return int(cluster.run("sbatch", "--parsable", script).stdout)


def starts(run: Path) -> list[dict[str, Any]]:
    """What environment.jsonl says of each start."""
    return [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]


def same_samples(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Every step is there once, with the loss of the same samples."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), one["step"]
        assert one["lr"] == other["lr"]


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The curve of two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(command(recipe_of(folder, digits)), 2)
    return curve(folder / "run")


@pytest.fixture(scope="module")
def faulty(cluster: Cluster, digits: Path) -> tuple[int, Path]:
    """A job whose interpreter cannot start, and its run folder; it restarts while other tests run."""
    folder = cluster.folder / "faulty"
    recipe, run = recipe_of(folder, digits), folder / "run"
    made, _ = write_script(str(recipe), [], Resources(gpus_per_node=0), os.environ, dry_run=True)
    script = folder / "job.sbatch"
    script.write_text(re.sub(r"(?m)^python=.*$", "python=/bin/false", made["script"]))
    (run / "submit").mkdir(parents=True)
    return int(cluster.run("sbatch", "--parsable", script).stdout), run


def test_preempted_twice_and_resized_sees_the_same_samples(
    cluster: Cluster, digits: Path, folder: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """Two nodes; an urgent job takes them, twice; then it is resized to one."""
    recipe, run, done = recipe_of(folder, digits), folder / "run", 0
    options = ["--nodes", 2, "--partition", "spare", "--gpus-per-node", 0, "--cpus-per-task", 1]
    job = int(json.loads(cluster.lut_ds("submit", recipe, *options, "--json").stdout)["job"])
    for preemption in (1, 2):
        cluster.wait_for_steps(run, done + 10)
        cluster.run("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        cluster.wait_for(job, "PENDING")
        assert done < len(curve(run)) < STEPS
        done = len(curve(run))
        if preemption == 2:
            cluster.run("scontrol", "update", f"jobid={job}", "numnodes=1", "numtasks=1", "numcpus=1")
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", cluster.logs()
    ranks = [start["cluster"]["hosts"] if "cluster" in start else [start["host"]] for start in starts(run)]
    assert ranks == [["node1", "node2"], ["node1", "node2"], ["node1"]]
    same_samples(curve(run), undisturbed)


@pytest.mark.usefixtures("faulty")
def test_a_warning_and_a_node_without_power_requeue_the_shipped_script_which_continues(
    cluster: Cluster, digits: Path, folder: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """The warning before the time limit, under torchrun, which dies of the signal and hides the ranks' exit code."""
    recipe, run = recipe_of(folder, digits), folder / "run"
    cpus = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
    arguments = [recipe, f"run.dir={run}"]
    sbatch = ["sbatch", "--parsable", *cpus, f"--output={folder}/slurm-%j.out", "launch/many_nodes_a100.sbatch"]
    job = int(cluster.run("env", f"python={command(recipe)[0]}", *sbatch, *arguments).stdout)
    cluster.wait_for_steps(run, 16)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING")
    stopped_at = len(curve(run))
    assert 16 <= stopped_at < STEPS
    assert (run / "checkpoints" / f"step_{stopped_at:08d}").is_dir()
    cluster.wait_for_steps(run, stopped_at + 4)
    cluster.run("local-slurm-node", "crash", "node2")
    down = ["nodename=node2", "state=down", "reason=power"]  # Slurm would find out in minutes
    cluster.run("scontrol", "update", *down)
    cluster.wait_for(job, "PENDING")
    assert len(curve(run)) < STEPS
    cluster.run("local-slurm-node", "start", "node2")
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.logs()
    assert len(starts(run)) == 3
    assert curve(run) == undisturbed
    log = (folder / f"slurm-{job}.out").read_text()
    assert f"stopped with checkpoint 'step_{stopped_at:08d}'; requeued" in log
    assert log.count("requeued") == 1  # the second time Slurm did it
    assert f"continuing {run} from step_{stopped_at:08d}" in log


def test_a_cancelled_job_ends_and_leaves_no_process(cluster: Cluster, digits: Path, folder: Path) -> None:
    recipe, run = recipe_of(folder, digits, steps=900), folder / "run"
    job = submit(cluster, recipe, "train.epochs=40", nodes=2)
    cluster.wait_for_steps(run, 4)
    assert cluster.processes(f"run.dir={run}")
    cluster.run("scancel", job)
    assert cluster.wait_for(job, "CANCELLED", "PENDING", "COMPLETED", "FAILED") == "CANCELLED"
    cluster.until(lambda: not cluster.run("squeue", "-h", "-j", job, check=False).stdout, "the job to leave the queue")
    cluster.until(lambda: not cluster.processes(f"run.dir={run}"), "the ranks to end")
    assert len(read_metrics(run / "metrics.jsonl")) < 900
    assert cluster.field(job, "Restarts") == "0"


def test_data_that_one_node_lacks_is_refused_and_not_requeued(cluster: Cluster, digits: Path, folder: Path) -> None:
    """/dev/shm is each node's own. Exit 2 on the first start is the end."""
    cluster.run("srun", "-N1", "-w", "node1", "cp", "-r", digits, "/dev/shm/digits")
    recipe = recipe_of(folder, Path("/dev/shm/digits"))
    job = submit(cluster, recipe, nodes=2, data_on_nodes=True)
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "PENDING") != "COMPLETED"
    assert cluster.wait_for(job, "FAILED") == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert cluster.field(job, "Restarts") == "0"
    log = (folder / "run" / "submit" / f"slurm-{job}.out").read_text()
    assert "lut-ds: data.path: /dev/shm/digits" in log
    assert "[on rank 1 (node2), not on all ranks]" in log
    assert not (folder / "run" / "recipe.yaml").exists()


def test_doctor_compares_the_nodes(cluster: Cluster) -> None:
    """Also what srun alone makes of its tasks."""
    doctor = [command(Path())[0], "-m", "lut_ds", "doctor", "--cluster", "--json"]
    done = cluster.run("env", "DS_ACCELERATOR=cpu", "srun", "-N2", "--ntasks-per-node=1", *doctor)
    report = json.loads(done.stdout)
    assert report["hosts"] == ["node1", "node2"]
    assert [link["kind"] for link in report["links"]] == ["between", "between"]
    assert report["clock_skew_s"] < 10  # tests share the cores


def test_a_fault_is_tried_again_a_few_times(cluster: Cluster, faulty: tuple[int, Path]) -> None:
    """Three faults without a checkpoint in between, then no more."""
    job, run = faulty
    cluster.wait_for(job, "FAILED")
    assert cluster.field(job, "Restarts") == "2"
    assert "fault 3 in a row at checkpoint ''; not requeued" in (run / "submit" / f"slurm-{job}.out").read_text()


def test_a_sweep_is_a_job_array_and_its_table_is_made_afterwards(cluster: Cluster, digits: Path, folder: Path) -> None:
    """The number of the last task is the whole array's: its warning and its restart must not be those of the others."""
    recipe_of(folder, digits, steps=300)
    runs = {"first": {"method.name": "mae"}, "last": {"optim.blr": 1e-4}}
    file, out = folder / "ablation.yaml", folder / "out"
    file.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "evaluate": ["knn"], "runs": runs}))
    first, last = (out / "runs" / name / "seed_0" for name in runs)
    options = ["--gpus-per-node", 0, "--cpus-per-task", 1]
    job = int(json.loads(cluster.lut_ds("submit", "--sweep", file, f"run.dir={out}", *options, "--json").stdout)["job"])
    for run in (first, last):
        cluster.wait_for_steps(run, 4)
    assert cluster.field(f"{job}_1", "JobId") == str(job)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    cluster.wait_for(f"{job}_1", "PENDING")
    stopped_at = len(curve(last))
    for task, run in enumerate((first, last)):
        assert cluster.wait_for(f"{job}_{task}", "COMPLETED", "FAILED") == "COMPLETED", cluster.logs()
        assert [record["step"] for record in curve(run)] == list(range(1, 301))
        assert cluster.field(f"{job}_{task}", "Restarts") == str(task)
        log = (run / "submit" / f"slurm-{job}_{task}.out").read_text()
        assert f"job {job}_{task}, start {1 + task}: done" in log
        assert f"{run}, checkpoint" in log
        assert ("the ranks are to save and stop" in log) is bool(task)
    assert 4 <= stopped_at < 300

    curves = [curve(run) for run in (first, last)]
    assert main(["sweep", str(file), "--out", str(out), "--no-training"]) == 0
    result = json.loads((out / "sweep.json").read_text())
    assert [(row["run"], row["weights"]) for row in result["table"]] == [
        ("first", "student"), ("last", "student"), ("last", "teacher"),
    ]  # fmt: skip
    assert (result["failed"], result["missing"]) == ({}, [])
    assert [run["training"]["steps"] for run in result["runs"]] == [300, 300]
    assert [curve(run) for run in (first, last)] == curves
    assert [len(starts(run)) for run in (first, last)] == [1, 2]


def test_deepspeeds_slurm_launcher(
    cluster: Cluster, digits: Path, folder: Path, undisturbed: list[dict[str, Any]]
) -> None:
    recipe, run = recipe_of(folder, digits, steps=4), folder / "run"
    job = submit(cluster, recipe, nodes=2, launcher="deepspeed-slurm")
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.logs()
    assert starts(run)[0]["cluster"]["hosts"] == ["node1", "node2"]
    assert curve(run) == undisturbed[:4]


def test_the_stop_file_ends_the_job_under_the_deepspeed_launcher(
    cluster: Cluster, digits: Path, folder: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """A person's wish: the run is saved, and not started again. The launcher hides the ranks' exit code."""
    recipe, run = recipe_of(folder, digits), folder / "run"
    job = submit(cluster, recipe, nodes=2, launcher="deepspeed")
    cluster.wait_for_steps(run, 2)
    (run / "stop").touch()
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "PENDING") == "FAILED", cluster.logs()
    assert (cluster.field(job, "ExitCode"), cluster.field(job, "Restarts")) == ("3:0", "0")
    done = len(curve(run))
    assert "stopped by the stop file with checkpoint" in (run / "submit" / f"slurm-{job}.out").read_text()
    assert (run / "checkpoints" / "latest").read_text() == f"step_{done:08d}\n"
    assert starts(run)[0]["cluster"]["hosts"] == ["node1", "node2"]
    assert curve(run) == undisturbed[:done]
    assert done < STEPS
    assert not (run / "stop").exists()


@pytest.mark.parametrize(
    "option, why",
    [
        (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--time", "soon"], "Invalid --time specification"),
    ],
)
def test_what_sbatch_refuses_is_one_line(
    cluster: Cluster, digits: Path, folder: Path, option: list[object], why: str
) -> None:
    recipe = recipe_of(folder, digits)
    done = cluster.lut_ds("submit", recipe, "--gpus-per-node", 0, *option, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("lut-ds: submit: sbatch refused ")
    assert why in line
