"""The dependency arrows of DESIGN.md, read from the imports of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("harness", "studies", "analysis")
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).glob("**/*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))

HARNESS = {
    "config": set(),
    "places": {"config"},
    "login": {"config", "places"},
    "nn": set(),
    "streams": {"config"},
    "objective": {"config", "nn"},
    "tensors": {"config", "streams"},
    "folder": {"config", "tensors"},
    "idx": set(),
    "forkserver": set(),
    "processes": {"forkserver"},
    "official": {"config", "idx"},
    "dataset": {"config", "official", "streams", "tensors"},
    "data": {"config", "dataset", "folder", "official", "streams", "tensors"},
    "oracle": {"dataset", "objective"},
    "linear": {"config", "dataset", "objective", "oracle"},
    "networks": {"config", "nn"},
    "vae": {"config", "networks", "nn", "streams"},
    "optimum": {"config", "dataset", "objective", "oracle", "vae"},
    "elbo": {"nn", "objective", "vae"},
    "doing": set(),
    "cores": {"doing"},
    "optimizer": {"cores"},
    "gradient": {"cores", "nn", "vae"},
    "autograd": {"config", "cores", "elbo", "gradient", "nn", "vae"},
    "capture": set(),
    "step": {"autograd", "capture", "config", "gradient", "optimizer", "vae"},
    "evaluate": {
        "config",
        "cores",
        "dataset",
        "elbo",
        "linear",
        "nn",
        "objective",
        "streams",
        "vae",
    },
    "gauge": {"capture", "dataset", "evaluate", "vae"},
    "part": {"config", "dataset", "gauge", "objective", "step", "streams", "vae"},
    "checkpoint": {"config", "dataset", "places", "provenance"},
    "courses": {"checkpoint", "config", "dataset", "gauge", "part"},
    "likelihood": {"dataset", "evaluate", "objective", "streams", "vae"},
    "pictures": {"dataset", "evaluate", "objective", "streams", "vae"},
    "storage": {"config", "networks", "places", "vae"},
    "engine": {
        *("autograd", "checkpoint", "config", "cores", "courses", "dataset", "evaluate"),
        *("gauge", "objective", "part", "vae"),
    },
    "batches": {"dataset", "elbo", "objective", "streams", "vae"},
    "sweep": {"config", "dataset", "engine", "evaluate", "vae"},
    "journal": {"config", "places"},
    "outbox": {"config", "journal"},
    "sending": {"config", "journal", "outbox", "places"},
    "stores": {"config", "login", "outbox", "places", "sending"},
    "runlog": {"dataset", "journal", "places", "storage", "stores", "vae"},
    "view": set(),
    "tracking": {"config", "dataset", "places", "runlog", "storage", "stores", "vae", "view"},
    "ledger": {"config", "places", "stores", "tracking"},
    "records": {"config", "places", "stores", "tracking"},
    "provenance": {"dataset", "official"},
    "probe": {"dataset", "evaluate", "vae"},
    "latents": {"dataset", "evaluate", "objective", "streams", "vae"},
    "features": {"cores", "dataset", "doing", "networks", "places", "streams", "tensors"},
    "frechet": {"cores", "dataset", "evaluate", "features", "nn", "streams", "vae"},
    "quality": {
        *("cores", "dataset", "doing", "evaluate"),
        *("frechet", "latents", "likelihood", "probe", "vae"),
    },
}
"""Which modules of harness each of them may import."""

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
            assert isinstance(node.args[0], ast.Constant), f"{path}: import of a computed name"
            yield node.args[0].value


def _loads(function: ast.expr) -> bool:
    return ast.unparse(function) in ("lazy_loader.load", "importlib.import_module", "import_module")


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def harness_modules(path: Path) -> set[str]:
    """Return the modules of harness that a module imports; "" is the package itself."""
    names = [name.split(".") for name in imports(path) if name.split(".")[0] == "harness"]
    return {rest[0] if (rest := name[1:]) and rest[0] in HARNESS else "" for name in names}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", sorted((ROOT / "harness").glob("*.py")), ids=lambda p: p.stem)
def test_harness_modules_import_only_what_is_below_them(path):
    if path.stem == "__init__":
        assert "" not in harness_modules(path)
        return
    assert path.stem in HARNESS, f"say in HARNESS what {path.name} may import"
    assert harness_modules(path) <= HARNESS[path.stem]


def test_the_table_of_harness_has_no_cycle():
    done: set[str] = set()
    while len(done) < len(HARNESS):
        ready = {name for name, below in HARNESS.items() if below <= done} - done
        assert ready, f"cycle among {sorted(set(HARNESS) - done)}"
        done |= ready


@pytest.mark.parametrize("package", ["analysis", "studies"])
def test_no_modules_import_each_other_in_a_circle(package):
    # Imports for types alone and inside functions count too.
    below = {
        path.stem: {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.")}
        for path in (ROOT / package).glob("*.py")
    }
    while ready := [name for name, others in below.items() if not others & below.keys()]:
        for name in ready:
            del below[name]
    assert not below, f"circle among {sorted(below)}"


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
def test_modules_are_under_300_lines(path):
    assert len(path.read_text().splitlines()) < 300


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
    # `evaluate` is a module and the function in it; lazy-loader before 0.6 gives the module here.
    edges = ("mlflow", "optuna", "pandas", "seaborn", "matplotlib")
    found = f"print([name for name in {edges} if name in sys.modules])"
    named = "from harness import evaluate; print(callable(evaluate))"
    assert python(f"import sys, harness.engine, harness.pictures; {found}; {named}") == "[]\nTrue"
