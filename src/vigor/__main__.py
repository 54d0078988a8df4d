"""`python -m vigor`, which is also what `accelerate launch -m vigor train …` runs."""

from vigor.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
