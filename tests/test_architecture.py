"""The dependency arrows, one rule a layer, read from the imports of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / "harness"
PACKAGES = ("harness", "studies", "analysis")
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).glob("**/*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))

LAYERS = (
    {"errors", "registry", "config", "streams", "forkserver", "processes"},
    {"data", "objective", "provenance"},
    {"models"},
    {"linear"},
    {"metrics"},
    {"training"},
)
"""The core of harness from the ground up; its other modules, which track runs, lie above.

A module imports from its own layer and from those below.
"""

ONLY_IN = {
    "mlflow": {"harness/tracking.py", "harness/stores.py", "harness/sending.py"},
    "optuna": {
        *("studies/storage.py", "studies/desk.py", "studies/grid.py"),
        *("studies/hunt.py", "studies/searching.py"),
    },
}
"""Libraries that exactly these modules may import."""

FORBIDDEN = {
    "harness": {"mlflow", "optuna", "pandas", "seaborn", "matplotlib", "studies", "analysis"},
    "studies": {"torch", "torchvision", "mlflow"},
    "analysis": {"torch", "torchvision", "mlflow", "optuna", "studies"},
}
"""What no module of a package imports, the importers of MLflow aside."""


def imports(path: Path) -> Iterator[str]:
    """Yield the full names of all that a module imports anywhere, lazily or for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _loads(node.func):
            if path.stem == "registry":  # names of built-in networks
                continue
            assert isinstance(node.args[0], ast.Constant), f"{path}: import of a computed name"
            yield node.args[0].value


def _loads(function: ast.expr) -> bool:
    return ast.unparse(function) in ("lazy_loader.load", "importlib.import_module", "import_module")


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def layer(name: str) -> int:
    """Return the layer of a module or package of harness."""
    return next((i for i, names in enumerate(LAYERS) if name in names), len(LAYERS))


def is_in_harness(name: str) -> bool:
    return (HARNESS / name).is_dir() or (HARNESS / f"{name}.py").exists()


def parts_of_harness(path: Path) -> set[str]:
    """Return the modules and packages at the top level of harness that a module imports."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("harness.")}
    return set(filter(is_in_harness, found))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@every_module
def test_harness_modules_import_only_from_their_layer_and_below(path):
    package, own, *_ = path.relative_to(ROOT).with_suffix("").parts
    if package == "harness" and own != "__init__":
        assert not {part for part in parts_of_harness(path) if layer(part) > layer(own)}


def test_every_layer_of_harness_exists_and_its_imports_are_found():
    names = [name for names in LAYERS for name in names]
    assert len(names) == len(set(names))
    assert all(map(is_in_harness, names))
    assert {"objective", "streams", "registry"} <= parts_of_harness(HARNESS / "models" / "vae.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    # Imports for types alone and inside functions count too.
    paths = {dotted(path): path for path in (ROOT / package).glob("**/*.py")}
    below = {name: imported(path, paths.keys() - {name}) for name, path in paths.items()}
    while ready := [name for name, others in below.items() if not others & below.keys()]:
        for name in ready:
            del below[name]
    assert not below, f"circle among {sorted(below)}"


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, modules: set[str]) -> set[str]:
    """Return which of the modules a module imports, as a whole or a name in them."""
    names = set(imports(path))
    return (names | {name.rpartition(".")[0] for name in names}) & modules - set(PACKAGES)


@every_module
def test_mlflow_and_optuna_are_imported_where_the_table_says(path):
    for library, owners in ONLY_IN.items():
        assert library not in libraries(path) or name_of(path) in owners


@pytest.mark.parametrize("library", ONLY_IN)
def test_the_importers_import_it(library):
    # Else the test above would hold because nothing is found.
    for owner in ONLY_IN[library]:
        assert library in libraries(ROOT / owner)


@every_module
def test_packages_do_not_import_what_is_not_theirs(path):
    allowed = {"mlflow"} if name_of(path) in ONLY_IN["mlflow"] else set()
    assert not libraries(path) & FORBIDDEN[path.relative_to(ROOT).parts[0]] - allowed


@every_module
def test_modules_of_studies_and_analysis_are_under_300_lines(path):
    assert HARNESS in path.parents or len(path.read_text().splitlines()) < 300


def public(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a module or class and, depth first, all public functions and classes in it."""
    yield node
    for child in getattr(node, "body", []):
        is_named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_named and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from public(child)
            else:
                yield child


@every_module
def test_everything_public_has_a_docstring(path):
    for node in public(ast.parse(path.read_text())):
        assert ast.get_docstring(node), f"{path.name}: {getattr(node, 'name', 'the module')}"


def test_analysis_runs_without_torch():
    code = "import sys, analysis.frames, analysis.plots; print('torch' in sys.modules)"
    assert python(code) == "False"


def test_harness_names_load_without_torch():
    code = "import sys, harness; harness.RunConfig(); print('torch' in sys.modules)"
    assert python(code) == "False"


def test_the_core_runs_without_the_libraries_of_the_edges_and_names_do_not_depend_on_order():
    # `harness.evaluate` is a function, and a module of that name is beside it.
    edges = ("mlflow", "optuna", "pandas", "seaborn", "matplotlib")
    found = f"print([name for name in {edges} if name in sys.modules])"
    named = "from harness import evaluate; print(callable(evaluate))"
    core = "harness.training.engine, harness.metrics.pictures, harness.models.files"
    assert python(f"import sys, {core}; {found}; {named}") == "[]\nTrue"
