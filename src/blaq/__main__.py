"""The console script ``blaq``, and ``python -m blaq``."""

import sys


def main() -> None:
    """Run the command line; say what to install where the packages it needs are missing."""
    try:
        from blaq.cli import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "blaq"):
            raise
        print(f"blaq: {package} is not installed; pip install 'blaq[train]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
