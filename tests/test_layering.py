"""Imports go only downward: BUILD says what may import what, and every import is held to it."""

import ast
import glob
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What experiments and users may import; beneath these, everything may be rearranged.
PUBLIC_MODULES = {
    "tfgrow",
    "tfgrow.callbacks",
    "tfgrow.layers",
    "tfgrow.measure",
    "tfgrow.morphisms.registry",
    "tfgrow.schedules",
    "tfgrow.types",
}


def matches(patterns, root):
    """Paths of the files below `root` that the patterns match."""
    found = (glob.glob(pattern, root_dir=root, recursive=True) for pattern in patterns)
    return {path for paths in found for path in paths}


def expand(expression, root):
    """The files that a `srcs` expression of BUILD stands for: a list, or glob(list, exclude)."""
    if isinstance(expression, ast.List):
        return {path for path in ast.literal_eval(expression) if (root / path).exists()}
    exclude = {keyword.arg: keyword.value for keyword in expression.keywords}.get("exclude")
    included = matches(ast.literal_eval(expression.args[0]), root)
    return included - (matches(ast.literal_eval(exclude), root) if exclude else set())


def read_build(text, root):
    """The libraries that BUILD declares: name -> (files, names of the libraries it depends on)."""
    libraries = {}
    for statement in ast.parse(text).body:
        call = getattr(statement, "value", None)
        if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "py_library":
            continue
        arguments = {keyword.arg: keyword.value for keyword in call.keywords}
        dependencies = ast.literal_eval(arguments["deps"]) if "deps" in arguments else []
        name = ast.literal_eval(arguments["name"])
        libraries[name] = (
            expand(arguments["srcs"], root),
            {dependency.removeprefix(":") for dependency in dependencies},
        )
    return libraries


def module_name(path):
    """`tfgrow/graph/__init__.py` -> `tfgrow.graph`."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported_modules(source, path, modules):
    """The project's modules that a file imports, as (line, module), wherever the import stands.

    `from tfgrow.graph import nodes` imports `tfgrow.graph.nodes`, but `from tfgrow.graph import
    find_sites` imports `tfgrow.graph`: `modules` tells a module from a name.
    """
    package = module_name(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in names:
            if base.split(".")[0] in {module.split(".")[0] for module in modules}:
                yield node.lineno, f"{base}.{name}" if f"{base}.{name}" in modules else base


def violations(libraries, root):
    """Every import that BUILD does not allow, and every file it does not hold once, in words."""
    owners = {}
    for name, (files, _) in libraries.items():
        for path in files:
            owners.setdefault(path, []).append(name)
    library_of = {module_name(path): names[0] for path, names in owners.items()}
    problems = [
        f"{path} is in the libraries {sorted(names)} of BUILD: it belongs in one"
        for path, names in owners.items()
        if len(names) > 1
    ]
    for path in sorted(matches(["tfgrow/**/*.py", "experiments/**/*.py"], root)):
        if path not in owners:
            problems.append(f"{path} is in no py_library of BUILD: add it to its package's")
            continue
        library = owners[path][0]
        allowed = libraries[library][1] | {library}
        for line, module in imported_modules((root / path).read_text(), path, library_of):
            target = library_of.get(module)
            if target is None:
                problems.append(f"{path}:{line} imports {module}, which no library holds")
            elif target not in allowed:
                problems.append(
                    f"{path}:{line} imports {module} of :{target}, but :{library} may import "
                    f"only {sorted(allowed - {library})}"
                )
    return problems


@pytest.fixture(scope="module")
def libraries():
    return read_build((ROOT / "BUILD").read_text(), ROOT)


def test_imports_follow_build(libraries):
    problems = violations(libraries, ROOT)
    assert not problems, "\n" + "\n".join(problems)


def test_dependencies_point_down_the_file(libraries):
    """A library may depend only on those written above it: no cycles, and BUILD reads in order."""
    seen = set()
    for name, (_, dependencies) in libraries.items():
        assert dependencies <= seen, f":{name} depends on {dependencies - seen}, written below it"
        seen.add(name)


def test_surgery_and_morphisms_do_not_know_each_other(libraries):
    """The rule that keeps a new morphism one new file: surgery sees edits, morphisms values."""
    files, _ = libraries["surgery"]
    assert files, "BUILD's :surgery holds no file"
    assert not libraries["surgery"][1] & {"morphisms", "oracle", "estimator"}
    assert "surgery" not in libraries["morphisms"][1]


def test_experiments_use_the_public_api(libraries):
    modules = {module_name(path) for files, _ in libraries.values() for path in files}
    private = [
        f"{path}:{line} imports {module}: experiments import {sorted(PUBLIC_MODULES)}"
        for path in sorted(matches(["experiments/**/*.py"], ROOT))
        for line, module in imported_modules((ROOT / path).read_text(), path, modules)
        if module.split(".")[0] == "tfgrow" and module not in PUBLIC_MODULES
    ]
    assert not private, "\n" + "\n".join(private)


# The walk itself is tried on a small tree with one fault of each kind.
TREE = {
    "tfgrow/__init__.py": "from tfgrow.top import f",
    "tfgrow/types.py": "import numpy",
    "tfgrow/low/__init__.py": "from tfgrow import types\nfrom .part import g",
    "tfgrow/low/part.py": "def g():\n    from ..top import f\n    return f",
    "tfgrow/top.py": "import tfgrow.low.part\nimport tfgrow.gone",
    "tfgrow/stray.py": "",
}
TREE_BUILD = """
py_library(name = "base", srcs = glob(["tfgrow/*.py"], exclude = [
    "tfgrow/__init__.py", "tfgrow/top.py", "tfgrow/stray.py"]))
py_library(name = "low", srcs = glob(["tfgrow/low/**/*.py"]), deps = [":base"])
py_library(name = "top", srcs = ["tfgrow/top.py", "tfgrow/later.py"], deps = [":low"])
py_library(name = "tfgrow", srcs = ["tfgrow/__init__.py"], deps = [":top"])
"""


@pytest.fixture
def tree(tmp_path):
    for path, text in TREE.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_walk_names_each_violation(tree):
    assert violations(read_build(TREE_BUILD, tree), tree) == [
        "tfgrow/low/part.py:2 imports tfgrow.top of :top, but :low may import only ['base']",
        "tfgrow/stray.py is in no py_library of BUILD: add it to its package's",
        "tfgrow/top.py:2 imports tfgrow.gone, which no library holds",
    ]


def test_walk_names_a_file_of_two_libraries(tree):
    (tree / "tfgrow/stray.py").unlink()
    build = TREE_BUILD + 'py_library(name = "twice", srcs = ["tfgrow/types.py"])'
    assert "tfgrow/types.py is in the libraries ['base', 'twice'] of BUILD: it belongs in one" in (
        violations(read_build(build, tree), tree)
    )
