"""Builds the native decoding kernels; the metadata live in pyproject.toml.

The kernels are optional: where there is no compiler the package installs without them, and
decoding uses torch.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "nested_reft_mcore.mcore.native._decode_kernels",
            ["nested_reft_mcore/mcore/native/decode_kernels.cpp"],
            depends=[
                f"nested_reft_mcore/mcore/native/{name}.h"
                for name in ("records", "products", "attention")
            ],
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
