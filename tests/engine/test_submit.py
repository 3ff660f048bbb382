"""What `lut-ds submit` writes, and what it refuses before anything queues."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from lut_ds.engine.submit import render, submit
from lut_ds.engine.sweepfile import read_sweep
from lut_ds.engine.tasks import Resources, plan_job
from lut_ds.errors import UserError
from tests.engine.launching import ROOT
from tests.engine.tiny import tiny_tree


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe of global batch 16 for a run folder with a blank and a quote in its name."""
    (tmp_path / "my data").mkdir()
    tree = tiny_tree()
    tree["data"] = {"path": str(tmp_path / "my data")}
    path = tmp_path / "a recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def script(recipe: str, *overrides: str, sweep: str | None = None, **wanted: object) -> str:
    resources = Resources(**{"gpus_per_node": 4, **wanted})  # type: ignore[arg-type]
    return submit(recipe, list(overrides), resources, os.environ, sweep, dry_run=True)[1]


def options(text: str) -> dict[str, str]:
    """The #SBATCH options of a script."""
    words = [word for line in text.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line[8:])]
    return dict((word.removeprefix("--") + "=").split("=")[:2] for word in words)


def run_settings(text: str, show: str, **env: str) -> str:
    """Run a script's lines above its body and print what `show` asks for."""
    settings = text[: text.index("# The body of every batch script")]
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", "-euc", settings + "\n" + show],
        env={**os.environ, **job, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_script_asks_for_what_was_said(recipe: str, tmp_path: Path) -> None:
    text = script(
        recipe, f"run.dir={tmp_path}/r", nodes=2, time="1-00:00:00", partition="gpu", account="me", qos="low",
        constraint="h100&ib", cpus_per_task=12, extra=("--exclude=n7",),
    )  # fmt: skip
    expected = {
        "job-name": "a recipe", "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "12",
        "time": "1-00:00:00", "partition": "gpu", "account": "me", "qos": "low", "constraint": "h100&ib",
        "signal": "B:USR1@180", "open-mode": "append", "requeue": "", "exclude": "n7", "chdir": os.getcwd(),
        "output": f"{tmp_path}/r/submit/slurm-%j.out",
    }  # fmt: skip
    assert options(text) == expected


def test_blanks_and_quotes_reach_the_ranks_unchanged(recipe: str, tmp_path: Path) -> None:
    odd = f"run.dir={tmp_path}/it costs $5 & more"
    text = script(recipe, 'run.wandb_project=it\'s "mine"', odd)
    arguments = run_settings(text, r'printf "%s\n" "${arguments[@]}"').splitlines()
    assert arguments == ["pretrain", recipe, 'run.wandb_project=it\'s "mine"', odd]
    assert options(text)["output"] == f"{tmp_path}/it costs $5 & more/submit/slurm-%j.out"


def test_the_body_is_the_shipped_one_and_is_valid_shell(recipe: str) -> None:
    text = script(recipe)
    assert text.endswith((ROOT / "launch" / "job.sh").read_text().rstrip("\n"))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_sweep_gives_each_task_its_own_run(recipe: str, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.write_text("# comment\noptim.blr=1e-3\n\noptim.blr=1e-4 'run.wandb_project=two words'\n")
    text = script(recipe, sweep=str(sweep))
    assert options(text)["array"] == "0-1"
    assert options(text)["output"].endswith("runs/a recipe/submit/slurm-%A_%a.out")
    shown = [run_settings(text, r'printf "%s\n" "${arguments[@]}"', SLURM_ARRAY_TASK_ID=str(i)) for i in range(2)]
    folder = Path("runs/a recipe").absolute()
    assert shown[0].splitlines()[2:] == ["optim.blr=1e-3", f"run.dir={folder}/000"]
    assert shown[1].splitlines()[2:] == ["optim.blr=1e-4", "run.wandb_project=two words", f"run.dir={folder}/001"]


def test_the_ranks_are_told_by_a_signal_that_they_listen_to(recipe: str, tmp_path: Path) -> None:
    def told(text: str, **env: str) -> str:
        return run_settings(text, 'echo "$stop_signal"', **env).strip()

    assert told(script(recipe)) == "USR1"
    other = script(recipe, "run.stop_signals=[SIGUSR2,SIGTERM]")
    assert told(other) == "USR2"
    assert options(other)["signal"] == "B:USR1@180"  # the batch script's own, which it traps
    with pytest.raises(UserError, match=r"run\.stop_signals: expected at least one signal"):
        script(recipe, "run.stop_signals=[]")
    sweep = tmp_path / "sweep"
    sweep.write_text("run.stop_signals=[SIGHUP]\noptim.blr=1e-4\n")
    text = script(recipe, sweep=str(sweep))
    assert [told(text, SLURM_ARRAY_TASK_ID=str(task)) for task in range(2)] == ["HUP", "USR1"]


def test_setup_lines_come_before_the_body_and_a_cpu_job_says_so(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # of whoever runs the tests: a job would inherit it
    setup = tmp_path / "setup.sh"
    setup.write_text("export NCCL_DEBUG=INFO\n")
    assert run_settings(script(recipe, setup=str(setup)), 'echo "$NCCL_DEBUG ${DS_ACCELERATOR:-}"') == "INFO \n"
    text = script(recipe, gpus_per_node=0)
    assert "gpus-per-node" not in options(text)
    assert options(text)["ntasks-per-node"] == "1"
    assert run_settings(text, 'echo "$DS_ACCELERATOR"') == "cpu\n"


def test_a_container_sees_the_data_the_run_and_the_recipe(recipe: str, tmp_path: Path) -> None:
    text = script(recipe, f"run.dir={tmp_path}/r", container="image.sqsh")
    shown = run_settings(text, r'printf "%s\n" "$python" "${srun_options[@]}"').splitlines()
    assert shown[:2] == ["python", "--container-image=image.sqsh"]
    mounts = shown[2].removeprefix("--container-mounts=").split(",")
    assert {f"{tmp_path}/my data", f"{tmp_path}/r", str(tmp_path), os.getcwd()} <= set(mounts)


@pytest.mark.parametrize(
    "overrides, wanted, why",
    [
        ([], {"nodes": 3}, "--nodes 3 x 4 ranks: train.global_batch: 16 is not divisible by 12 ranks"),
        (["train.micro_batch=3"], {}, "train.micro_batch 3 does not divide"),
        (["data.path=null"], {}, "data.path: no image folder given"),
        (["data.path=/nowhere"], {}, "data.path: /nowhere does not exist here"),
        (["train.deepspeed=zero9"], {}, "no DeepSpeed configuration 'zero9'"),
        (["optim.blrr=1"], {}, "did you mean optim.blr?"),
        (["run.dir=/usr"], {}, "run.dir: /usr exists and is no run folder"),
        ([], {"launcher": "mpi"}, "--launcher: expected one of srun"),
        ([], {"partition": 'a"b'}, "--partition: expected text without quotes"),
        ([], {"setup": "/nowhere.sh"}, "--setup: /nowhere.sh cannot be read"),
    ],
)
def test_what_would_fail_later_is_refused_now(
    recipe: str, overrides: list[str], wanted: dict[str, object], why: str
) -> None:
    with pytest.raises(UserError) as caught:
        script(recipe, *overrides, **wanted)
    assert why in str(caught.value)


def test_data_that_only_the_nodes_have(recipe: str) -> None:
    assert "data.path=/nowhere" in script(recipe, "data.path=/nowhere", data_on_nodes=True)


@pytest.mark.parametrize(
    "lines, why", [("", "has no line"), ("run.dir=x\nrun.dir=x\n", "share the run folder"), ("'", "No closing")]
)
def test_a_sweep_that_cannot_be(recipe: str, tmp_path: Path, lines: str, why: str) -> None:
    (tmp_path / "sweep").write_text(lines)
    with pytest.raises(UserError, match=why):
        plan_job(recipe, [], str(tmp_path / "sweep"), Resources(gpus_per_node=4))


def test_the_yaml_file_of_a_sweep_is_an_array_too(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"recipe": recipe, "seeds": [0, 5], "runs": {"a": {}, "b": {"method.w_bc": 1}}})
    )
    text = submit(
        None, [f"run.dir={tmp_path}/out", "optim.blr=1e-3"], Resources(), os.environ, f"{tmp_path}/s.yaml", True
    )[1]
    assert options(text)["array"] == "0-3"
    assert options(text)["output"] == f"{tmp_path}/out/submit/slurm-%A_%a.out"
    log = run_settings(text, 'echo "$task_log"', SLURM_ARRAY_TASK_ID="1")
    assert log == f"{tmp_path}/out/submit/slurm-7_1.out\n"
    entries = read_sweep(tmp_path / "s.yaml", tmp_path / "out", ["optim.blr=1e-3"]).entries
    for index, entry in enumerate(entries):
        words = run_settings(text, 'printf "%s\\n" "${arguments[@]}"', SLURM_ARRAY_TASK_ID=str(index)).splitlines()
        assert words == ["pretrain", *entry.words]
        assert words[-1] == f"run.dir={tmp_path}/out/runs/{'ab'[index // 2]}/seed_{(0, 5)[index % 2]}"
    with pytest.raises(UserError, match="names its own"):
        plan_job(recipe, [], str(tmp_path / "s.yaml"), Resources())
    with pytest.raises(UserError, match="expected a recipe, found none"):
        plan_job(None, [], None, Resources())


def test_a_sweep_leaves_out_what_is_trained(recipe: str, tmp_path: Path) -> None:
    file, words = tmp_path / "s.yaml", [f"run.dir={tmp_path}/the runs"]
    file.write_text(yaml.safe_dump({"recipe": recipe, "runs": {"a": {}, "b": {"train.max_steps": 7}}}))

    def text() -> str:
        return submit(None, words, Resources(gpus_per_node=4), os.environ, str(file), dry_run=True)[1]

    def train(name: str, step: int, epoch: float) -> None:
        (run,) = [e for e in read_sweep(file, tmp_path / "the runs").entries if e.name == name]
        checkpoint = run.folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "epoch": epoch}))
        (run.folder / "recipe.yaml").write_text(yaml.safe_dump(run.recipe.model_dump(mode="json")))

    train("a", 10, 3.9)
    assert options(text())["array"] == "0-1"
    train("b", 7, 0.5)
    lone = text()
    assert "array" not in options(lone)
    assert options(lone)["output"] == f"{tmp_path}/the runs/submit/slurm-%j.out"
    shown = run_settings(lone, 'printf "%s\n" "$task_log" "${arguments[@]}"').splitlines()
    assert (shown[0], shown[-1]) == (
        f"{tmp_path}/the runs/submit/slurm-7.out",
        f"run.dir={tmp_path}/the runs/runs/a/seed_0",
    )
    train("a", 12, 4.0)
    with pytest.raises(UserError, match=r"expected a run that is not trained yet .* found none of 2; make the table"):
        text()
    file.write_text(file.read_text().replace("max_steps: 7", "max_steps: 6"))
    with pytest.raises(UserError, match=r"runs\.b: .* holds a run of 7 steps: expected at most train\.max_steps 6"):
        text()


def test_a_folder_of_another_run_is_refused(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (task,) = plan_job(recipe, [f"run.dir={run}"], None, Resources(gpus_per_node=4)).tasks
    (run / "recipe.yaml").write_text(yaml.safe_dump({**task.recipe.model_dump(mode="json")}))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"holds a run of another recipe: optim\.blr"):
        script(recipe, f"run.dir={run}", "optim.blr=1")
    assert script(recipe, f"run.dir={run}")


def test_no_sbatch_here(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no sbatch on this machine.*--dry-run"):
        submit(recipe, [f"run.dir={tmp_path}/r"], Resources(gpus_per_node=4), os.environ)
    assert not (tmp_path / "r").exists()


def test_what_sbatch_lines_cannot_hold(recipe: str) -> None:
    job = plan_job(recipe, [], None, Resources(gpus_per_node=4))
    with pytest.raises(UserError, match="--job-name: expected text without quotes"):
        render(job, Resources(job_name="two\nlines"), "x")


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.sbatch")), ids=lambda p: p.name)
def test_the_shipped_scripts_are_valid_shell(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)
    words = options(file.read_text())
    assert {"requeue", "signal", "open-mode", "output"} <= set(words)
