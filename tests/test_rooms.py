"""The rooms of the house: what imports what."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import transformer_lm

PACKAGE = Path(transformer_lm.__file__).parent
# From the ground up; a room imports those below it, and its own modules without a circle.
FLOORS = [
    {
        "errors",
        "extras",
        "fields",
        "files",
        "console",
        "version",
        "locks",
        "axes",
        "dropout",
        "logits",
        "loops",
        "products",
    },
    {"flash_attention"},
    {"attention"},
    {"transformer_config"},
    {"models", "tokenizer"},
    {"data", "huggingface"},
    {"checkpoints"},
    {"generation"},
    {"training", "evaluation", "serving"},
    {"configs"},
    {"recipe"},
    {"cli"},
    {
        "main",
        "prepare_data",
        "train_compile",
        "generate_text",
        "evaluate",
        "serve",
        "export_huggingface",
        "export_gguf",
        "demo",
    }
    | {"tokenizer.__main__", ""},
    {"demo_chat"},
]


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; the package itself is ''."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of this package that a module imports, anywhere in it but for type checkers alone."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), f"transformer_lm.{package}")
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "transformer_lm":
                inside = target.partition(".")[2]
                found.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return found - {name}


def floor(name: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if name in rooms or (name.split(".")[0] in rooms and name != "tokenizer.__main__"):
            return number
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_runs_up(name):
    """Lazy ones included; rooms of one floor do not import each other."""
    for other in imports(name):
        room, below = name.split(".")[0], other.split(".")[0]
        assert floor(other) < floor(name) or (room == below and floor(other) == floor(name)) or floor(name) == 0, (
            f"{name} imports {other}"
        )


def test_no_circle():
    """Modules can be put in an order in which each imports earlier ones alone."""
    rest = {name: imports(name) for name in MODULES}
    while ready := {name for name, others in rest.items() if not others & rest.keys()}:
        for name in ready:
            del rest[name]
    assert not rest, f"import each other, or one that does: {sorted(rest)}"


def test_no_command_imports_jax_before_cli():
    """JAX reads where to keep what it compiles when it is imported: cli.py must have said it by then."""
    check = "import sys, transformer_lm.cli; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
    for command in FLOORS[-1] - {""}:
        tree = ast.parse(MODULES[command].read_text(encoding="utf-8"))
        lines = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        before = lines[: next(i for i, line in enumerate(lines) if line.startswith("from transformer_lm "))]
        assert not [line for line in before if re.search(r"\b(jax|flax|optax|orbax)\b", line)], command
