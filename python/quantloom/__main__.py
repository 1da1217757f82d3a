"""`python -m quantloom`: the command line."""

from quantloom.cli import main

if __name__ == "__main__":
    main()
