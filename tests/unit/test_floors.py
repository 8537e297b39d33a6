"""The house rules that a machine can check: floors, sizes, and who may import what at import time."""

import ast
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("launch", "pipeline", "stages", "data")
HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "deepspeed", "vllm", "tensorboard", "wandb"}
SOURCES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
ALL_SOURCES = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
MAX_FILE = 400
MAX_FUNCTION = 60
MAX_MAIN_FUNCTION = 80  # `run` and `train_loop` show a whole sequence on one page

TOP_LEVEL = {
    *("pyproject.toml", "launch", "pipeline", "stages", "data", "configs", "tests", "benchmarks"),
    *("README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".ci", ".gitignore", ".pre-commit-config.yaml"),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Every absolute module name imported below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which floor is meant"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: no function bodies, nothing under TYPE_CHECKING."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        waiting.extend(inner)
        if not inner:
            yield node


def may_import(source: str, module: str) -> bool:
    """Whether a file of ours may import a module of ours: the same room, or a floor below."""
    package, *rest = source.removesuffix(".py").split("/")
    target, *inner = module.split(".")
    if package == "launch":
        return True
    if package == "pipeline":
        return target != "launch"
    if package == "data":
        return target == "data"
    if target == "stages":
        return not inner or inner[0] in ("core", rest[0])
    return target == "data"


@pytest.mark.parametrize(
    ("source", "module", "allowed"),
    [
        ("launch/cli.py", "pipeline.chain", True),
        ("pipeline/chain.py", "launch.cli", False),
        ("pipeline/config.py", "stages.sft.config", True),
        ("stages/sft/stage.py", "stages.rm.config", False),
        ("stages/sft/stage.py", "pipeline.metrics", False),
        ("stages/sft/stage.py", "stages.core.ops", True),
        ("stages/core/ops.py", "stages.ppo.loss", False),
        ("stages/core/ops.py", "data.rows", True),
        ("data/chat.py", "stages.core.config", False),
    ],
)
def test_the_rule_itself(source: str, module: str, allowed: bool):
    assert may_import(source, module) is allowed


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_down_only(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = {module for module in imported(tree) if module.split(".")[0] in OURS}
    assert {module for module in ours if not may_import(relative(path), module)} == set()


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count too: they only hide which file stands on which."""
    names = {relative(path).removesuffix(".py").replace("/", "."): path for path in SOURCES}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in names.items()}
    graph = {name: {each for each in imported(tree) if each in names} for name, tree in trees.items()}
    assert sum(map(len, graph.values())) > 100
    assert circle_in(graph) == []


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other, the first one again at the end; none: an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}}) == []
    assert set(circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_light_modules_import_nothing_heavy(path: Path):
    light = path.name == "config.py" or relative(path).split("/")[0] in ("launch", "pipeline", "data")
    if not light and relative(path) not in ("stages/core/context.py", "stages/core/memory.py"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    heavy = {name for node in at_import_time(tree) for name in imported(node) if name.split(".")[0] in HEAVY}
    assert heavy == set()


@pytest.mark.parametrize("path", [path for path in SOURCES if relative(path).startswith("data/")], ids=relative)
def test_data_knows_no_models(path: Path):
    assert "torch" not in {name.split(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("path", ALL_SOURCES, ids=relative)
def test_files_and_functions_fit_on_a_page(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = MAX_MAIN_FUNCTION if node.name in ("run", "train_loop") else MAX_FUNCTION
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= limit, f"{node.name} is too long"


def test_top_level_is_as_agreed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} - TOP_LEVEL == set()
