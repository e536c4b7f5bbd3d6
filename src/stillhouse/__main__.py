"""`python -m stillhouse`, and `torchrun -m stillhouse`."""

from stillhouse.cli import main

if __name__ == "__main__":
    main()
