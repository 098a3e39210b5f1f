"""What the command lines of the three scripts have in common, and on what machine they run."""

import argparse
import inspect
import platform
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import joblib

from data.files import InputError


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def status_of_main(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a script's main. What it cannot use or write ends it with one line on stderr and exit status 2, Ctrl-C
    with 130, as shells have it."""
    script = Path(inspect.getfile(main)).name

    @wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        status = 2
        try:
            return main(argv)
        except InputError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except MemoryError as error:
            problem = f"too little memory ({error})"
        except KeyboardInterrupt:
            status, problem = 130, "interrupted; an unfinished training run is resumed by the same command"
        print(f"{script}: {' '.join(problem.split())}", file=sys.stderr)
        return status

    return guarded


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type, for argparse, of an option that takes whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"found {text}, expected a whole number from {least} to {most}")
        return number

    return read


def processor() -> list[str]:
    """Its name and what it has for matrix products, as Linux tells them; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    name, has = re.findall(r"^model name\s*: (.+)", text, re.M), r"\b(?:avx2|avx512f|avx512_bf16|amx_bf16)\b"
    return name[:1] + sorted(set(re.findall(has, text)))


def environment() -> dict:
    """Versions and machine, for a report."""
    import keras  # Here, because prepare.py runs without it.

    packages = ("keras", keras.backend.backend(), "numpy", "scikit-learn", "pandas")
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    machine = [platform.system(), platform.machine(), f"{joblib.cpu_count()} cores", *processor()]
    return {"versions": versions, "machine": ", ".join(machine)}
