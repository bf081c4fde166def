"""The face: `megatron-r1 run | plan | steps | recipes | ledger | export | doctor`. Parses, calls, prints; imports the rest when needed."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from megatron_r1 import __version__
from megatron_r1.utils.errors import R1Error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="megatron-r1", description="Train sub-billion reasoning models by the MobileLLM-R1 recipe.")
    top.add_argument("--version", action="version", version=f"megatron-r1 {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe: complete steps are verified and skipped")
    run.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    run.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. --set steps.pretrain1.lr.peak=1e-3")
    run.add_argument("--only", metavar="STEP", help="run this one step; its inputs must be complete")
    run.add_argument("--until", metavar="STEP", help="run this step and everything it needs")
    run.add_argument("--runs-dir", type=Path, default=Path(os.environ.get("MEGATRON_R1_RUNS", "runs")), help="where runs are kept (default: runs)")
    run.add_argument("--verify", choices=("full", "sizes", "none"), default="full", help="how complete steps are checked before they are skipped")
    run.add_argument("--dry-run", action="store_true", help="print the resolved recipe, derived values and what each step would do; run nothing")
    run.add_argument("--explain", metavar="KEY", help="tell what a setting means and where its value came from; run nothing")
    run.set_defaults(action=_run)

    plan = commands.add_parser("plan", help="memory per GPU, tokens a second, days and cost of a recipe on a cluster")
    plan.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    plan.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the recipe")
    plan.add_argument("--cluster", type=Path, metavar="FILE", help="a YAML file that describes the cluster (docs/clusters.md); the options below override it")
    plan.add_argument("--gpus", type=int, metavar="N", help="GPUs that work on one step")
    plan.add_argument("--per-node", type=int, metavar="N", help="GPUs of one machine (default: 8)")
    plan.add_argument("--gpu", metavar="NAME", help="which GPU (default: h100)")
    plan.add_argument("--memory", metavar="SIZE", help="memory of one GPU, such as '80 GiB' (default: the data sheet's)")
    plan.add_argument("--mfu", type=float, metavar="X", help="share of the peak that training is assumed to sustain (default: 0.35)")
    plan.add_argument("--tflops", type=float, metavar="X", help="TFLOP/s one GPU sustains, measured, instead of --mfu (a training log has mfu)")
    plan.add_argument("--price", type=float, metavar="X", help="of one GPU for one hour; adds costs")
    plan.set_defaults(action=_plan)

    steps = commands.add_parser("steps", help="list a recipe's steps in order, each with its stage and whether many processes share its work: what launch scripts go through")
    steps.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    steps.set_defaults(action=_steps)

    recipes = commands.add_parser("recipes", help="list the shipped recipes")
    recipes.set_defaults(action=_recipes)

    ledger = commands.add_parser("ledger", help="list, verify and draw the artifacts of a run")
    ledger.add_argument("run", type=Path, help="a run folder, e.g. runs/quickstart")
    ledger.add_argument("--verify", action="store_true", help="check every byte against its checksum")
    ledger.add_argument("--graph", action="store_true", help="draw which artifact was made from which")
    ledger.add_argument("--mermaid", action="store_true", help="draw it in Mermaid's language")
    ledger.set_defaults(action=_ledger)

    export = commands.add_parser("export", help="write a trained step as a Hugging Face folder, with proof of parity")
    export.add_argument("checkpoint", type=Path, help="the artifact folder of a training step")
    export.add_argument("folder", type=Path, help="where to write; must not exist")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the written weights")
    export.set_defaults(action=_export)

    doctor = commands.add_parser("doctor", help="what this machine has, and which implementation each operation would take")
    doctor.add_argument("--require", action="append", default=[], metavar="NAME", help="fail unless every operation that has this implementation would use it or a better one, e.g. csrc")
    doctor.add_argument("--cluster", action="store_true", help="check instead whether the processes of this launch (torchrun, srun) can train together")
    doctor.add_argument("--runs-dir", type=Path, default=Path(os.environ.get("MEGATRON_R1_RUNS", "runs")), help="with --cluster: where there must be room (default: runs)")
    doctor.add_argument("--free-gib", type=float, default=20.0, metavar="X", help="with --cluster: how much room, in GiB (default: 20)")
    doctor.set_defaults(action=_doctor)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 1 the answer is no (ledger, doctor), 2 the user can act on the printed error."""
    options = parser().parse_args(arguments)
    try:
        return options.action(options)
    except R1Error as error:
        print(f"\n{type(error).__name__}\n{error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def _command() -> str:
    return "megatron-r1 " + shlex.join(sys.argv[1:])


def _run(options: argparse.Namespace) -> int:
    from megatron_r1.pipeline.recipe import explain, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.explain:
        for label, text in explain(recipe, options.explain).items():
            if text:
                print(f"{label:>8}: {text}")
        return 0
    if options.dry_run:
        from megatron_r1.pipeline.plan import print_plan

        print_plan(recipe, options.runs_dir, options.only, options.until)
        return 0
    from megatron_r1.pipeline.runner import run_recipe
    from megatron_r1.pipeline.summary import print_summary

    done = run_recipe(recipe, options.runs_dir, _command(), options.only, options.until, options.verify)
    print_summary(done)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from megatron_r1.pipeline.cluster import load_cluster, print_cluster_plan
    from megatron_r1.pipeline.recipe import load_recipe

    given = {name: getattr(options, name) for name in ("gpus", "per_node", "gpu", "memory", "mfu", "tflops", "price")}
    print_cluster_plan(load_recipe(options.recipe, options.overrides), load_cluster(options.cluster, **given))
    return 0


def _steps(options: argparse.Namespace) -> int:
    from megatron_r1.pipeline.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    for name, config in recipe.steps.items():
        print(f"{name}\t{config.stage}\t{'many' if recipe.stage(name).gains_from_processes(config) else 'one'}")
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from megatron_r1.pipeline.summary import print_recipes

    print_recipes()
    return 0


def _ledger(options: argparse.Namespace) -> int:
    from megatron_r1.pipeline.summary import print_ledger

    return print_ledger(options.run, options.verify, options.graph, options.mermaid)


def _export(options: argparse.Namespace) -> int:
    from megatron_r1.pipeline.single import export_checkpoint

    print(export_checkpoint(options.checkpoint, options.folder, options.dtype, _command()))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    if options.cluster:
        from megatron_r1.parallel.cluster_check import run as check

        return check(options.runs_dir, int(options.free_gib * 2**30))
    from megatron_r1.ops.doctor import run

    return run(options.require)
