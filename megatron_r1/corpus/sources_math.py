"""Mathematics: documentation of mathematical libraries, and competition problems with solutions."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from megatron_r1.corpus.embedded import MB, Context, Corpus
from megatron_r1.data.document import Document
from megatron_r1.data.packages import read_member
from megatron_r1.utils.errors import EnvironmentProblem

LIBRARIES = ("sympy", "mpmath", "networkx")
SKIPPED = {"tests", "benchmarks", "__pycache__"}


def _folder(library: str) -> Path | None:
    spec = find_spec(library)  # finds a top-level package without importing it
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _docstrings(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, its classes and functions. Function bodies are not entered."""
    stack: list[tuple[ast.AST, str]] = [(tree, name)]
    while stack:
        node, qualified = stack.pop()
        text = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
        if text:
            yield qualified, inspect.cleandoc(text)
        if isinstance(node, ast.Module | ast.ClassDef):
            stack += [(child, f"{qualified}.{child.name}") for child in reversed(node.body) if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]


def library_docs(context: Context) -> Iterator[Document]:
    """Docstrings of the installed libraries, read with ast: nothing is imported. Files in hash order until there is enough."""
    found = {library: _folder(library) for library in LIBRARIES}
    if not any(found.values()):
        raise EnvironmentProblem(expected=f"one of {', '.join(LIBRARIES)} in this environment", found="none", fix="pip install sympy mpmath networkx")
    files = [(library, folder, path) for library, folder in found.items() if folder for path in folder.rglob("*.py") if not SKIPPED & set(path.relative_to(folder).parts)]
    enough, taken = CORPORA[0].max_bytes * 6 // 5, 0
    for library, folder, path in sorted(files, key=lambda item: hashlib.sha256(f"{item[0]}/{item[2].relative_to(item[1]).as_posix()}".encode()).digest()):
        module = ".".join([library, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        seen: dict[str, int] = {}
        for qualified, text in _docstrings(tree, module):
            # A function defined twice (under a condition, overloads) has one name: number the others.
            seen[qualified] = seen.get(qualified, 0) + 1
            identity = qualified if seen[qualified] == 1 else f"{qualified}#{seen[qualified]}"
            taken += len(text)
            yield Document(identity, "math_docs", text=f"{qualified}\n\n{text}\n", group=f"docs:{module}")
        if taken > enough:
            return


def champ(context: Context) -> Iterator[Document]:
    """Competition problems with the human solution, and with every distinct solution of a model (errors included, as in the wild)."""
    data = json.loads(read_member("champ-dataset", "champ_dataset/dataset_files/v0.json"))
    for name, problem in data["problems"].items():
        statement, group = problem["_text"].strip(), f"champ:{name}"
        steps = "\n".join(f"{i}. {step['_text'].strip()}" for i, step in enumerate(problem["solution"]["steps"], 1))
        yield Document(f"{name}:human", "math_champ", text=f"Problem: {statement}\n\nSolution:\n{steps}\n\nAnswer: {problem['_answer']}\n", group=group)
        seen = set()
        for key, conversation in problem["conversations"].items():
            for number, message in enumerate(conversation["messages"] or []):
                text = (message["text"] or "").strip()
                if message["role"].startswith("Model.") and text and text not in seen:
                    seen.add(text)
                    yield Document(f"{name}:{key}:{number}", "math_champ", text=f"Problem: {statement}\n\nSolution: {text}\n", group=group)


CORPORA = (
    Corpus("math_docs", "math", library_docs, "docstrings of sympy, mpmath and networkx as installed", installed=LIBRARIES, max_bytes=4 * MB),
    Corpus("math_champ", "math", champ, "competition problems with human and model solutions, grouped by problem", packages=("champ-dataset",), max_bytes=6 * MB),
)
