"""`python -m hidream` is the `hidream` command."""

from hidream.cli import main

if __name__ == "__main__":
    main()
