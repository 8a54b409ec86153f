"""What is installed fits the torch beside it; what cannot work says why in one sentence."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import capabilities
import pytest
import torch
from source_tree import ROOT, from_source

import fastsgd
from fastsgd import _check

RELEASE = torch.__version__.partition("+")[0]
OTHER_RELEASE = "2.13.0"  # where a build without torch brings the one that runs the tests
CURE = "pip install --force-reinstall --no-deps --no-cache-dir"

# Under whatever instruction set torch takes; stock takes its own path for the same numbers.
STEP = """
import torch, fastsgd
torch.manual_seed(0)
start, grad = torch.randn(1000), torch.randn(1000)
ours, stock = (torch.nn.Parameter(start.clone()) for _ in range(2))
optimizers = [
    fastsgd.SGD([ours], lr=0.25, momentum=0.9, max_grad_norm=1e9),
    torch.optim.SGD([stock], lr=0.25, momentum=0.9, foreach=False),
]
for _ in range(3):
    for p, optimizer in zip((ours, stock), optimizers):
        p.grad = grad.clone()
        optimizer.step()
assert torch.equal(ours, stock), ours - stock
print("stepped with", fastsgd._C.instruction_set())
"""


def run(*command, ok=True, **options):
    """Run a command, with no Python path of ours, and return all that it printed."""
    ours = {"PYTHONPATH", "PYTHONSAFEPATH"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= options.pop("env", {})
    result = subprocess.run(
        [str(word) for word in command],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    assert (result.returncode == 0) == ok, result.stdout
    return result.stdout


def last_line(output):
    return output.strip().splitlines()[-1]


@pytest.fixture
def tree(tmp_path):
    """A copy of the source as a clone would have it: nothing built."""
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "_build_info.py")
    return shutil.copytree(ROOT, tmp_path / "fresh clone", ignore=built)


# The check that runs before the extension loads.


def compiled_against(monkeypatch, version, cuda):
    info = SimpleNamespace(TORCH_VERSION=version, TORCH_CUDA=cuda)
    monkeypatch.setitem(sys.modules, "fastsgd._build_info", info)


def refusal():
    with pytest.raises(ImportError) as caught:
        _check.check()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_this_torch_passes():
    _check.check()


def test_another_release_is_refused(monkeypatch):
    compiled_against(monkeypatch, "2.9.1", torch.version.cuda)
    message = refusal()
    assert "compiled against torch 2.9.1" in message
    assert f"finds torch {RELEASE}" in message
    assert CURE in message


def test_cuda_and_cpu_builds_of_one_release_are_told_apart(monkeypatch):
    compiled_against(monkeypatch, RELEASE, "13.0" if torch.version.cuda is None else None)
    message = refusal()
    assert "CUDA build" in message and "CPU build" in message and CURE in message


def test_the_cure_is_for_the_installer_that_is_there(monkeypatch):
    compiled_against(monkeypatch, "2.9.1", torch.version.cuda)
    found = importlib.util.find_spec
    without_pip = lambda name: None if name == "pip" else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without_pip)
    assert "uv pip install" in refusal()


def test_another_torch_is_refused_before_the_extension_loads(tmp_path):
    package = shutil.copytree(Path(fastsgd.__file__).parent, tmp_path / "fastsgd")
    for library in package.glob("_C.*"):
        library.write_bytes(b"no library at all")
    fake = tmp_path / "torch"
    fake.mkdir()
    (fake / "__init__.py").write_text("from torch import version\n__version__ = '2.12.0+cpu'\n")
    (fake / "version.py").write_text("cuda = None\n")
    output = run(sys.executable, "-c", "import fastsgd", cwd=tmp_path, ok=False)
    assert re.match(r"ImportError: fastsgd was compiled against .* 2\.12\.0", last_line(output))


@from_source
def test_source_that_was_not_built_says_so(tree):
    output = run(sys.executable, "-c", "import fastsgd", cwd=tree, ok=False)
    assert "was not built" in last_line(output)
    assert f"pip install -e '{tree}'" in last_line(output)


@from_source
def test_an_extension_of_another_python_says_so(tree):
    (tree / "fastsgd" / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    output = run(sys.executable, "-c", "import fastsgd", cwd=tree, ok=False)
    assert "compiled for another Python" in last_line(output)


@from_source
def test_no_torch_says_so(tree):
    lone = "import sys; sys.path.insert(0, '.'); import fastsgd"
    output = run(sys.executable, "-I", "-S", "-c", lone, cwd=tree, ok=False)
    assert last_line(output).startswith("ImportError: fastsgd needs PyTorch")


# What was installed.


def test_metadata_requires_the_release_compiled_against():
    requires = metadata.requires("fastsgd")
    assert f"torch=={importlib.import_module('fastsgd._build_info').TORCH_VERSION}" in requires
    assert metadata.metadata("fastsgd")["Requires-Python"] == ">=3.10"


def test_version_is_said_once():
    assert metadata.version("fastsgd") == fastsgd.__version__


# The build.


@from_source
def test_sdist_holds_all_that_a_build_needs(tree, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
        info = files.extractfile(archive.name.removesuffix(".tar.gz") + "/PKG-INFO")
        metadata_of_source = info.read().decode()
    needed = [*tree.glob("csrc/**/*"), *tree.glob("build_support/*.py"), *tree.glob("tests/*.py")]
    needed += [*tree.glob("fastsgd/**/*.py*"), tree / "setup.py", tree / "LICENSE"]
    missing = {str(path.relative_to(tree)) for path in needed if path.is_file()} - names
    assert not missing
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.py"))]
    assert "Requires-Dist: torch<2.16,>=2.11" in metadata_of_source


def build_ext(tree, platform=None, ok=True, **env):
    """Run ``setup.py build_ext``, on another platform as far as Python can tell."""
    pretend = f"import sysconfig; sysconfig.get_platform = lambda: {platform!r}\n"
    script = "import runpy, sys; sys.argv[1:] = ['build_ext', '-b', 'out']\n"
    script += "sys.path.insert(0, '.'); runpy.run_path('setup.py', run_name='__main__')"
    script = (pretend if platform else "") + script
    return run(sys.executable, "-c", script, cwd=tree, ok=ok, env=env)


@from_source
def test_a_missing_compiler_is_one_sentence(tree):
    output = build_ext(tree, ok=False, CXX="no-such-compiler")
    assert "Traceback" not in output
    assert "needs a C++20 compiler, and there is no no-such-compiler" in last_line(output)


@from_source
def test_a_compiler_that_fails_is_one_sentence(tree):
    output = build_ext(tree, ok=False, CXX="false")
    assert "Traceback" not in output
    assert last_line(output).startswith("error: false cannot compile fastsgd")


@from_source
def test_another_system_is_one_sentence(tree):
    output = build_ext(tree, "win-amd64", ok=False)
    assert "Traceback" not in output
    assert (
        last_line(output) == "error: fastsgd builds on Linux with GCC or Clang, not on win-amd64."
    )


@from_source
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_kernels_that_cannot_be_compiled_are_one_sentence(tree):
    output = build_ext(tree, ok=False, FASTSGD_CUDA="1")
    assert "Traceback" not in output
    assert last_line(output) == (
        "error: FASTSGD_CUDA is 1, but torch was a CPU build: install a torch with CUDA, "
        "or unset FASTSGD_CUDA."
    )


@from_source
def test_a_torch_that_can_be_imported_is_not_asked_for(tree):
    code = "from build_support import backend as b; print(b._build_requires(), b.find_torch())"
    output = run(sys.executable, "-c", code, cwd=tree)
    assert last_line(output).startswith(f"[] Torch(version='{RELEASE}'")


@from_source
@pytest.mark.slow
def test_another_processor_gets_the_baseline_kernels(tree):
    build_ext(tree, "linux-aarch64")
    for built in (tree / "out" / "fastsgd").iterdir():
        shutil.copy(built, tree / "fastsgd")
    output = run(sys.executable, "-W", "ignore", "-c", STEP, cwd=tree)
    assert last_line(output) == "stepped with baseline"


# Installs into environments of their own. They need pip's index, and minutes.


def new_environment(folder):
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python with this release of torch and nothing else."""
    python = new_environment(tmp_path_factory.mktemp("environment"))
    run(python, "-m", "pip", "install", f"torch=={RELEASE}")
    return python


