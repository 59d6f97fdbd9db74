"""`python -m memwrap`."""

from memwrap.cli.app import main

if __name__ == "__main__":
    main()
