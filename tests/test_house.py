"""The rules of the house as tests. CONTRIBUTING.md says what they are for.

Each test looks at every file and lists all places that break its rule.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "chain", "wallet_auth", "anvil")
MOST_LINES = 450
MOST_FUNCTION_LINES = 70


def python_files(*folders: str) -> list[str]:
    """Paths from the root, without what npm put there."""
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [p.relative_to(ROOT).as_posix() for p in found if "node_modules" not in p.parts]


SOURCES = python_files(*PACKAGES)
TESTS = python_files("tests")


@cache  # every rule looks at every file
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def lines(path: str) -> Iterator[tuple[int, str]]:
    yield from enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module imported anywhere below ``node``, lazily or not, with its line.

    ``from gateway import ledger`` counts as ``gateway.ledger``.
    """
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from ((alias.name, found.lineno) for alias in found.names)
        elif isinstance(found, ast.ImportFrom) and found.module in PACKAGES:
            yield from ((f"{found.module}.{alias.name}", found.lineno) for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            yield "." * found.level + (found.module or ""), found.lineno


def under(path: str, places: tuple[str, ...]) -> bool:
    return path.startswith(places) if places else False


def none(places: list[str]) -> None:
    assert not places, "\n" + "\n".join(places)


# --- who may import whom --------------------------------------------------------------------

ALLOWED = {
    "wallet_auth": {"wallet_auth"},
    "chain": {"chain", "wallet_auth"},
    "anvil": {"anvil", "chain", "wallet_auth"},
    "gateway": {"gateway", "chain", "wallet_auth"},
}
MAY_USE_ANVIL = ("gateway/demo/", "gateway/cli.py")

# Inside gateway: a module may import its own row and those above it in this list.
LAYERS = [
    "db db_sqlite db_postgres cache limits config config_rules settings sections forms fields"
    " errors money observe",
    "ledger pricing notices",
    "plans payments facilitator accounts discovery migrations",
    "proxy web node own middleware ready metrics external",
    "app admin serve workers work reload check price_table setup hands hands_upto demo cli"
    " cli_account terminal",
]
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
TOP = len(LAYERS) - 1  # every routes.py is HTTP and stands beside app


def test_packages_import_downwards() -> None:
    broken = []
    for path in SOURCES:
        allowed = ALLOWED[path.split("/")[0]] | ({"anvil"} if under(path, MAY_USE_ANVIL) else set())
        for module, line in imports(tree(path)):
            top = module.split(".")[0]
            if top in {*PACKAGES, "tests"} - allowed or module.startswith("."):
                broken.append(f"{path}:{line}: imports {module}")
    none(broken)


def test_the_gateway_imports_downwards() -> None:
    broken = []
    for path in SOURCES:
        parts = path.removesuffix(".py").split("/")
        if parts[0] != "gateway" or parts[1] == "__init__":
            continue
        here = TOP if parts[-1] == "routes" else LAYER_OF.get(parts[1], -1)
        if here < 0:
            broken.append(f"{path}: gateway/{parts[1]} has no place in LAYERS")
        for module, line in imports(tree(path)):
            names = module.split(".")
            if names[0] != "gateway" or len(names) < 2 or names[1].startswith("__"):
                continue
            there = TOP if names[-1] == "routes" else LAYER_OF.get(names[1], TOP)
            if names[1] != parts[1] and there > here:
                broken.append(f"{path}:{line}: imports {module}")
    none(broken)


WALLS: dict[str, tuple[str, ...]] = {
    "web3": ("chain/second_opinion.py",),
    "eth_account": ("chain/second_opinion.py", "gateway/external/maker.py"),
    "eth_keys": ("chain/second_opinion.py",),
    "eth_hash": ("chain/second_opinion.py",),
    "stripe": ("gateway/payments/stripe.py", "gateway/plans/"),
    "redis": ("gateway/cache.py",),
    "asyncpg": ("gateway/db_postgres.py",),
    "sqlite3": ("gateway/db_sqlite.py",),
    "sqlalchemy": ("gateway/db.py", "gateway/migrations/"),  # and every tables.py
    "alembic": ("gateway/migrations/",),
    "click": ("gateway/cli", "gateway/terminal.py", "gateway/setup.py"),
    "pytest": (),
    "hypothesis": (),
}
HEAVY = {"web3", "eth_account", "eth_keys", "eth_hash", "stripe", "playwright"}


def test_third_party_walls() -> None:
    broken = []
    for path in SOURCES:
        for module, line in imports(tree(path)):
            top = module.split(".")[0]
            tables = top == "sqlalchemy" and path.endswith("/tables.py")
            if top in WALLS and not under(path, WALLS[top]) and not tables:
                broken.append(f"{path}:{line}: imports {module}")
    none(broken)


def test_only_check_asks_for_a_second_opinion() -> None:
    """It loads web3 and eth_account; what serves stays light, and owes them nothing."""
    broken = []
    for path in SOURCES:
        for module, line in imports(tree(path)):
            if module.startswith("chain.second_opinion") and path != "gateway/check.py":
                broken.append(f"{path}:{line}: imports {module}")
    none(broken)


def test_heavy_modules_are_imported_where_they_are_used() -> None:
    broken = []
    for path in SOURCES:
        for node in tree(path).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for module, line in imports(node):
                    if module.split(".")[0] in HEAVY:
                        broken.append(f"{path}:{line}: imports {module} at the top")
    none(broken)


def test_only_the_configuration_reads_the_environment() -> None:
    broken = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            reads = isinstance(node, ast.Attribute) and ast.unparse(node) in {
                "os.environ",
                "os.getenv",
            }
            takes = isinstance(node, ast.ImportFrom) and node.module == "os"
            if (reads or takes) and path != "gateway/config.py":
                broken.append(f"{path}:{getattr(node, 'lineno', 0)}: the environment")
    none(broken)


def test_wallet_auth_has_no_clock_and_no_network() -> None:
    outside = {"time", "datetime", "socket", "aiohttp", "httpx", "requests", "os", "asyncio"}
    broken = []
    for path in SOURCES:
        if path.startswith("wallet_auth/") and not path.startswith("wallet_auth/agent"):
            for module, line in imports(tree(path)):
                if module.split(".")[0] in outside:
                    broken.append(f"{path}:{line}: imports {module}")
    none(broken)


# --- money ----------------------------------------------------------------------------------

MONEY = ("chain/", "gateway/ledger/", "gateway/pricing/", "gateway/payments/", "gateway/money.py")
WAITS = {"asyncio.sleep", "asyncio.timeout", "asyncio.wait_for", "asyncio.wait"}
# Names that are an amount of money, a length of time or a point in it, and so need a unit.
MEASURED = re.compile(
    r"(^|_)(amount|price|balance|fee|cost|charge|timeout|deadline|lease|expiry|ttl|age)$"
)


def _seconds(name: str) -> bool:
    return name.lower().endswith("_s") or name == "timeout"


def _of_time(path: str) -> set[int]:
    """The nodes below something that waits, or that is named in seconds: floats may stand there."""
    allowed: set[int] = set()
    for node in ast.walk(tree(path)):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        named = [t.id for t in targets if isinstance(t, ast.Name)]
        named += [t.attr for t in targets if isinstance(t, ast.Attribute)]
        if (
            (named and all(_seconds(name) for name in named))
            or (isinstance(node, ast.Call) and ast.unparse(node.func) in WAITS)
            or (isinstance(node, ast.keyword | ast.arg) and _seconds(node.arg or ""))
        ):
            allowed |= {id(below) for below in ast.walk(node)}
        if isinstance(node, ast.arguments):
            both = [*zip(reversed([*node.posonlyargs, *node.args]), reversed(node.defaults))]  # noqa: B905  (the first have none)
            both += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d]
            for argument, default in both:
                if _seconds(argument.arg):
                    allowed.add(id(default))
    return allowed


