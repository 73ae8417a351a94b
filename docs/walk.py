"""Draw how a study runs: the stations of how-a-study-runs.md, and which of them leads to which."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILL = {"studies": "#dbe7f6", "harness": "#dff0de", "analysis": "#f8ead0"}  # package -> colour
SVG = '<svg xmlns="http://www.w3.org/2000/svg" font-family="monospace" font-size="13" viewBox='
NAMES = defaultdict(dict)  # module -> what it imports or defines: name -> full name
CODE = {}  # full name of a function, a method or a module's top level (STUDY) -> syntax tree
PASSED = defaultdict(list)  # keyword -> (module, value) of every call that has it


def imported(module: str, tree: ast.AST) -> dict[str, str]:
    """Return the names that a piece of a module imports, and their full names."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = [(f"{module}." * f.level + f"{f.module}", n) for f in nodes for n in f.names]
    return {n.asname or n.name: f"{source}.{n.name}" for source, n in found}


def located(name: str) -> str:
    """Return the full name under which a function is defined; other names stay."""
    module, _, last = name.rpartition(".")
    full = NAMES.get(module, {}).get(last, name)
    return full if full == name else located(full)


def named(tree: ast.AST, known: dict[str, str]) -> set[str]:
    """Return the functions and classes that a piece of code names."""
    chains = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Name | ast.Attribute)]
    parts = (chain.partition(".") for chain in chains)
    found = {located(known.get(base, base) + dot + rest) for base, dot, rest in parts}
    return (found | {f"{name}.__init__" for name in found}) & CODE.keys()


def leads_to(place: str) -> set[str]:
    """Return the functions that a place names, and the methods and arguments that it may call."""
    module = next(m for m in sorted(NAMES, reverse=True) if place.startswith(f"{m}."))
    known = NAMES[module] | imported(module, CODE[place]) | {"self": place.rpartition(".")[0]}
    found, calls = named(CODE[place], known), ast.walk(CODE[place])
    calls = {n.func.attr for n in calls if isinstance(n, ast.Call) and hasattr(n.func, "attr")}
    found |= {f"{located(full)}.{name}" for full in known.values() for name in calls} & CODE.keys()
    return found.union(*(named(value, NAMES[m]) for call in calls for m, value in PASSED[call]))


for path in (path for package in FILL for path in (ROOT / package).glob("**/*.py*")):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(path.read_text() if path.suffix in (".py", ".pyi") else "")
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.keyword)):
        PASSED[node.arg].append((module, node.value))
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    NAMES[module] |= imported(module, tree) | {n.name: f"{module}.{n.name}" for n in defined}
    CODE[f"{module}.STUDY"] = ast.Module([node for node in tree.body if node not in defined], [])
    CODE |= {f"{module}.{n.name}": n for n in defined if isinstance(n, ast.FunctionDef)}
    for node in defined:
        CODE |= {f"{module}.{node.name}.{n.name}": n for n in node.body if hasattr(n, "name")}

page = (ROOT / "docs" / "how-a-study-runs.md").read_text()
stations = re.findall(r"^\d+\. \[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", page, re.MULTILINE)
places = [f"{file[:-3].replace('/', '.')}.{name}" for name, file in stations]
print(f'{SVG}"0 -2 640 {42 * len(places)}">')
across, reached = {-1: -28}, []
for i, (place, (name, file)) in enumerate(zip(places, stations, strict=True)):
    above = max((j for j in range(i) if place in reached[j]), default=-1)
    if place not in CODE or above < 0 < i:
        raise SystemExit(f"how-a-study-runs.md: no other station leads to {place}, if it exists")
    across[i] = x = across[above] + 28
    y, fill = 42 * i, FILL[file.partition("/")[0]]
    print(f'<path d="M{x - 14} {42 * above + 32}V{y + 16}h14" stroke="#888" fill="none"/>')
    print(f'<rect x="{x}" y="{y}" width="460" height="32" rx="4" fill="{fill}"/>')
    print(f'<text x="{x + 9}" y="{y + 21}">{i + 1} {name} <tspan fill="#666">{file}</tspan></text>')
    new = {place}
    reached.append(set())  # all that the station leads to, past no other station
    while new:
        new = {n for p in new for n in leads_to(p)} - reached[i]
        reached[i] |= new
        new -= set(places)
print("</svg>")
