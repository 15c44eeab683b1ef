"""``python -m mlxedge``."""

from mlxedge.cli import main

if __name__ == "__main__":
    main()