def pip_install(python, *arguments, **options):
    output = run(python, "-m", "pip", "-v", "install", *arguments, **options)
    return "\n".join(line for line in output.splitlines() if "Location" not in line)


def fetched_torch(output):
    return re.search(r"(Collecting|Downloading|Processing) \S*\btorch\b", output)


def steps(python, folder):
    """One binary serves every processor: the kernels are chosen as torch chooses its own."""
    for name, kernels in capabilities.supported().items():
        env = {"ATEN_CPU_CAPABILITY": name}
        output = run(python, "-W", "ignore", "-c", STEP, cwd=folder, env=env)
        assert last_line(output) == f"stepped with {kernels}"


def required(python):
    code = "from importlib import metadata; print(metadata.requires('fastsgd')[0])"
    return last_line(run(python, "-I", "-c", code))  # not of the source tree, if that is here


@from_source
@pytest.mark.slow
@pytest.mark.parametrize("editable", [[], ["-e"]], ids=["plain", "editable"])
@pytest.mark.parametrize("isolation", [[], ["--no-build-isolation"]], ids=["isolated", "bare"])
def test_pip_builds_against_the_torch_that_is_there(
    environment, tree, tmp_path, editable, isolation
):
    output = pip_install(environment, *isolation, *editable, ".", cwd=tree)
    try:
        assert not fetched_torch(output)
        assert required(environment) == f"torch=={RELEASE}"
        steps(environment, tmp_path)
    finally:
        run(environment, "-m", "pip", "uninstall", "-y", "fastsgd")


