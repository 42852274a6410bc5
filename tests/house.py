"""The rules of the house as data, and the checker that reads them off the source with ``ast``.

``CONTRIBUTING.md`` carries the same table; a test holds the two equal. Imports run one way, so that a folder can be
read, tested and replaced alone.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "navil_megatron"


@dataclass(frozen=True)
class Row:
    """What one folder, or one file beside the folders, may import besides itself, config and the standard library."""

    ours: tuple[str, ...] = ()
    """Folders and files of the package."""
    third_party: tuple[str, ...] = ()
    """Prefixes of other packages' module names."""
    never: tuple[str, ...] = ()
    """Prefixes refused although a shorter prefix is allowed."""


_ENGINE = ("torch", "megatron.core", "numpy")
_BELOW_TRAINING = ("blueprint", "runtime", "kernels", "layers", "models", "data", "checkpoint")

IMPORT_TABLE = {
    "config": Row(),
    "blueprint": Row((), ("numpy",)),
    "files": Row((), ("xxhash", "PIL", "jinja2")),
    "runtime": Row((), _ENGINE),
    "kernels": Row(("layers",), (*_ENGINE, "transformer_engine", "fused_weight_gradient_mlp_cuda", "triton")),
    "layers": Row(("blueprint",), _ENGINE),
    "models": Row(("blueprint", "runtime", "kernels", "layers"), _ENGINE),
    "data": Row(
        ("blueprint", "files"),
        (
            "torch",
            "numpy",
            "PIL",
            "webdataset",
            "tokenizers",
            "transformers",
            "fsspec",
            "pyarrow",
            "jinja2",
            "nvidia.dali",
        ),
        ("torch.distributed",),
    ),
    "planner": Row(("blueprint", "data")),
    "scaling": Row((), ("numpy", "scipy", "matplotlib")),
    "checkpoint": Row(("blueprint", "files", "runtime"), _ENGINE),
    "training": Row(_BELOW_TRAINING, (*_ENGINE, "rich", "wandb")),
    "hf": Row(
        ("blueprint", "files"),
        ("torch", "numpy", "PIL", "safetensors", "tokenizers", "transformers"),
    ),
    "hf/remote_code": Row((), ("torch", "numpy", "PIL", "transformers")),
    "evaluation": Row(
        ("blueprint", "files", "hf"),
        ("torch", "numpy", "PIL", "jinja2", "rapidfuzz", "nltk", "pycocoevalcap", "sacrebleu", "matplotlib"),
    ),
    "evaluation/adapters": Row(("blueprint", "evaluation", "hf"), ("torch", "PIL", "lmms_eval", "vlmeval")),
    "pretrain.py": Row((*_BELOW_TRAINING, "training", "launch.py"), ("torch",)),
    "replay.py": Row(("files", "runtime", "training", "launch.py")),
    "dry_run.py": Row(("blueprint", "runtime", "models", "data", "training", "planner", "dry_step.py"), ("torch",)),
    "dry_step.py": Row(("blueprint", "runtime", "models", "data", "training", "planner"), ("torch",)),
    "init_run.py": Row(("blueprint", "files", "data", "hf", "planner", "scaling"), ("numpy",)),
    "launch.py": Row(),
    "doctor.py": Row(),
    "compare_outputs.py": Row(
        ("blueprint", "files", "runtime", "models", "data", "checkpoint", "training", "hf", "hf/remote_code"),
        ("torch", "numpy"),
    ),
    "verbs": Row(
        (
            "blueprint",
            "files",
            "runtime",
            "data",
            "hf",
            "evaluation",
            "planner",
            "scaling",
            "init_run.py",
            "launch.py",
            "replay.py",
            "dry_run.py",
            "doctor.py",
            "compare_outputs.py",
        ),
        ("torch",),
    ),
    "cli.py": Row(("verbs",), ("rich",)),
    "__init__.py": Row(),
}
"""Area of the package -> what it may import. A folder without a row fails."""

