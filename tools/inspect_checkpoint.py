"""Say what a checkpoint or a Hugging Face directory holds: `nested-reft inspect`.

python tools/inspect_checkpoint.py DIR [--checksums] [--all] [--json]
"""

import sys

from nested_reft_mcore.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["inspect"]
    main()
