"""``python -m halfbyte`` is ``halfbyte``."""

from halfbyte.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