ONLY_IN = {
    "torch.cuda": "runtime",
    "concurrent.futures.ProcessPoolExecutor": "files",
    "os.fsync": "files",
    "os.replace": "files",
    "shutil.disk_usage": "files",
    "transformer_engine": "kernels",
    "triton": "kernels",
    "apex": "kernels",
    "nvidia.dali": "data/dali_decode.py",
    "lmms_eval": "evaluation/adapters",
    "vlmeval": "evaluation/adapters",
}
"""Module prefix -> the one place that may name it."""

COLLECTIVE_BACKENDS = {"nccl", "gloo"}
"""String constants that only runtime/ may hold."""

MAY_PRINT = {"cli.py"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def render_import_table() -> str:
    """``IMPORT_TABLE`` as the Markdown table of CONTRIBUTING.md."""

    def cell(names: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in names) or "nothing"

    lines = ["| where | may import of ours | may import of others |", "|---|---|---|"]
    for area, row in IMPORT_TABLE.items():
        others = cell(row.third_party) + (f"; never {cell(row.never)}" if row.never else "")
        lines.append(f"| `{area}` | {cell(row.ours)} | {others} |")
    return "\n".join(lines)


def check_package() -> list[str]:
    """Every broken rule in the package, as ``path:line: message``."""
    folder = REPOSITORY / PACKAGE
    problems = []
    for path in sorted(folder.rglob("*.py")):
        problems += check_source(path.read_text(encoding="utf-8"), path.relative_to(folder).as_posix())
    return problems


def find_circle() -> list[str]:
    """Modules of the package that import one another in a circle, deferred imports included; empty where none do."""
    folder = REPOSITORY / PACKAGE
    imports: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        module = path.relative_to(folder).with_suffix("").as_posix().removesuffix("/__init__")
        wholes = [
            f"{name}.{thing}" if thing else name for _, name, thing in _imports(ast.parse(path.read_text("utf-8")))
        ]
        ours = [whole.removeprefix(f"{PACKAGE}.").replace(".", "/") for whole in wholes if _under(whole, PACKAGE)]
        imports[module] = {
            next((name for name in (whole, whole.rpartition("/")[0]) if (folder / f"{name}.py").is_file()), whole)
            for whole in ours
        }
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def check_source(source: str, path: str) -> list[str]:
    """Every broken rule in one module; ``path`` is relative to the package's folder."""
    tree = ast.parse(source)
    area = area_of(path)
    if area not in IMPORT_TABLE:
        return [f"{path}:1: {area} has no row in IMPORT_TABLE; add one there and in CONTRIBUTING.md"]
    found = [
        *_check_module(tree, path),
        *_check_imports(tree, path, area),
        *_check_names(tree, path, area),
        *_check_statements(tree, path),
    ]
    return [f"{path}:{line}: {message}" for line, message in sorted(found)]


def check_script(source: str, path: str) -> list[str]:
    """The rules that hold outside the package too (tools, examples, tests)."""
    return [f"{path}:{line}: {message}" for line, message in _check_swallowed_imports(ast.parse(source))]


def check_import(source: str, path: str) -> list[str]:
    """Importing a script starts nothing: it calls its own functions under ``if __name__ == "__main__"`` alone."""
    body = ast.parse(source).body
    own = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    found = []
    for node in body:
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if is_guard or isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            continue
        calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
        if own & {called.id for called in calls if isinstance(called, ast.Name)}:
            found.append(f'{path}:{node.lineno}: runs when imported; guard it with if __name__ == "__main__"')
    return found


def area_of(path: str) -> str:
    """The row of the table that a module falls under: its folder's, or that of the folder around."""
    nested = (area for area in IMPORT_TABLE if "/" in area and path.startswith(f"{area}/"))
    return next(nested, path.split("/")[0])


def _check_module(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    if not ast.get_docstring(tree):
        yield 1, "has no module docstring"
    vague = VAGUE_NAMES & set(path.removesuffix(".py").split("/"))
    if vague:
        yield 1, f"is called {vague.pop()}; name it for the one thing in it"


def _check_imports(tree: ast.Module, path: str, area: str) -> Iterator[tuple[int, str]]:
    row = IMPORT_TABLE[area]
    for line, module, name in _imports(tree):
        if module.startswith("."):
            if area != "hf/remote_code":
                yield line, "relative import; write the absolute name"
            continue
        whole = f"{module}.{name}" if name else module
        for prefix, place in ONLY_IN.items():
            if _under(whole, prefix) and not f"{path}/".startswith(f"{place}/"):
                yield line, f"{prefix} is imported only in {place}"
        if module == PACKAGE or module.startswith(PACKAGE + "."):
            yield from _check_own_import(line, module, name, area, row)
        elif module.split(".")[0] not in sys.stdlib_module_names:
            allowed = any(_under(whole, prefix) for prefix in row.third_party)
            if not allowed or any(_under(whole, prefix) for prefix in row.never):
                yield line, f"{area} may not import {whole}"


def _check_own_import(line: int, module: str, name: str | None, area: str, row: Row) -> Iterator[tuple[int, str]]:
    """An import of ours: allowed by the table, and from the file that defines the name."""
    target = module.removeprefix(PACKAGE).removeprefix(".").replace(".", "/")
    folder = REPOSITORY / PACKAGE / target
    if name and ((folder / name).is_dir() or (folder / f"{name}.py").is_file()):
        target, name = f"{target}/{name}".lstrip("/"), None
    imported = area_of(target)
    if (REPOSITORY / PACKAGE / f"{imported}.py").is_file():
        imported += ".py"
    # Exported files are copied out of the package, so nothing of ours is there for them.
    shared = set() if area == "hf/remote_code" else {area, "config"}
    if target and imported not in {*shared, *row.ours}:
        yield line, f"{area} may not import {imported}"
    elif name and name not in _defined_names(target):
        yield line, f"{name} is not defined in {module}; import it from the file that defines it"


def _check_names(tree: ast.Module, path: str, area: str) -> Iterator[tuple[int, str]]:
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            for prefix, place in ONLY_IN.items():
                if dotted == prefix and not f"{path}/".startswith(f"{place}/"):
                    yield node.lineno, f"{prefix} is named only in {place}"
            if dotted in IMPORT_TABLE[area].never:
                yield node.lineno, f"{area} may not use {dotted}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            backends = COLLECTIVE_BACKENDS & set(re.split("[:,]", node.value))
            if backends and area != "runtime":
                yield node.lineno, f'"{backends.pop()}" is named only in runtime'


def _check_statements(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    yield from _check_swallowed_imports(tree)
    for node in ast.walk(tree):
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if is_print and path not in MAY_PRINT:
            yield node.lineno, "print() only in cli.py; use logging"


def _check_swallowed_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """``except ImportError`` and ``suppress(ImportError)``: what is missing must be said, not worked around."""
    for node in ast.walk(tree):
        caught: list[ast.expr | None] = []
        if isinstance(node, ast.ExceptHandler):
            caught = [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            caught = list(node.args)
        names = {
            ast.unparse(part) for whole in caught if whole for part in ast.walk(whole) if isinstance(part, ast.Name)
        }
        for name in sorted(names & {"ImportError", "ModuleNotFoundError"}):
            yield node.lineno, f"{name} is swallowed; choose by config and let a missing package fail"


def _imports(tree: ast.Module) -> Iterator[tuple[int, str, str | None]]:
    """Line, module and name (``None`` for a whole module) of every import, deferred and dynamic ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + (node.module or ""), alias.name
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, None


def _under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@cache
def _defined_names(target: str) -> frozenset[str]:
    """Names that a module of ours defines itself, at its top level."""
    path = REPOSITORY / PACKAGE / f"{target}.py"
    if not path.is_file():
        path = REPOSITORY / PACKAGE / target / "__init__.py"
    if not path.is_file():
        return frozenset()
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.TypeAlias):
            names.add(node.name.id)
        elif isinstance(node, ast.Assign):
            names |= {part.id for target_ in node.targets for part in ast.walk(target_) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return frozenset(names)
