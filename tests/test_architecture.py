"""The dependency arrows, one rule a layer, read from the imports of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HARNESS, STUDIES = ROOT / "harness", ROOT / "studies"
PACKAGES = ("harness", "studies", "analysis")
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).glob("**/*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))

LAYERS = (
    {"errors", "registry", "config", "conventions", "streams", "forkserver", "processes"},
    {"data", "objective", "parts", "provenance"},
    {"models"},
    {"linear"},
    {"metrics"},
    {"training"},
    {"tracking"},
)
"""The harness from the ground up: a module imports from its layer and from those below.

Everything below tracking is the core, which thus imports nothing of tracking.
"""

EDGES = {"optuna", "pandas", "seaborn", "matplotlib"}
"""Libraries of what is built on the harness."""

FORBIDDEN = {
    "harness": {"mlflow", "studies", "analysis", *EDGES},
    "harness.tracking": {"studies", "analysis", *EDGES},
    "studies": {"torch", "torchvision", "mlflow"},
    "analysis": {"torch", "torchvision", "mlflow", "optuna", "studies"},
}
"""What no module of a package imports; the longest name of a package holds."""


class WithoutTypes(ast.NodeTransformer):
    """Removes the imports for types alone."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:  # noqa: N802 - as ast calls it
        """Return what stands beside such imports."""
        return (
            node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)
        )


def imports(path: Path, *, types: bool = True) -> Iterator[str]:
    """Yield the full names of all that a module imports anywhere, lazily or for types too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree if types else WithoutTypes().visit(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _loads(node.func):
            assert isinstance(node.args[0], ast.Constant), f"{path}: import of a computed name"
            yield node.args[0].value


def _loads(function: ast.expr) -> bool:
    return ast.unparse(function) in ("lazy_loader.load", "importlib.import_module", "import_module")


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def layer(name: str) -> int:
    """Return the layer of a module or package of harness."""
    return next(i for i, names in enumerate(LAYERS) if name in names)


def is_in_harness(name: str) -> bool:
    return (HARNESS / name).is_dir() or (HARNESS / f"{name}.py").exists()


def parts_of_harness(path: Path) -> set[str]:
    """Return the modules and packages at the top level of harness that a module imports."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("harness.")}
    return set(filter(is_in_harness, found))


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
    there = {path.stem for path in HARNESS.glob("[a-z]*") if path.suffix in (".py", "")}
    assert set(names) == there
    assert {"objective", "streams", "registry"} <= parts_of_harness(HARNESS / "models" / "vae.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    # Imports inside functions count too, those for types alone do not.
    paths = {dotted(path): path for path in (ROOT / package).glob("**/*.py")}
    below = {
        name: imported(path, paths.keys() - {name}, types=False) for name, path in paths.items()
    }
    while ready := [name for name, others in below.items() if not others & below.keys()]:
        for name in ready:
            del below[name]
    assert not below, f"circle among {sorted(below)}"


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, modules: set[str], *, types: bool = True) -> set[str]:
    """Return which of the modules a module imports, as a whole or a name in them."""
    names = set(imports(path, types=types))
    return (names | {name.rpartition(".")[0] for name in names}) & modules - set(PACKAGES)


def package_of(path: Path) -> str:
    """Return the package of `FORBIDDEN` that a module belongs to."""
    return max((name for name in FORBIDDEN if f"{dotted(path)}.".startswith(f"{name}.")), key=len)


@every_module
def test_packages_do_not_import_what_is_not_theirs(path):
    assert not libraries(path) & FORBIDDEN[package_of(path)]


def test_forbidden_imports_would_be_found():
    # Else the test above would hold because nothing is found.
    assert package_of(HARNESS / "tracking" / "store.py") == "harness.tracking"
    assert package_of(HARNESS / "config.py") == "harness"
    assert "mlflow" in libraries(HARNESS / "tracking" / "store.py")
    assert "optuna" in libraries(STUDIES / "runner" / "queue.py")


def pages() -> set[str]:
    """Return the pages of studies: the modules that are commands."""
    modules = STUDIES.glob("[a-z]*.py")
    return {dotted(path) for path in modules if '__name__ == "__main__"' in path.read_text()}


@pytest.mark.parametrize("path", sorted((STUDIES / "runner").glob("*.py")), ids=lambda p: p.stem)
def test_the_runner_imports_no_page(path):
    assert not imported(path, pages())


def test_pages_are_found():
    assert {"studies.kl_weight", "studies.search", "studies.replay"} <= pages()
    assert "studies.kl_weight" in imported(STUDIES / "all.py", pages())


def public(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a module or class and, depth first, all public functions and classes in it."""
    yield node
    for child in getattr(node, "body", []):
        is_named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_named and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from public(child)
            elif "overload" not in map(ast.unparse, child.decorator_list):
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
