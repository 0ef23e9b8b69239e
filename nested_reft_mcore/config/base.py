"""What every configuration section has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of options; an unknown key a value of the wrong type, or a
    number that is not finite, is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
