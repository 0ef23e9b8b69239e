"""Turn a checkpoint into a Hugging Face directory: `nested-reft convert mcore-to-hf`.

python tools/convert_mcore_to_hf.py --checkpoint DIR --output DIR [--verify] [--tolerance X]
    [--max-shard-size 5GB] [--tokenizer PATH] [--tensor-parallel N] [--pipeline-parallel N]
    [--dtype auto|float32|bfloat16] [--force]

Alone, or sharing the work: `mpirun -n 8 python tools/convert_mcore_to_hf.py ...`, torchrun, srun.
"""

import sys

from nested_reft_mcore.cli import main

if __name__ == "__main__":
    # The processes that a bare start makes run the same command line.
    sys.argv[1:1] = ["convert", "mcore-to-hf"]
    main()
