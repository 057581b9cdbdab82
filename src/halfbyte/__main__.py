"""``python -m halfbyte`` is ``halfbyte``."""

from halfbyte.cli.main import process

if __name__ == "__main__":
    process()
