"""What every configuration section has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of options; an unknown key or a value of the wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
