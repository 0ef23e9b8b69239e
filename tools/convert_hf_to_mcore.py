"""Turn a Hugging Face directory into a checkpoint: `nested-reft convert hf-to-mcore`.

python tools/convert_hf_to_mcore.py --hf DIR --output DIR [--verify] [--tolerance X]
    [--tensor-parallel N] [--pipeline-parallel N] [--dtype auto|float32|bfloat16]
    [--allow-nonfinite] [--force]

Alone, or sharing the work: `mpirun -n 8 python tools/convert_hf_to_mcore.py ...`, torchrun, srun.
"""

import sys

from nested_reft_mcore.cli import main

if __name__ == "__main__":
    # The processes that a bare start makes run the same command line.
    sys.argv[1:1] = ["convert", "hf-to-mcore"]
    main()
