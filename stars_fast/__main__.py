"""``python -m stars_fast``: the same as the command ``stars-fast``."""

from stars_fast.cli import app

if __name__ == "__main__":
    app(prog_name="stars-fast")
