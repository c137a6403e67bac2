"""The kernel tests and one small model on emulated 64-bit ARM CPUs: with dot products of both kinds, and without.

python tools/aarch64.py            in a temporary folder, which is removed
python tools/aarch64.py FOLDER     in a folder that keeps Debian, the packages and the compiled code for the next time

For root on Debian or Ubuntu. debootstrap installs an arm64 Debian, this machine's pip fetches aarch64 wheels as it is
configured, and qemu runs them. What is mounted in there is unmounted with the end of the program that needs it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # an extra of the test and dev sets

TREE = Path(__file__).resolve().parents[1]
SUITE, PYTHON = "bookworm", "3.11"
TOOLS = {"debootstrap": "debootstrap", "qemu-aarch64-static": "qemu-user-static", "unshare": "util-linux"}
FORMATS = ("f16", "int4", "int4-min", "int5-k", "int8", "mxfp4")
PRODUCTS = [f"test_kernels.py::test_products_equal_the_reference[{name}]" for name in FORMATS]
FEW_TESTS = ["test_simd.py", *(test for test in PRODUCTS if "[int4]" in test or "[int8]" in test)]
TESTS = [  # under emulation, compiling takes its time: what the instructions matter to, and one small model
    "test_simd.py",
    "test_kernels.py::test_exp_and_its_kin_equal_the_reference_and_are_accurate",
    "test_kernels.py::test_fma_rounds_once",
    "test_kernels.py::test_rms_norm_equals_the_reference",
    "test_kernels.py::test_quantised_activations_equal_the_reference",
    *PRODUCTS,
    "test_packing.py::test_tiles_equal_the_slow_version[Q6_K]",
    *(f"test_attention.py::test_one_token_far_into_a_text[3-3-0-{kind}]" for kind in ("f16", "int8")),
    "test_golden.py::test_quantised_with_float_activations_is_exact[llama-q4_0]",
    "test_golden.py::test_quantised_with_int8_activations_is_as_good_as_llama_cpp[llama-q4_0]",
]
CPUS = {  # by instruction path: LLVM's name and features for a CPU that has no better one
    "neon-dotprod": ("cortex-a78", "+neon,+dotprod", TESTS),
    "neon": ("cortex-a72", "+neon", TESTS),
    "neon-i8mm": ("cortex-a78", "+neon,+dotprod,+i8mm", FEW_TESTS),
}
BINFMT = Path("/proc/sys/fs/binfmt_misc")
ARM_PROGRAM = r"\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"  # an ELF header, and
ARM_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"  # which bits are meant


def main() -> int:
    """Prepare what is not there yet, run the tests on each CPU, and say how long each part took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where Debian is kept for the next time")
    parser.add_argument("--path", action="append", choices=CPUS, help="a CPU with this instruction path alone")
    folder, paths = parser.parse_args().folder, parser.parse_args().path or list(CPUS)
    refuse_without_tools()
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgert-aarch64-")))
        stack.enter_context(programs_for_arm())
        debian, packages = install_debian(folder.resolve()), folder.resolve() / "packages"
        install_packages(packages)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            passed = pool.map(lambda path: run_tests(path, debian, packages), paths)
            failed = [path for path, good in zip(paths, passed, strict=True) if not good]
    print(f"== {', '.join(failed)}: FAILED" if failed else f"== passed on {', '.join(paths)}")
    return 1 if failed else 0


def refuse_without_tools() -> None:
    """Leave with the command that installs what is missing."""
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})
    if missing:
        sys.exit(f"missing: apt-get install --no-install-recommends {' '.join(missing)}")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"missing: pip for {sys.executable} (apt-get install python3-pip)")
    if os.geteuid() != 0:
        sys.exit("only root may change into another root folder and mount: run this with sudo")
    if platform.machine() == "aarch64":
        sys.exit("this machine is an ARM itself: run the tests")


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    yield
    print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)


