"""The corpus step of a recipe on many machines, by datatrove's executors (pip install datatrove; for Ray also ray).

    python tools/preprocess_cluster.py mobilellm_r1_140m --step corpus_pretrain --runs-dir /shared/runs \\
        --executor slurm --ranks 200 --partition cpu --time 12:00:00

Every phase of the stage (megatron_r1/corpus/phases.py) becomes one executor of --ranks ranks; rank r does every ranks-th task. A
phase begins when the one before has ended. Ranks share nothing but the runs folder, which must be on a file
system that all machines see, under one path. Submit the same command again after any failure: what is done is not done again.
At the end `megatron-r1 run RECIPE --only STEP --runs-dir ...` finds every task done, and completes the artifact.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_r1.artifacts.base import (
    Artifact,
    Workspace,
    artifact_path,
    open_artifact,
    open_workspace,
    step_fingerprint,
)
from megatron_r1.corpus.config import CorpusConfig
from megatron_r1.corpus.phases import Desk, phases
from megatron_r1.corpus.plan import Job
from megatron_r1.corpus.workers import Share, require_done
from megatron_r1.pipeline.recipe import Recipe, load_recipe
from megatron_r1.utils.errors import ConfigError, EnvironmentProblem, R1Error


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="preprocess_cluster.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("--step", required=True, help="its corpus step")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting, as for megatron-r1 run")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept, on a file system all machines share")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), required=True, help="datatrove's executor")
    parser.add_argument("--ranks", type=int, required=True, help="ranks of every phase: about the number of cores there will be")
    parser.add_argument("--workers", type=int, default=-1, help="ranks that run at once; by default all")
    parser.add_argument("--partition", help="slurm: partition")
    parser.add_argument("--time", default="24:00:00", help="slurm: time limit of a job")
    parser.add_argument("--mem-per-cpu-gb", type=int, default=3, help="slurm, ray: memory of a rank")
    parser.add_argument("--env-command", help="slurm: what makes this environment on a node, such as 'source venv/bin/activate'")
    return parser.parse_args(argv)


def parent(recipe: Recipe, step: str, folder: Path) -> Artifact:
    """The complete artifact of a step. Raises ArtifactError when it is not complete."""
    stage, config = recipe.stage(step), recipe.steps[step]
    return open_artifact(artifact_path(folder, step, step_fingerprint(stage.kind, config, inputs(recipe, step, folder))), stage.kind)


def inputs(recipe: Recipe, step: str, folder: Path) -> dict[str, Any]:
    """The artifacts a step reads."""
    return {role: parent(recipe, str(name), folder) for role, name in recipe.inputs(step).items()}


def workspace(args: argparse.Namespace) -> tuple[Workspace, Job]:
    """Where `megatron-r1 run` would make the step, and the job it would do there."""
    if args.ranks < 1:
        raise ConfigError(expected="--ranks of 1 or more", found=str(args.ranks), fix="give about the number of cores there will be")
    recipe = load_recipe(args.recipe, args.overrides)
    config = recipe.steps.get(args.step)
    if not isinstance(config, CorpusConfig):
        raise ConfigError(expected=f"a corpus step of {recipe.name}", found=repr(args.step), fix=f"name one of {', '.join(name for name, step in recipe.steps.items() if isinstance(step, CorpusConfig))}")
    folder = args.runs_dir.resolve() / recipe.name
    read = inputs(recipe, args.step, folder)
    work = open_workspace(folder, args.step, recipe.stage(args.step).kind, config, read, "tools/preprocess_cluster.py " + " ".join(sys.argv[1:]))
    return work, Job(config, work.tmp, read["tokenizer"].path if "tokenizer" in read else None)


def executors(args: argparse.Namespace, work: Workspace, job: Job) -> list[Any]:
    """One executor a phase. Slurm's depend on the one before; the others are run one after the other here."""
    try:
        from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    except ImportError as error:
        raise EnvironmentProblem(expected="the package datatrove, whose executors run the ranks", found=str(error), fix="pip install 'datatrove>=0.10' (and ray for --executor ray)") from error
    made: list[Any] = []
    for phase in phases(job.config):
        common = {
            "pipeline": [Share(job, phase)], "tasks": 1 if phase == "tokenizer" else args.ranks, "workers": args.workers,
            # A task's record says whether it is done; that a rank ended once says nothing when files have changed since.
            "skip_completed": False, "logging_dir": str(work.tmp / "cluster" / phase), "depends": made[-1] if made and args.executor == "slurm" else None,
        }
        if args.executor == "local":
            made.append(LocalPipelineExecutor(**common))
        elif args.executor == "ray":
            made.append(RayPipelineExecutor(**common, mem_per_cpu_gb=args.mem_per_cpu_gb))
        else:
            if not args.partition:
                raise ConfigError(expected="--partition with --executor slurm", found="none", fix="name the partition your site gives you")
            made.append(SlurmPipelineExecutor(
                **common, time=args.time, partition=args.partition, mem_per_cpu_gb=args.mem_per_cpu_gb, job_name=f"r1-{args.step}-{phase}", env_command=args.env_command,
            ))
    return made


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0 when every phase has ended (Slurm: was submitted)."""
    args = arguments(argv)
    try:
        work, job = workspace(args)
        made = executors(args, work, job)
        if args.executor == "slurm":
            made[-1].run()  # submits those it depends on first
        else:
            for phase, executor in zip(phases(job.config), made, strict=True):
                executor.run()
                require_done(Desk(job), phase)
    except R1Error as error:
        print(f"preprocess_cluster.py: {type(error).__name__}\n{error}", file=sys.stderr)
        return 1
    print(f"{'submitted; when the jobs have ended' if args.executor == 'slurm' else 'done'}: megatron-r1 run {args.recipe} --only {args.step} --runs-dir {args.runs_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
