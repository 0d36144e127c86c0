"""Operator schemas of other torch-npu releases: `python tests/npu/old_schemas.py FOLDER`.

Every wheel carries the list of its operators as YAML. This fetches wheels through pip, keeps only that file as
FOLDER/VERSION.yaml. Without a version that cannot be fetched it goes on: the test of that version fails, and no other.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("2.6.0", "2.7.1", "2.8.0", "2.9.0", "2.10.0", "2.12.0", "2.14.0")
MEMBER = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def fetch(version: str, target: Path) -> None:
    """Write the operator list of a release; any CPython's wheel will do, nothing of it is run."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                        "--python-version", "3.11", "--dest", folder, f"torch-npu=={version}"], check=True, timeout=120)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            target.write_bytes(wheel.read(MEMBER))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for version in VERSIONS:
        target = folder / f"{version}.yaml"
        try:
            if not target.exists():
                fetch(version, target)
        except (subprocess.SubprocessError, StopIteration, KeyError, OSError) as error:
            print(f"torch-npu {version} is left out of the comparison of schemas: {error}", flush=True)


if __name__ == "__main__":
    main()