def apart(script: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell script ($0 and $@ are the arguments) whose mounts nobody else sees and that end with it."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, *map(str, arguments)]
    return subprocess.run(command, text=True, **options)


@contextlib.contextmanager
def programs_for_arm() -> Iterator[None]:
    """Let the kernel start ARM programs through qemu, also inside another root folder (flag F), until this ends."""
    mounted = not (BINFMT / "register").exists()  # by us; what is registered ends with the last mount
    if mounted:
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    entry = BINFMT / "edgert-aarch64"
    try:
        if not any(re.search("^flags:.*F", path.read_text(), re.M) for path in BINFMT.glob("*-aarch64")):
            line = f":{entry.name}:M::{ARM_PROGRAM}:{ARM_MASK}:{shutil.which('qemu-aarch64-static')}:F"
            (BINFMT / "register").write_text(line)
        yield
    finally:
        if entry.exists():
            entry.write_text("-1")
        if mounted:
            subprocess.run(["umount", BINFMT], check=True)


def install_debian(folder: Path) -> Path:
    """The root folder of an arm64 Debian with Python, made where there is none."""
    debian, partial = folder / "debian", folder / "debian.partial"
    if debian.is_dir():
        print(f"== Debian is there: {debian}")
        return debian
    with step(f"arm64 Debian in {debian}"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        include = f"--include=python{PYTHON}-minimal,libpython{PYTHON}-stdlib"
        command = ["debootstrap", "--arch=arm64", "--variant=minbase", include, SUITE, str(partial), *mirror()]
        log = folder / "debootstrap.log"
        with log.open("w") as output:
            done = apart('exec "$0" "$@"', *command, stdout=output, stderr=subprocess.STDOUT, env=proxied())
        if done.returncode:
            sys.exit(f"debootstrap failed; the end of {log}:\n{log.read_text()[-2000:]}")
        partial.rename(debian)
    return debian


def mirror() -> list[str]:
    """Where this machine gets Debian's packages from, if it is a Debian; else debootstrap has a default."""
    if platform.freedesktop_os_release().get("ID") != "debian":
        return []
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages", "Component: main"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return found[:1]


def proxied() -> dict[str, str]:
    """The environment, with the proxy that apt is told to use."""
    command = ["apt-config", "shell", "proxy", "Acquire::http::Proxy"]
    told = subprocess.run(command, capture_output=True, text=True).stdout.strip()  # proxy='...'
    return {**os.environ, **({"http_proxy": told.split("'")[1]} if "'" in told else {})}


def install_packages(packages: Path) -> None:
    """edgert's dependencies and those of its tests for aarch64, fetched by this machine's pip."""
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    done = packages / hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    if done.exists():
        print(f"== packages are there: {packages}")
        return
    with step("aarch64 wheels"):
        shutil.rmtree(packages, ignore_errors=True)
        tags = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (36, 35, 34, 31, 28, 27, 26, 24, 17)]
        options = ["-qq", "--no-warn-conflicts", "--only-binary=:all:", f"--python-version={PYTHON}", *tags]
        pip = [sys.executable, "-m", "pip", "install", *options, "--platform=manylinux2014_aarch64"]
        subprocess.run([*pip, "--target", str(packages), *wanted], check=True)
        done.touch()


def run_tests(path: str, debian: Path, packages: Path) -> bool:
    """Whether the tests pass on a CPU that has this instruction path as its best."""
    cpu, features, tests = CPUS[path]
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": "/edgert:/packages",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/root",
        "XDG_CACHE_HOME": "/root/cache",  # in the emulated Debian
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
    }
    script = """
        cd "$0"; mkdir -p edgert packages
        mount -t proc proc proc
        mount --bind "$1" edgert; mount -o remount,bind,ro edgert
        mount --bind "$2" packages
        shift 2
        exec chroot . env --chdir=/edgert "$@"
    """
    chosen = f"from edgert.quant import isa; name = isa.choose().name; assert name == '{path}', isa.explain()"
    pytest = ["pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *(f"tests/{test}" for test in tests)]
    with step(f"{path}: {cpu} {features}"):
        for arguments in (["-c", chosen], ["-m", *pytest]):
            command = [debian, TREE, packages, f"python{PYTHON}", *arguments]
            done = apart(script, *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            print(done.stdout, end="", flush=True)
            if done.returncode:
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())