def test_no_float_near_money() -> None:
    broken = []
    for path in SOURCES:
        if not path.startswith(MONEY):
            continue
        allowed = _of_time(path)
        for node in ast.walk(tree(path)):
            number = isinstance(node, ast.Constant) and isinstance(node.value, float)
            kind = isinstance(node, ast.Name) and node.id == "float"
            division = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div)
            if (number or kind or division) and id(node) not in allowed:
                broken.append(f"{path}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
    none(broken)


def test_integers_of_money_and_time_name_their_unit() -> None:
    broken = []
    for path in SOURCES:
        if not path.startswith(MONEY):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.arg):
                name, annotation = node.arg, node.annotation
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name, annotation = node.target.id, node.annotation
            else:
                continue
            integer = annotation is not None and ast.unparse(annotation) in {"int", "int | None"}
            if integer and MEASURED.search(name):
                broken.append(f"{path}:{node.lineno}: {name} in what unit?")
    none(broken)


# --- shape ----------------------------------------------------------------------------------


def test_files_and_functions_are_short() -> None:
    broken = []
    for path in SOURCES + TESTS:
        count = sum(1 for _ in lines(path))
        if count > MOST_LINES and path in SOURCES:
            broken.append(f"{path} has {count} lines")
        if path.startswith("gateway/migrations/versions/"):
            continue  # one list of statements
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    broken.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    none(broken)


def test_no_error_is_swallowed() -> None:
    broken = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                kind = ast.unparse(node.type) if node.type else "everything"
                idle = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
                if idle and kind in {"everything", "Exception", "BaseException"}:
                    broken.append(f"{path}:{node.lineno}: swallows {kind}")
            if isinstance(node, ast.Call) and ast.unparse(node) in {
                "suppress(Exception)",
                "contextlib.suppress(Exception)",
                "suppress(BaseException)",
                "contextlib.suppress(BaseException)",
            }:
                broken.append(f"{path}:{node.lineno}: swallows everything")
    none(broken)


def test_only_commands_print() -> None:
    broken = []
    for path in SOURCES:
        if not under(path, ("gateway/cli.py", "gateway/serve.py", "gateway/demo/")):
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                    broken.append(f"{path}:{node.lineno}: print")
    none(broken)


