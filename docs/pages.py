"""Pages of the documentation that are made of other files, so that they cannot fall behind them."""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = {
    "benchmarks.md": "benchmarks/RESULTS.md",
    "figures/scaling.png": "benchmarks/figures/scaling.png",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "log.md": "LOG.md",
}
"""Page -> file of the repository."""

FURTHER = (
    *("harness.objective", "analysis.frames", "analysis.plots"),
    *("studies.runner.study", "studies.runner.run", "studies.runner.cli"),
)
"""Modules of the reference beside those of `harness/__init__.pyi`."""

FOLDERS = {
    "harness": "The core, torch and numpy; `tracking` above it holds the only imports of MLflow.",
    "studies": "A question each; `runner` plans and runs them, and holds the imports of Optuna.",
    "analysis": "MLflow to data frame to table, figure and report; no torch.",
    "benchmarks": "Measurements of the harness itself, with results in `RESULTS.md`.",
    "examples": "A study in your own file.",
    "tests": "About one file a module: mathematics and behaviour.",
}
"""Folder of the list of files -> what is in it."""

STUB = re.compile(r"from (\.[\w.]*) import (\w+) as \w+")


def names() -> dict[str, str]:
    """Return the public names of harness: name -> where it is defined; modules are themselves."""
    found = STUB.findall((ROOT / "harness" / "__init__.pyi").read_text())
    return {name: f"harness{'' if place == '.' else place}.{name}" for place, name in found}


def modules() -> list[str]:
    """Return the modules of the reference: those that hold a public name of harness, and others."""
    places = [place for place in names().values() if place.count(".") == 1]
    places += [place.rpartition(".")[0] for place in names().values() if place.count(".") > 1]
    found = {module for place in places for module in in_package(place)}
    return [*sorted(found), *FURTHER]


def in_package(module: str) -> list[str]:
    """Return the modules of a package, or the module itself."""
    folder = ROOT / module.replace(".", "/")
    return [f"{module}.{path.stem}" for path in folder.glob("[a-z]*.py")] or [module]


def about(module: str) -> str:
    """Return the first line of a module's docstring."""
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def list_of_files() -> str:
    """Write the page of all Python files, each with the first line of its docstring."""
    parts = ["# All files\n\nEach with the first line of its own docstring.\n"]
    for folder, what in FOLDERS.items():
        paths = sorted((ROOT / folder).rglob("[a-z]*.py"))
        names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
        parts += [f"## {folder}\n", f"{what}\n", *map(entry, names), ""]
    return "\n".join(parts)


def entry(module: str) -> str:
    """Write a file's line, with a link to its reference if it has one."""
    name = f"`{module.partition('.')[2].replace('.', '/')}.py`"
    linked = f"[{name}](reference/{module}.md)" if module in modules() else name
    return f"- {linked}: {about(module)}"


def overview() -> str:
    """Write the page of all public names."""
    single = [f"- [`{n}`][{place}]" for n, place in names().items() if place.count(".") > 1]
    whole = [f"- [`{module}`]({module}.md): {about(module)}" for module in modules()]
    return "\n".join(
        [
            "# Reference\n\nMade from the docstrings. Symbols everywhere: D pixels (all channels), "
            "L latents, B images of a batch; shapes are written (B, D).\n",
            "## `from harness import ...`\n",
            *single,
            "\nModules load on first use: `import harness`, then `harness.objective.beta(...)`.\n",
            "## Modules\n",
            *whole,
        ]
    )


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the reference to the contents."""
    assert config.nav is not None
    pages = [{"Public names": "reference/index.md"}]
    pages += [{module: f"reference/{module}.md"} for module in modules()]
    config.nav = [*config.nav[:-1], {"Reference": pages}, config.nav[-1]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "files.md", content=list_of_files()))
    files.append(File.generated(config, "reference/index.md", content=overview()))
    for module in modules():
        text = f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n"
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    return files
