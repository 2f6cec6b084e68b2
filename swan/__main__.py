"""`python -m swan` is the command `swan`."""

from swan.cli import main

if __name__ == "__main__":
    main()