def test_an_ignored_type_says_why() -> None:
    with_reason = re.compile(r"# type: ignore\[[a-z-, ]+\]  # \S")
    broken = []
    for path in SOURCES:
        for number, line in lines(path):
            if "# type: ignore" in line and not with_reason.search(line):
                broken.append(f"{path}:{number}: {line.strip()}")
    none(broken)


def test_nothing_is_left_to_do() -> None:
    left = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    every = ((path, number, line) for path in SOURCES + TESTS for number, line in lines(path))
    none([f"{path}:{number}: {line.strip()}" for path, number, line in every if left.search(line)])


# --- errors ---------------------------------------------------------------------------------


def test_every_problem_has_a_code_of_the_table() -> None:
    from gateway.errors import CODES

    broken = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "Problem",
                "errors.Problem",
            }:
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and first.value not in CODES:
                    broken.append(f"{path}:{node.lineno}: {first.value!r} is not in CODES")
    none(broken)


def test_every_code_of_the_table_is_used() -> None:
    from gateway.errors import CODES

    said = {
        node.value
        for path in SOURCES
        if path != "gateway/errors.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not sorted(set(CODES) - said)


# --- settings -------------------------------------------------------------------------------


def test_every_setting_has_an_effect() -> None:
    """Or is in NO_EFFECT, and then it has none: a list that only says what is true."""
    from gateway import settings

    readers = [p for p in SOURCES if not p.startswith(("gateway/config", "gateway/settings.py"))]
    read = {
        node.attr
        for path in readers
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
    }
    names = ("Server", "Credits", "Chain", "Stripe", "Facilitator", "Route", "Upstream")
    every = {(name, field) for name in names for field in getattr(settings, name).model_fields}
    assert {pair for pair in every if pair[1] not in read} == settings.NO_EFFECT


# --- what is committed ----------------------------------------------------------------------


def tracked() -> list[Path]:
    """Every file under version control; in an unpacked release, every source file."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    if listed.returncode != 0:
        return [ROOT / path for path in (*SOURCES, *TESTS)]
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_symlink() or path.is_file()]


def test_no_link_to_somewhere_on_one_machine_is_committed() -> None:
    """A link takes the place of the folder of that name wherever it is checked out."""
    none([str(path.relative_to(ROOT)) for path in tracked() if path.is_symlink()])


# In parts, so that this file does not contain them: keys, and what belongs to one machine or one
# package host.
FORBIDDEN = [
    "BEGIN " + "PRIVATE KEY",
    "BEGIN EC " + "PRIVATE KEY",
    "/wo" + "rk/main",
    "/wo" + "rk/shared",
    "/opt/" + "pypi",
    "pypi." + "org",
    "pythonhosted" + ".org",
    "registry.npm" + "js.org",
]


def test_nothing_of_one_machine_and_no_secret_is_committed() -> None:
    broken = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # OSError: a link, which the test above is about
            continue
        broken += [f"{path.relative_to(ROOT)} contains {w!r}" for w in FORBIDDEN if w in text]
    none(broken)


def pins(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\\n]+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    "name",
    [
        "requirements.lock",
        "requirements-dev.lock",
        "scripts/postgres.lock",
        "scripts/node.lock",
        "scripts/bench.lock",
    ],
)
def test_lock_files_pin_by_hash_and_name_no_address(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "://" not in text
    assert pins(name)
    for block in re.split(r"\n(?=[A-Za-z0-9])", text):
        if re.match(r"[A-Za-z0-9]", block):
            assert "--hash=sha256:" in block, block.splitlines()[0]


def test_package_locks_name_no_address() -> None:
    for folder in ("anvil", "tests/clients", "tests/clients/bench"):
        text = (ROOT / folder / "package-lock.json").read_text(encoding="utf-8")
        assert '"resolved"' not in text, folder
        assert '"integrity"' in text, folder


def test_both_requirement_locks_agree() -> None:
    run, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert {name: dev.get(name) for name in run} == run


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    from importlib.metadata import packages_distributions

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[\[<>=]", each)[0] for each in project["dependencies"]}
    owners = packages_distributions()
    used: set[str] = set()
    for path in SOURCES:
        for module, _ in imports(tree(path)):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top not in PACKAGES:
                used |= {name.lower() for name in owners.get(top, [f"{top}: not installed"])}
    # What a declared package always brings, and what is used where the user has it.
    brought = {"uvloop", "httptools", "h11", "pydantic_core", "eth-keys", "eth-hash"}
    optional = {"httpx2"}
    assert used - brought - optional == declared


# --- linters --------------------------------------------------------------------------------


def lint(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, "\n" + done.stdout + done.stderr


def test_ruff_check() -> None:
    lint("ruff", "check", "--quiet", ".")


def test_ruff_format() -> None:
    lint("ruff", "format", "--check", "--quiet", ".")


@pytest.mark.timeout(600)
def test_mypy() -> None:
    lint("mypy")
