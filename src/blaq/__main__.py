"""The console script ``blaq``, and ``python -m blaq``."""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires


def main() -> None:
    """Run the command line; say what to install where the packages it needs are missing."""
    try:
        from blaq.cli import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "blaq"):
            raise
        print(f"blaq: {package} is not installed; pip install 'blaq[{extra_of(package)}]'", file=sys.stderr)
        sys.exit(2)


def extra_of(package: str) -> str:
    """The extra that brings a package, by the name of its import: ``train``, what every command needs, wherever it is in."""
    try:
        requirements = requires("blaq") or ()
    except PackageNotFoundError:  # run from its source
        return "train"
    found = [re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", requirement) for requirement in requirements]
    extras = {match[2] for match in found if match and re.sub("[-.]", "_", match[1]).lower() == package.lower()}
    return "train" if "train" in extras else min(extras - {"dev"}, default="train")


if __name__ == "__main__":
    main()
