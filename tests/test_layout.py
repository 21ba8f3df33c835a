"""The house rules that no other test would notice: who imports whom, sizes, names that must stay free."""

import ast
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "cpgd", "model", "data")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted([*ROOT.glob("*.py"), *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

# Folder of the checkout -> folders it may import, itself included.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "data": {"data"},
    "model": {"model", "kernels", "data"},  # policy.py takes data.collate.MicroBatch
    "cpgd": {"cpgd", "kernels", "model", "data"},
}
ATTACKS = ("data/prepare/jailbreak/", "data/prepare/augment")
"""Programs, and the one place below cpgd/ that may ask servers: by the client in cpgd/judges/."""
# Inside cpgd: the part of a file (its top folder, or its own name) -> the parts it may import; run/ may import all.
CPGD_LAYERS = {
    "config": {"judges"},  # what an entry of --reward.judges may say
    "advantages": set(),
    "objective": {"config"},
    "update": {"config", "objective", "rollout"},  # of rollout the values
    "judges": {"judges", "config", "rollout", "rewards"},
    "rollout": {"config", "advantages", "update", "rewards", "rollout", "judges"},  # judges: its loop in a thread
    "rewards": {"config", "rollout", "judges", "rewards", "run"},  # run: check.py takes train.py's options
}
STEP = ("cpgd/*.py", "cpgd/rollout/*.py", "cpgd/rewards/base.py", "cpgd/rewards/scorer.py", "model/policy.py",
        "model/parallel.py", "model/weights.py", "data/sampler.py", "data/collate.py", "kernels/linear_cpgd.py")
"""The way of one step, from the row numbers drawn to the optimizer: what a newcomer reads, and in cpgd/ and
cpgd/rollout/ there is nothing else."""
STEP_LINES = 3520
OPTIONAL = {"vllm", "flash_attn", "liger_kernel", "wandb", "if_verifiable", "langdetect"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> list[tuple[int, str, bool, tuple[str, ...]]]:
    """(line, absolute module name, at module level, what is taken from it) of every import; relative ones resolved."""
    tree = parsed(path)
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, id(node) in top, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT).parts[: -node.level]
                assert parts, f"{path}:{node.lineno}: across folders import cosmo_rl.<folder>, not relatively"
                name = ".".join(filter(None, ["cosmo_rl", *parts, name]))
            found.append((node.lineno, name, id(node) in top, tuple(alias.name for alias in node.names)))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_follow_the_layers(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    for line, name, at_top, _ in imports(path):
        head, *rest = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert head not in {"bench", "tests", "train", "evaluate"}, where
        inside = "worker" in parts and head == "vllm"  # runs in the server's environment alone
        assert inside or not (at_top and head in OPTIONAL), f"{where}: import it at first use, naming the pip line"
        if head != "cosmo_rl":
            continue
        assert rest, f"{where}: import modules, not the package"
        asks = "/".join(parts).startswith(ATTACKS) and rest[:2] == ["cpgd", "judges"]
        assert rest[0] in MAY_IMPORT[parts[0]] or asks, where
        wing = parts[:2] == ("data", "prepare")
        assert wing or not at_top or rest[:2] != ["data", "prepare"], f"{where}: not at the step's start"
        if parts[0] == rest[0] == "cpgd":
            assert rest[1] != "trainer" or parts[1:] == ("run", "main"), f"{where}: the trainer is the top"
            assert rest[1] in CPGD_LAYERS.get(parts[1], {rest[1]}), where


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_folder_imports_itself_relatively(path):
    """Else pyright, which opens it as cpgd/x.py and not as cosmo_rl/cpgd/x.py, takes each of its classes for two."""
    own = f"cosmo_rl.{path.relative_to(ROOT).parts[0]}."
    found = [node.lineno for node in ast.walk(parsed(path))
             if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith(own)]
    assert not found, f"{path.relative_to(ROOT)}: lines {found}: inside {own[:-1]} import with . or .."


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_flat_imports(path):
    """`import kernels` would be the Hugging Face distribution, or an accident of the working directory."""
    flat = [(line, name) for line, name, *_ in imports(path) if name.split(".")[0] in FOLDERS]
    assert not flat, f"{path.relative_to(ROOT)}: import these as cosmo_rl.*: {flat}"


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_size_and_characters(path):
    text = path.read_text()
    if path in SOURCES or path.parent == ROOT:
        ceiling = 500
        assert text.count("\n") <= ceiling, f"{path.relative_to(ROOT)}: over {ceiling} lines; split it"
    assert text.isascii(), f"{path.relative_to(ROOT)}: ASCII only"


def test_the_way_of_one_step_is_short():
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for name in STEP for path in ROOT.glob(name)}
    assert sum(lines.values()) <= STEP_LINES, f"{sum(lines.values())} lines: {lines}"


def test_a_run_imports_nothing_that_prepares_data():
    """Followed through the imports at module level: embedded rows may be read at use."""
    trainer = ROOT / "cpgd" / "trainer.py"
    came_by, waiting = {trainer: ""}, [trainer]
    while waiting:
        path = waiting.pop()
        for line, name, at_top, taken in imports(path):
            for module in (name, *(f"{name}.{part}" for part in taken)):
                found = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
                if at_top and module.startswith("cosmo_rl.") and found.is_file() and found not in came_by:
                    came_by[found] = f"{came_by[path]}{path.relative_to(ROOT)}:{line} -> "
                    waiting.append(found)
    assert len(came_by) > 40
    bad = [f"{way}{found.relative_to(ROOT)}" for found, way in came_by.items() if "prepare" in found.parts]
    assert not bad, "\n".join(bad)


def test_folders_are_namespaces():
    made = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]
    assert not made, f"an __init__.py here can shadow another distribution: {made}"
    for name in ("__init__.py", "conftest.py", "tests/__init__.py"):
        assert not (ROOT / name).exists(), f"{name} puts the checkout on sys.path"
    versions = [p.name for p in (ROOT / "kernels").rglob("*.py") if "__version__" in p.read_text()]
    assert not versions, f"transformers would take kernels/ for the Hugging Face distribution: {versions}"


def test_checkout_is_not_importable_flat():
    """Neither pytest nor the editable install leaves kernels/ or the other folders on sys.path."""
    for folder in FOLDERS:
        assert importlib.util.find_spec(folder) is None, folder
        spec = importlib.util.find_spec(f"cosmo_rl.{folder}")
        assert spec is not None and spec.submodule_search_locations, f"cosmo_rl.{folder}: run `pip install -e .`"


def test_huggingface_kernels_is_not_shadowed(tmp_path):
    """With the checkout first on the path, a real distribution named `kernels` still wins."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'the real one'\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    code = "from kernels import get_kernel; import cosmo_rl.cpgd.config as c; print(get_kernel, c.__name__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[0] == "the real one cosmo_rl.cpgd.config", done.stderr


def test_typing_links_lead_to_the_folders():
    """pyright resolves cosmo_rl.* through these links."""
    for folder in FOLDERS:
        assert (ROOT / ".typing" / "cosmo_rl" / folder).resolve() == (ROOT / folder).resolve()
