"""Turn a checkpoint into a Hugging Face directory: `nested-reft convert mcore-to-hf`.

python tools/convert_mcore_to_hf.py --checkpoint DIR --output DIR [--tokenizer PATH]
    [--max-shard-size MB] [--tensor-parallel N] [--pipeline-parallel N]
    [--dtype float32|bfloat16] [--force]
"""

import sys

from nested_reft_mcore.cli import main

if __name__ == "__main__":
    # The processes that a bare start makes run the same command line.
    sys.argv[1:1] = ["convert", "mcore-to-hf"]
    main()
