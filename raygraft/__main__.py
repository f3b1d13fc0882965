"""`python -m raygraft` is the command line."""

from raygraft.cli import main

if __name__ == "__main__":
    main()
