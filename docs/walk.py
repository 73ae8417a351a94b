"""Draw how a study runs: the stations of how-a-study-runs.md, and which of them leads to which."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-a-study-runs.md"
FILL = {"studies": "#dbe7f6", "harness": "#dff0de", "analysis": "#f8ead0"}  # package -> colour
NAMES = defaultdict(dict)  # module -> what it imports or defines: name -> full name
CODE = {}  # full name of a function, a method or a module's top level (STUDY) -> syntax tree
PASSED = defaultdict(list)  # keyword -> (module, value) of every call that has it

for path in (path for package in FILL for path in (ROOT / package).glob("**/*.py*")):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(path.read_text() if path.suffix in (".py", ".pyi") else "")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = f"{module}.{node.module}" if node.level else node.module
            NAMES[module] |= {n.asname or n.name: f"{source}.{n.name}" for n in node.names}
        elif isinstance(node, ast.keyword):
            PASSED[node.arg].append((module, node.value))
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    NAMES[module] |= {node.name: f"{module}.{node.name}" for node in defined}
    CODE[f"{module}.STUDY"] = ast.Module([node for node in tree.body if node not in defined], [])
    for node in defined:
        methods = {f".{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
        parts = methods if isinstance(node, ast.ClassDef) else {"": node}
        CODE |= {f"{module}.{node.name}{part}": code for part, code in parts.items()}


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
    known = NAMES[next(m for m in sorted(NAMES, reverse=True) if place.startswith(f"{m}."))]
    found = named(CODE[place], known | {"self": place.rpartition(".")[0]})
    calls = [node.func for node in ast.walk(CODE[place]) if isinstance(node, ast.Call)]
    for name in {call.attr for call in calls if isinstance(call, ast.Attribute)}:
        found |= {f"{located(full)}.{name}" for full in known.values()} & CODE.keys()
        found |= {n for module, value in PASSED[name] for n in named(value, NAMES[module])}
    return found


stations = re.findall(r"^\d+\. \[`([\w.]+)`\]\(\.\./([\w/]+)\.py\)", PAGE.read_text(), re.M)
places = [f"{file.replace('/', '.')}.{name}" for name, file in stations]
print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 640 {42 * len(places)}"')
print('font-family="monospace" font-size="13" fill="none" stroke="#888">')
across, reached = [], []
for i, (place, (name, file)) in enumerate(zip(places, stations, strict=True)):
    above = max((j for j in range(i) if place in reached[j]), default=-1)
    if place not in CODE or (i > 0 and above < 0):
        raise SystemExit(f"{PAGE.name}: {place} is not in the code, or nothing leads to it")
    across.append(across[above] + 28 if i else 0)
    x, y, fill = across[i], 42 * i, FILL[file.partition("/")[0]]
    print(f'<path d="M{x - 14} {42 * above + 32}V{y + 16}h14"/>' if i else "")
    print(f'<rect x="{x}" y="{y}" width="460" height="32" rx="4" fill="{fill}" stroke="none"/>')
    print(f'<text x="{x + 10}" y="{y + 21}" fill="#222" stroke="none">', end="")
    print(f'{i + 1} <tspan font-weight="bold">{name}</tspan> {file}.py</text>')
    seen, new = set(), {place}
    while new:  # all that the station leads to, past no other station
        new = {n for p in new for n in leads_to(p)} - seen
        seen, new = seen | new, new - set(places)
    reached.append(seen)
print("</svg>")
