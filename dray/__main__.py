"""``python -m dray`` is the ``dray`` command."""

from dray.cli import main

if __name__ == "__main__":
    main()
