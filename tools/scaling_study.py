"""Scaling studies: a grid of model sizes, skip ratios, laws, corrections, layouts and seeds.

    python tools/scaling_study.py plan STUDY.yaml      what there is to run, and what fits
    python tools/scaling_study.py run STUDY.yaml       here, one run after the other
    python tools/scaling_study.py submit STUDY.yaml    as a Slurm job array
    python tools/scaling_study.py status STUDY.yaml    how far it is
    python tools/scaling_study.py report STUDY.yaml    one table, CSV and Markdown, and plots

docs/scaling_studies.md tells how to write one. Exit codes: 0 well; 1 a run is broken or stale, or
nothing fits; 2 a mistake in what was given; 75 stopped on request: the same command goes on.
"""

from nested_reft_mcore.studies.commands import main

if __name__ == "__main__":
    main()
