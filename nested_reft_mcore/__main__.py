"""`python -m nested_reft_mcore` is `nested-reft`."""

from nested_reft_mcore.cli import main

if __name__ == "__main__":
    main()
