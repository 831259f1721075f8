"""`python -m server`: the same as `spq-serve`."""

from server.cli import main

if __name__ == "__main__":
    main()