@from_source
@pytest.mark.slow
def test_without_torch_a_bare_build_says_so(tree, tmp_path):
    python = new_environment(tmp_path / "bare")
    run(python, "-m", "pip", "install", "setuptools>=77.0.3")
    output = pip_install(python, "--no-build-isolation", ".", cwd=tree, ok=False)
    assert "fastsgd compiles against torch and finds none" in output
    assert "Traceback" not in output and not fetched_torch(output)


@from_source
@pytest.mark.slow
def test_torch_is_brought_and_then_swapped(tree, tmp_path):
    """Without torch pip brings one and builds against it; the cure for another one cures.

    The one that it brings has CUDA on most machines, and here there is no nvcc.
    """
    python = new_environment(tmp_path / "bare")
    output = pip_install(python, ".", cwd=tree, env={"CUDA_HOME": str(tmp_path)})
    assert fetched_torch(output)
    said = run(python, "-W", "ignore", "-m", "fastsgd", "info", cwd=tmp_path)
    assert "there was no nvcc" in said or "torch was a CPU build" in said
    brought = required(python).removeprefix("torch==")
    steps(python, tmp_path)

    other = OTHER_RELEASE if brought == RELEASE else RELEASE
    run(python, "-m", "pip", "install", f"torch=={other}")
    message = last_line(run(python, "-c", "import fastsgd", cwd=tmp_path, ok=False))
    assert f"compiled against torch {brought}" in message
    assert f"finds torch {other}" in message
    run("bash", "-c", message.split("`")[1], cwd=tmp_path)
    assert required(python) == f"torch=={other}"
    steps(python, tmp_path)


@from_source
@pytest.mark.slow
def test_build_without_isolation_makes_the_wheel_from_the_sdist(environment, tree, tmp_path):
    run(environment, "-m", "pip", "install", "build")
    run(environment, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", cwd=tree)
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    output = pip_install(environment, wheel)
    try:
        assert not fetched_torch(output)
        assert required(environment) == f"torch=={RELEASE}"
        steps(environment, tmp_path)
    finally:
        run(environment, "-m", "pip", "uninstall", "-y", "fastsgd")
