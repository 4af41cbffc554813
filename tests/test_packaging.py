"""What an installed jaxpost is: a small wheel that works outside the checkout, and few packages beside it."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jaxpost

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_is_small_and_holds_the_package_alone(wheel):
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxpost").rglob("*") if path.suffix != ".pyc"}
    kept = {name for name in kept if (ROOT / name).is_file()}
    assert {name for name in names if ".dist-info/" not in name} == kept


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "run" / "config.yaml").write_text("learning_rate: 0.1\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}

    def run(*words):
        command = [sys.executable, "-m", "jaxpost", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    where = subprocess.run(
        [sys.executable, "-c", "import jaxpost; print(jaxpost.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in where.stdout
    assert "sft" in run("--help").stdout
    told = run("report", "run", "--output_file", "report.html")
    assert told.returncode == 0, told.stderr
    assert "<style>" in (tmp_path / "report.html").read_text()


def test_base_install_is_few_packages_and_none_of_the_heavy_ones():
    """jax, flax, transformers and datasets are 60 with what they need; 77 is all."""
    installed = base_packages()
    assert len(installed) <= 80, sorted(installed)
    assert not {"torch", "tensorflow", "ray"} & installed


def base_packages():
    """What `pip install .` brings, itself included, by what the installed packages say that they need."""
    found, waiting = set(), [("jaxpost", "")]
    while waiting:
        name, extra = waiting.pop()
        try:
            needs = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue  # asked for on another platform or Python
        found.add((name, extra))
        for need in needs:
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                pairs = {(canonicalize_name(need.name), each) for each in ("", *need.extras)}
                waiting += pairs - found
    return {name for name, _ in found}


def test_version_stands_in_one_place():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version("jaxpost") == jaxpost.__version__
    assert f"## {version('jaxpost')}" in (ROOT / "CHANGELOG.md").read_text()
