"""`nested-reft atlas`. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer


def atlas(
    layers: Annotated[int, typer.Option(help="Layers of the toy policies.")] = 8,
    skipped: Annotated[
        str, typer.Option(metavar="LIST", help="How many of them to skip, one after the other.")
    ] = "0,1,2,3,4",
    border_layers: Annotated[int, typer.Option(help="Layers at either end that are kept.")] = 1,
    plans: Annotated[int, typer.Option(help="At most so many plans for each number.")] = 6,
    seeds: Annotated[int, typer.Option(help="Toy policies; figures are means over them.")] = 3,
    vocabulary: Annotated[int, typer.Option(help="Tokens, the end token among them.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of the longest completion.")] = 5,
    batch_sizes: Annotated[
        str, typer.Option(metavar="LIST", help="Completions in a batch.")
    ] = "16,64,256,1024",
    output: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write atlas.json, atlas.md and atlas.png here."),
    ] = None,
) -> None:
    """Tabulate what every off-policy correction does to the gradient: exact bias and variance.

    Toy transformers whose completions can all be listed are sampled with some of their own layers
    skipped, as training does, and every estimator's gradient is summed over all completions: no
    sampling error. A minute or two on one core. docs/off_policy_atlas.md says how to read it.

    The KL per token that goes with a number of skipped layers is what to compare with your own
    run's rollout_corr/kl: a layer of your model may cost more or less than one of the toys'.

    \b
    Examples:
      nested-reft atlas --output atlas
      nested-reft atlas --seeds 1 --skipped 0,2 --batch-sizes 32,512
      nested-reft atlas --vocabulary 3 --tokens 7
    """
    values = dict(locals())
    from nested_reft_mcore.cli.analysing import run_atlas
    from nested_reft_mcore.cli.entry import leave

    leave(lambda: run_atlas(values))
