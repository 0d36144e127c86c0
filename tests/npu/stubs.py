"""Stub CANN libraries for a machine without an NPU: `python tests/npu/stubs.py FOLDER`, needs gcc and nm.

torch_npu's shared objects are linked against libraries of the CANN toolkit, and all their symbols must resolve when
they load. This reads the names of the missing libraries and symbols from the wheel that is installed, and builds
libraries of those names: `host_runtime.c` gives the functions behind memory, streams and devices; every other symbol
fails when it is called. With `LD_LIBRARY_PATH=FOLDER` the wheel then imports, sees devices made of host memory, and
refuses every kernel.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

RUNTIME = "libascendcl.so"
SOURCE = Path(__file__).with_name("host_runtime.c")


def output(*command: str | Path) -> str:
    # what is missing must not be found in an earlier build, or in a real CANN
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True,
                          check=True).stdout


def symbols(path: Path, *options: str) -> set[str]:
    """Names of dynamic symbols without their versions; weak ones (w) may stay unresolved and are left out."""
    lines = (line.split() for line in output("nm", "-D", *options, path).splitlines() if line.strip())
    return {line[-1].split("@")[0] for line in lines if line[-2] != "w"}


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"{name} is not installed in {sys.prefix}; run `make test-npu`, which builds the environment.")
    return Path(spec.origin).parent


def missing_parts() -> tuple[set[str], set[str]]:
    """(library names, symbols) that the torch_npu wheel asks for and nothing here has."""
    wheel, torch = package_folder("torch_npu"), package_folder("torch")
    objects = [*(wheel / "lib").glob("*.so"), *wheel.glob("_C*.so")]
    givers = {*objects, *(torch / "lib").glob("*.so*"), Path(sys.executable).resolve()}
    missing: set[str] = set()
    for path in objects:
        found = output("ldd", path)
        missing |= set(re.findall(r"^\s*(\S+) => not found", found, flags=re.MULTILINE))
        givers |= {Path(name) for name in re.findall(r"(/\S+) \(0x", found)}
    wanted = set().union(*(symbols(path, "-u") for path in objects))
    given = set().union(*(symbols(path, "--defined-only") for path in givers))
    return (missing - {path.name for path in givers},
            {name for name in wanted - given if not name.startswith(("Py", "_Py"))})


def build(folder: Path) -> tuple[int, int]:
    """Write the stub libraries into `folder`; returns the numbers of libraries and of symbols that only fail."""
    libraries, wanted = missing_parts()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    compile_ = ["gcc", "-shared", "-fPIC", "-O1", "-w"]
    subprocess.run([*compile_, "-o", str(folder / RUNTIME), str(SOURCE)], check=True)
    failing = sorted(wanted - symbols(folder / RUNTIME, "--defined-only"))
    source = folder / "failing.c"  # C++ names are no C identifiers: each function gets its name as an assembler label
    source.write_text("".join(f'int failing_{number}(void) __asm__("{name}"); '
                              f"int failing_{number}(void) {{ return 500000; }}\n"
                              for number, name in enumerate(failing)))
    subprocess.run([*compile_, "-o", str(folder / RUNTIME), str(SOURCE), str(source), f"-Wl,-soname,{RUNTIME}"],
                   check=True)
    # the others only need their name; functions looked up in them by name are found in the runtime they link
    for name in sorted(libraries - {RUNTIME}):
        subprocess.run([*compile_, "-o", str(folder / name), "-x", "c", "/dev/null", f"-Wl,-soname,{name}",
                        "-Wl,--no-as-needed", f"-L{folder}", f"-l:{RUNTIME}"], check=True)
    return len(libraries), len(failing)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/npu/stubs.py FOLDER")
    for tool in ("gcc", "nm", "readelf", "ldd"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is missing: the stub CANN libraries of the NPU tests cannot be built.")
    libraries, failing = build(Path(sys.argv[1]))
    print(f"{libraries} stub libraries in {sys.argv[1]}; {failing} functions only fail", flush=True)


if __name__ == "__main__":
    main()
