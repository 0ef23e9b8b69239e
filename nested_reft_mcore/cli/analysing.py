"""What `nested-reft atlas` does, once its options are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_reft_mcore.cli.files import COMMAND_LINE
from nested_reft_mcore.config.atlas import AtlasOptions, check_atlas
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.observability.environment import environment_report


def run_atlas(values: Mapping[str, Any]) -> int:
    """Make the atlas, print it, write its files; returns the exit code. Raises UserError."""
    options = section_from_dict(AtlasOptions, values, COMMAND_LINE)
    check_atlas(options)
    from nested_reft_mcore.analysis.atlas import AtlasSettings, make_atlas
    from nested_reft_mcore.analysis.atlas_report import atlas_record, atlas_tables, save_figure
    from nested_reft_mcore.analysis.sequence_space import SequenceSpace

    try:
        settings = AtlasSettings(
            num_layers=options.layers,
            skipped=options.depths,
            border_layers=options.border_layers,
            num_plans=options.plans,
            num_seeds=options.seeds,
            space=SequenceSpace(options.vocabulary, options.tokens),
            batch_sizes=options.sizes,
        )
    except ValueError as error:
        raise UserError(
            f"--vocabulary {options.vocabulary} --tokens {options.tokens}: {error}"
        ) from error
    atlas = make_atlas(settings)
    tables = atlas_tables(atlas)
    print(tables, end="")
    if options.output is not None:
        directory = Path(options.output)
        directory.mkdir(exist_ok=True)
        record = atlas_record(atlas) | {"environment": environment_report()}
        (directory / "atlas.json").write_text(json.dumps(record, indent=1) + "\n")
        (directory / "atlas.md").write_text(tables)
        save_figure(atlas, directory / "atlas.png")
        print(f"\nwritten: {directory / 'atlas.json'}, atlas.md, atlas.png")
    return 0
